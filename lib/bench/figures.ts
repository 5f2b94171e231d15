// SPDX-License-Identifier: Apache-2.0
import type { Distribution, Figure, Measurement } from './model.ts';
import { distribution, histogram, medianInterval, mergeHistograms } from './statistics.ts';

const STATISTICS = ['min', 'p50', 'p99', 'max', 'mean'] as const;

/**
 * One figure out of the passes over it: pooled where a sample is a sample (minimum, maximum, histogram, p99), the
 * median of the passes where one noisy pass must not decide (p50).
 */
export function figureOf(passes: readonly Measurement[]): Figure {
  const [first] = passes;
  if (!first) throw new RangeError('a figure needs at least one pass');
  const each = passes.map(({ samples }) => distribution(samples));
  const pooled = distribution(passes.flatMap(({ samples }) => Array.from(samples)));
  const medians = each.map(({ p50 }) => p50).sort((a, b) => a - b);
  const repeats: (keyof Distribution)[] =
    passes.length < 2 ? [] : STATISTICS.filter((name) => each.every((pass) => pass[name] === each[0]![name]));
  const setUps = passes.map(({ setUpNs }) => setUpNs).filter((value) => value !== undefined);
  return {
    id: first.id,
    title: first.title,
    unit: first.unit,
    parameters: first.parameters ?? {},
    ...pooled,
    p50: medians[(medians.length - 1) >> 1]!,
    histogram: mergeHistograms(passes.map(({ samples }) => histogram(samples))),
    passes: each,
    repeats,
    ...(passes.length < 2 || repeats.includes('p50') ? {} : { interval: medianInterval(medians) }),
    counts: first.counts ?? {},
    ...(setUps.length === 0 ? {} : { setUpNs: Math.min(...setUps) }),
  };
}

/** A ratio of two figures' medians, with the interval their own intervals allow. */
export function ratioFigure(id: string, title: string, above: Figure, below: Figure): Figure {
  const round = (value: number): number => Math.round(value * 10_000) / 10_000;
  const pairs = above.passes.map((pass, i) => round(pass.p50 / (below.passes[i] ?? below).p50));
  return figureOf(
    pairs.map((value) => ({ id, title, unit: 'ratio', samples: [value], parameters: above.parameters })),
  );
}
