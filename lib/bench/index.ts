// SPDX-License-Identifier: Apache-2.0
import { matches } from './bench.ts';
import { benches } from './suites/index.ts';

export { findHidden, findUnmanaged, type UnmanagedRange } from '../probe/index.ts';
export {
  type BackingName,
  type Bench,
  type BenchContext,
  type FigureSpec,
  matches,
  UnavailableError,
} from './bench.ts';
export { figureOf, ratioFigure } from './figures.ts';
export { measureHere } from './measure.ts';
export {
  BENCH_SCHEMA,
  type BenchEnvironment,
  type BenchEvent,
  type BenchReport,
  type Distribution,
  type Figure,
  type Histogram,
  type Measurement,
  type Missing,
  type Unit,
} from './model.ts';
export { BenchError, type BenchRequest, differingFigures, runBench } from './run.ts';
export { bucketOf, distribution, histogram, median, medianInterval, percentile } from './statistics.ts';
export { benches } from './suites/index.ts';

/** What is measured unless asked for more: the other backings and slot numbers take long and say little new. */
export const DEFAULT_PATTERNS: readonly string[] = [
  'exit',
  'round-trip/anonymous',
  'round-trip/memfd',
  'switch/anonymous',
  'memremap/anonymous',
  'nested-state',
  'invalidate/*/anonymous',
  'memslot/*/*/anonymous/slots=32',
  'memslot/*/*/anonymous/slots=512',
];
/** These come with --unmanaged. */
export const UNMANAGED_PATTERNS: readonly string[] = [
  'round-trip/unmanaged',
  'switch/unmanaged',
  'memremap/unmanaged',
  'invalidate/*/unmanaged',
  'memslot/*/nested/unmanaged/slots=32',
  'memslot/*/nested/unmanaged/slots=512',
];

/** Figures whose id matches one of the patterns, in the order in which they are measured. */
export function selectFigures(patterns: readonly string[]): { id: string; title: string }[] {
  return benches
    .flatMap(({ figures }) => figures)
    .filter(({ id }) => patterns.some((pattern) => matches(pattern, id)))
    .map(({ id, title }) => ({ id, title }));
}
