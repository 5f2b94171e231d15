// SPDX-License-Identifier: Apache-2.0
import type { Fingerprint } from '../probe/index.ts';

/** Version of the result file; a reader refuses what it does not know. */
export const BENCH_SCHEMA = 'nvmx-bench/1';

/** `cycles` are TSC ticks, taken by the guest or by native code on the host. Less is better of all of them. */
export type Unit = 'cycles' | 'ratio' | 'calls';

export interface Distribution {
  readonly min: number;
  readonly p50: number;
  readonly p99: number;
  readonly max: number;
  readonly mean: number;
  /** Samples behind these numbers. */
  readonly count: number;
}

/** [lower bound of the bucket, samples in it], ascending, empty buckets left out; see statistics.ts. */
export type Histogram = readonly (readonly [from: number, samples: number])[];

/** What one measurement of one thing gave. */
export interface Figure extends Distribution {
  /** Stable: `round-trip/anonymous/apic-access`. */
  readonly id: string;
  readonly title: string;
  readonly unit: Unit;
  /** Sizes, slots, rounds: two figures with different parameters are not comparable. */
  readonly parameters: Readonly<Record<string, number | string>>;
  readonly histogram: Histogram;
  /** The same measurement made several times: one entry each. */
  readonly passes: readonly Distribution[];
  /** Which of min, p50, p99, max, mean were the same number in every pass. */
  readonly repeats: readonly (keyof Distribution)[];
  /** 95 % bootstrap interval of p50 over the passes; absent where all passes gave the same. */
  readonly interval?: readonly [number, number];
  /** What is counted rather than timed, such as the exits L1 saw; asserted where it must be exact. */
  readonly counts: Readonly<Record<string, number>>;
  /** Time to get ready for it, where that is of interest, in ns. */
  readonly setUpNs?: number;
}

/** A figure this machine cannot give, and why. */
export interface Missing {
  readonly id: string;
  readonly reason: string;
}

export interface BenchEnvironment {
  readonly kind: 'host' | 'lab';
  readonly kernel: string;
  readonly cpu: string;
  readonly microcode?: string;
  /** The emulator under a lab machine. */
  readonly engine?: string;
  /** Parameters of kvm and kvm_intel, `module.name` → value. */
  readonly parameters: Readonly<Record<string, string>>;
  readonly commandLine: string;
  readonly fingerprint: Fingerprint;
  readonly cpusOnline: number;
  /** TSC ticks per second, as seen during the run; rounded to MHz. */
  readonly tscHz: number;
  /** The CPU everything was pinned to. */
  readonly pinnedTo?: number;
  /** Where the unmanaged memory was found, or why there is none. */
  readonly unmanaged: { readonly address: number; readonly size: number } | { readonly reason: string };
}

export interface BenchReport {
  readonly schema: typeof BENCH_SCHEMA;
  /** Version of this package. */
  readonly nvmx: string;
  readonly environment: BenchEnvironment;
  /** How many times the whole list was measured. */
  readonly passes: number;
  readonly quick: boolean;
  /**
   * Lab: the whole run was made again in a second machine. Ids of the figures that were not the same, number for
   * number, histogram included; none is what is expected there.
   */
  readonly secondRun?: { readonly differing: readonly string[] };
  readonly figures: readonly Figure[];
  readonly missing: readonly Missing[];
  /** What a reader should know before believing the numbers: noise, no pinning. */
  readonly notes: readonly string[];
}

/** What one pass over one benchmark hands in. Samples are in the figure's unit. */
export interface Measurement {
  readonly id: string;
  readonly title: string;
  readonly unit: Unit;
  readonly parameters?: Readonly<Record<string, number | string>>;
  readonly samples: ArrayLike<number>;
  readonly counts?: Readonly<Record<string, number>>;
  readonly setUpNs?: number;
}

/** What a run tells while it goes on; also the line protocol between the measuring process and the caller. */
export type BenchEvent =
  | { readonly event: 'environment'; readonly environment: BenchEnvironment }
  | { readonly event: 'start'; readonly id: string; readonly pass: number; readonly passes: number }
  | { readonly event: 'figure'; readonly figure: Figure }
  | { readonly event: 'missing'; readonly missing: Missing }
  | { readonly event: 'note'; readonly note: string }
  | { readonly event: 'end' };
