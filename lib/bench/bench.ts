// SPDX-License-Identifier: Apache-2.0
import type { HostProbe, UnmanagedRange } from '../probe/index.ts';
import type { Measurement } from './model.ts';

/** What memory stands behind the pages that a benchmark is about. */
export type BackingName = 'anonymous' | 'memfd' | 'hugetlb' | 'guest-memfd' | 'unmanaged';

export interface BenchContext {
  readonly probe: HostProbe;
  readonly quick: boolean;
  /** True in the emulated machine: fewer rounds there, and the figure's parameters say so. */
  readonly slow: boolean;
  /** As much memory as on hardware; in the emulated machine only when asked for. */
  readonly full: boolean;
  readonly unmanaged: UnmanagedRange | { readonly reason: string };
}

export interface FigureSpec {
  readonly id: string;
  readonly title: string;
  /** Why this machine cannot measure it, or nothing. Told before anything is set up. */
  missing(context: BenchContext): string | undefined;
}

/** Figures that are measured together, in one go, several passes over. */
export interface Bench {
  /** Beginning of its figures' ids, or a name for messages. */
  readonly family: string;
  readonly nested: boolean;
  /** The memory it is about, where that matters. */
  readonly backing?: BackingName;
  readonly figures: readonly FigureSpec[];
  /** One pass over the wanted figures. @throws UnavailableError for a lack that only trying shows */
  measure(context: BenchContext, wanted: ReadonlySet<string>): Promise<Measurement[]>;
}

/** The machine cannot give a figure; the message is the reason. */
export class UnavailableError extends Error {
  override readonly name = 'UnavailableError';
}

/** `round-trip`, `round-trip/memfd`, or a glob such as `memslot/&#42;/nested/&#42;`: `*` stands for one part. */
export function matches(pattern: string, id: string): boolean {
  const wanted = pattern.split('/');
  const parts = id.split('/');
  if (wanted.length > parts.length) return false;
  return wanted.every((part, i) => {
    const source = part.replace(/[.+?^${}()|[\]\\]/g, '\\$&').replace(/\*/g, '[^/]*');
    return new RegExp(`^${source}$`).test(parts[i]!);
  });
}
