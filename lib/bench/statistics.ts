// SPDX-License-Identifier: Apache-2.0
import type { Distribution, Histogram } from './model.ts';

/** Each power of two has this many buckets: a bucket is at most 1/16 wider than its lower bound. */
const SUB_BUCKETS = 16;

/** Nearest-rank percentile of ascending numbers: a number that was measured, never one in between. */
export function percentile(sorted: ArrayLike<number>, percent: number): number {
  if (sorted.length === 0) throw new RangeError('there is no percentile of nothing');
  const rank = Math.max(1, Math.ceil((percent / 100) * sorted.length));
  return sorted[rank - 1]!;
}

export function ascending(samples: ArrayLike<number>): Float64Array {
  return Float64Array.from(samples).sort();
}

export function distribution(samples: ArrayLike<number>): Distribution {
  const sorted = ascending(samples);
  let sum = 0;
  for (const value of sorted) sum += value;
  return {
    min: percentile(sorted, 0),
    p50: percentile(sorted, 50),
    p99: percentile(sorted, 99),
    max: percentile(sorted, 100),
    mean: Math.round((sum / sorted.length) * 1000) / 1000,
    count: sorted.length,
  };
}

/** Lower bound of the log-linear bucket a number falls into; whole numbers below 16 have one each. */
export function bucketOf(value: number): number {
  if (value < SUB_BUCKETS) return Math.max(0, Math.floor(value));
  const width = 2 ** (Math.floor(Math.log2(value)) - Math.log2(SUB_BUCKETS));
  return Math.floor(value / width) * width;
}

export function histogram(samples: ArrayLike<number>): Histogram {
  const buckets = new Map<number, number>();
  for (const value of ascending(samples)) {
    const bucket = bucketOf(value);
    buckets.set(bucket, (buckets.get(bucket) ?? 0) + 1);
  }
  return [...buckets];
}

export function mergeHistograms(parts: readonly Histogram[]): Histogram {
  const buckets = new Map<number, number>();
  for (const [from, count] of parts.flat()) buckets.set(from, (buckets.get(from) ?? 0) + count);
  return [...buckets].sort(([a], [b]) => a - b);
}

export function median(values: ArrayLike<number>): number {
  const sorted = ascending(values);
  if (sorted.length === 0) throw new RangeError('there is no median of nothing');
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** A small generator with a fixed start: an interval must not change because it is computed again. */
function generator(): () => number {
  let state = 0x9e3779b9;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** 95 % percentile-bootstrap interval of the median. */
export function medianInterval(values: ArrayLike<number>, resamples = 2000): [number, number] {
  const random = generator();
  const medians = new Float64Array(resamples);
  const draw = new Float64Array(values.length);
  for (let i = 0; i < resamples; i += 1) {
    for (let j = 0; j < draw.length; j += 1) draw[j] = values[Math.floor(random() * values.length)]!;
    medians[i] = median(draw);
  }
  medians.sort();
  return [percentile(medians, 2.5), percentile(medians, 97.5)];
}

/** Spread of the passes' medians, as a part of their median: what one run says about its own noise. */
export function spread(values: ArrayLike<number>): number {
  const sorted = ascending(values);
  const middle = median(sorted);
  return middle === 0 ? 0 : (sorted[sorted.length - 1]! - sorted[0]!) / middle;
}
