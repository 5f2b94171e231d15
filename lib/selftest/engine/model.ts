// SPDX-License-Identifier: Apache-2.0
import type { Change, Fingerprint, HostProbe, KernelKind } from '../../probe/index.ts';

/** Version of the JSON result file; readers refuse a major they do not know. */
export const RESULT_SCHEMA = 'nvmx-result/1';

/**
 * - `pass`: every observation equals its expectation.
 * - `fail`: an observation differs, or the kernel logged a problem while the test ran.
 * - `skip`: a requirement is missing here; the reason names it.
 * - `timeout`: no result within the limit although the machine lives.
 * - `crash`: the machine under test died (panic, oops, hang).
 * - `error`: the harness itself failed; says nothing about the kernel.
 */
export type Verdict = 'pass' | 'fail' | 'skip' | 'timeout' | 'crash' | 'error';

/** One observed value: a count, a flag, a short text, or an ordered list of them. */
export type Observed = number | string | boolean | null | readonly Observed[];

/** What a test saw, by name; counts are numbers, hexadecimal addresses are strings. */
export type Observations = Readonly<Record<string, Observed>>;

/** What one observation may be: exactly one value, one of several, or a closed range. */
export type Expected =
  | Observed
  | { readonly oneOf: readonly Observed[] }
  | { readonly min: number; readonly max: number };

export type ExpectationTable = Readonly<Record<string, Expected>>;

/** Which table a verdict was made with; `any` where both kernels must do the same. */
export type ExpectationName = KernelKind | 'any';

export type Expectations =
  | { readonly any: ExpectationTable }
  /** `patched` is right where this change of the series is in the kernel. */
  | ({ readonly change: Change } & { readonly [K in KernelKind]: ExpectationTable });

/** Something a test needs from the machine. `missing` says what is lacking and how to get it, or nothing. */
export interface Requirement {
  readonly name: string;
  missing(probe: HostProbe): string | undefined;
}

/** `host-crash` tests may take the kernel down and run only on a machine made to be thrown away. */
export type Hazard = 'none' | 'host-crash';

export interface SelftestContext {
  /** Aborted at the test's time limit and on Ctrl-C. */
  readonly signal: AbortSignal;
  /** Seeded numbers in [0, 1) for racing tests; the same seed gives the same sequence. */
  readonly random: () => number;
  readonly probe: HostProbe;
  /** Resolves after `ms` milliseconds; rejects when the test is aborted. */
  sleep(ms: number): Promise<void>;
}

export interface Selftest {
  /** Stable, kernel-style: `group/variant/mode`. */
  readonly id: string;
  readonly title: string;
  /** The command line that runs it; default `nvmx test` and its id. */
  readonly command?: string;
  readonly requires: readonly Requirement[];
  readonly hazard: Hazard;
  /** Default limit in milliseconds of wall time on the machine where it runs. */
  readonly timeoutMs: number;
  /** True where the outcome depends on timing: the seed is reported with the result. */
  readonly racing: boolean;
  readonly expectations: Expectations;
  /** Runs the experiment. Values under `evidence` are reported, not judged. */
  body(
    context: SelftestContext,
  ): Promise<{ observed: Observations; evidence?: Observations; subtests?: readonly Subtest[] }>;
}

/** A part of a test that has a result of its own; it is reported as `id/name` before the test. */
export interface Subtest {
  readonly name: string;
  readonly verdict: 'pass' | 'fail' | 'skip';
  readonly reason?: string;
}

/** A whole number a user may choose with `--set suite.name=values`. */
export interface Parameter {
  readonly title: string;
  readonly min: number;
  readonly max: number;
  /** The values of a run that does not say. */
  readonly default: readonly number[];
}

/** The chosen values, by parameter name. */
export type ParameterValues = Readonly<Record<string, readonly number[]>>;

/** A group of tests; its name is the first part of their ids. */
export interface Suite {
  readonly name: string;
  readonly parameters: Readonly<Record<string, Parameter>>;
  /**
   * The tests for these values: every parameter has at least one.
   *
   * @param chosen the parameters whose values are the user's, not the default
   */
  tests(values: ParameterValues, chosen: ReadonlySet<string>): readonly Selftest[];
}

export interface TestResult {
  readonly id: string;
  /** The test that this is a part of. */
  readonly parent?: string;
  /** Which round of `--repeat` or `--duration`, from 1; absent in a run of one round. */
  readonly iteration?: number;
  /** The combination of `--matrix` it ran under, such as `kvm_intel.ept=0`. */
  readonly variant?: string;
  readonly verdict: Verdict;
  /** Always there unless the verdict is `pass` on a patched or `any` table. */
  readonly reason?: string;
  readonly expectation: ExpectationName;
  readonly evidence: Observations;
  readonly durationMs: number;
  /** Of that, what vCPUs spent in KVM_RUN, all threads added up; absent where no test ran. */
  readonly kvmRunMs?: number;
  /** What the kernel logged while the test ran; absent when it said nothing. */
  readonly kernelLog?: readonly string[];
  /** Only for racing tests. */
  readonly seed?: number;
  /** A command line that runs this one test again the same way; for anything that did not pass. */
  readonly reproduce?: string;
}

export interface MachineInfo {
  readonly kind: 'host' | 'lab';
  readonly kernel: string;
  readonly cpu: string;
  /** Microcode revision as the kernel prints it, where known. */
  readonly microcode?: string;
  /** The emulator under a lab machine. */
  readonly engine?: string;
  /** Parameters of kvm and kvm_intel, `module.name` → value. */
  readonly parameters: Readonly<Record<string, string>>;
  readonly fingerprint: Fingerprint;
}

export interface Summary {
  readonly passed: number;
  readonly failed: number;
  readonly skipped: number;
  /** Every verdict with its count; the three above add these up. */
  readonly verdicts: Readonly<Record<Verdict, number>>;
}

export interface RunReport {
  readonly schema: typeof RESULT_SCHEMA;
  /** Version of this package. */
  readonly nvmx: string;
  readonly machine: MachineInfo;
  /** With `--matrix`: the machine of every combination, in order; `machine` is the first. */
  readonly variants?: readonly { readonly variant: string; readonly machine: MachineInfo }[];
  readonly seed: number;
  readonly results: readonly TestResult[];
  readonly summary: Summary;
}

/** What a run tells while it goes on; also the line protocol between the lab machine and the host. */
export type RunEvent =
  | { readonly event: 'machine'; readonly machine: MachineInfo; readonly variant?: string }
  | { readonly event: 'start'; readonly id: string; readonly iteration: number }
  /** The machine's user space lives; once a second while a test runs. */
  | { readonly event: 'heartbeat' }
  | { readonly event: 'result'; readonly result: TestResult }
  | { readonly event: 'end' };

export function summarize(results: readonly TestResult[]): Summary {
  const verdicts: Record<Verdict, number> = { pass: 0, fail: 0, skip: 0, timeout: 0, crash: 0, error: 0 };
  for (const result of results) verdicts[result.verdict] += 1;
  return {
    passed: verdicts.pass,
    failed: verdicts.fail + verdicts.timeout + verdicts.crash + verdicts.error,
    skipped: verdicts.skip,
    verdicts,
  };
}
