// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import {
  bucketOf,
  differingFigures,
  distribution,
  figureOf,
  findHidden,
  histogram,
  matches,
  median,
  medianInterval,
  percentile,
  ratioFigure,
  selectFigures,
} from '../../lib/bench/index.ts';

describe('statistics', () => {
  test('percentiles are numbers that were measured (nearest rank)', () => {
    const sorted = Array.from({ length: 100 }, (_, i) => i + 1);
    expect([0, 1, 50, 99, 99.5, 100].map((p) => percentile(sorted, p))).toEqual([1, 1, 50, 99, 100, 100]);
    expect(percentile([7], 50)).toBe(7);
    expect(() => percentile([], 50)).toThrow(RangeError);
  });

  test('a distribution does not need its samples in order', () => {
    expect(distribution([5, 1, 3, 2])).toEqual({ min: 1, p50: 2, p99: 5, max: 5, mean: 2.75, count: 4 });
  });

  test('numbers are sorted as numbers', () => {
    expect(distribution([10, 9, 100]).p50).toBe(10);
  });

  test('a bucket begins at most a sixteenth below its numbers', () => {
    expect([0, 1, 15, 16, 17, 31, 32, 33, 34, 1000].map(bucketOf)).toEqual([
      0, 1, 15, 16, 17, 31, 32, 32, 34, 992,
    ]);
    for (let value = 16; value < 100_000; value += 37) {
      expect(value - bucketOf(value)).toBeLessThan(value / 16);
      expect(bucketOf(bucketOf(value))).toBe(bucketOf(value));
    }
  });

  test('a histogram counts every sample once, ascending', () => {
    expect(histogram([33, 1, 32, 1, 40])).toEqual([
      [1, 2],
      [32, 2],
      [40, 1],
    ]);
  });

  test('the median of an even number is in the middle, its interval inside the data and the same every time', () => {
    expect(median([4, 1, 3, 2])).toBe(2.5);
    const values = [10, 11, 12, 13, 14, 15, 16, 17, 100];
    const interval = medianInterval(values);
    expect(interval).toEqual(medianInterval(values));
    expect(interval[0]).toBeGreaterThanOrEqual(10);
    expect(interval[0]).toBeLessThanOrEqual(14);
    expect(interval[1]).toBeGreaterThanOrEqual(14);
    expect(interval[1]).toBeLessThan(100);
    expect(medianInterval([5, 5, 5])).toEqual([5, 5]);
  });
});

describe('figures', () => {
  const pass = (...samples: number[]) => ({ id: 'a/b', title: 't', unit: 'cycles' as const, samples });

  test('one noisy pass does not decide', () => {
    const figure = figureOf([pass(10, 10, 11), pass(10, 10, 12), pass(500, 500, 500)]);
    expect(figure).toMatchObject({ p50: 10, min: 10, max: 500, count: 9 });
    expect(figure.repeats).toEqual([]);
    expect(figure.interval).toEqual([10, 500]);
  });

  test('says which statistics were the same in every pass', () => {
    const figure = figureOf([pass(10, 10, 11), pass(10, 10, 12)]);
    expect(figure.repeats).toEqual(['min', 'p50']);
    expect(figure.interval).toBeUndefined();
  });

  test('a ratio divides pass by pass', () => {
    const ratio = ratioFigure('r', 't', figureOf([pass(20), pass(30)]), figureOf([pass(10), pass(10)]));
    expect(ratio).toMatchObject({ unit: 'ratio', min: 2, max: 3 });
  });

  test('two runs differ in the figures that are not equal in every number', () => {
    const one = [figureOf([pass(1, 2)]), { ...figureOf([pass(3)]), id: 'c' }];
    expect(differingFigures(one, structuredClone(one))).toEqual([]);
    expect(differingFigures(one, [figureOf([pass(1, 3)])])).toEqual(['a/b', 'c']);
    expect(differingFigures([], one)).toEqual(['a/b', 'c']);
  });
});

test('a pattern is the first parts of an id, or stands for parts with *', () => {
  expect(matches('memslot', 'memslot/map/plain')).toBe(true);
  expect(matches('memslot/*/nested', 'memslot/map/plain')).toBe(false);
  expect(matches('memslot/m*/plain', 'memslot/map/plain')).toBe(true);
  expect(matches('mem', 'memslot/map')).toBe(false);
  expect(selectFigures(['switch/anonymous']).map(({ id }) => id.split('=')[1])).toEqual([
    '1',
    '2',
    '4',
    '8',
    '9',
    '16',
  ]);
  const ids = selectFigures(['*']).map(({ id }) => id);
  expect(new Set(ids).size).toBe(ids.length);
});

describe('unmanaged memory', () => {
  const iomem = [
    '00000000-00000fff : Reserved',
    '00001000-0009fbff : System RAM',
    '00100000-1fffffff : System RAM',
    '  01000000-01dfffff : Kernel code',
    '3fff0000-3fffffff : ACPI Tables',
    'fec00000-fec003ff : IOAPIC 0',
  ].join('\n');
  const question = { iomem, commandLine: 'quiet mem=512M', memoryBytes: 2 ** 30, firmwareEnds: [] };

  test('is what mem= hides, below the next thing that is in the way', () => {
    expect(findHidden(question)).toEqual({ address: 0x2000_0000, size: 510 * 2 ** 20 });
  });

  test('ends where the firmware says when nobody knows the size', () => {
    const { memoryBytes: _, ...host } = question;
    expect(findHidden({ ...host, firmwareEnds: [0x9_fc00, 0x3000_0000] })).toEqual({
      address: 0x2000_0000,
      size: 256 * 2 ** 20,
    });
  });

  test('otherwise the reason says what to boot with', () => {
    const reason = (change: object): string => JSON.stringify(findHidden({ ...question, ...change }));
    expect(reason({ commandLine: 'quiet' })).toMatch(/mem=SIZE.*kvm.allow_unsafe_mappings=1.*iomem=relaxed/);
    expect(reason({ iomem: '00000000-00000000 : System RAM' })).toContain('CAP_SYS_ADMIN');
    expect(reason({ memoryBytes: 0x2400_0000 })).toContain('less than 128 MiB');
  });
});
