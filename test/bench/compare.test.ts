// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import type { BenchReport } from '../../lib/bench/index.ts';
import {
  type BenchComparison,
  CompareError,
  compareReports,
  parseResult,
  renderCompareHtml,
  renderCompareMarkdown,
  renderCompareTable,
  renderCompareText,
  slowerThan,
  type TestComparison,
} from '../../lib/report/index.ts';
import { logScale } from '../../lib/report/svg.ts';
import { figure, report, tests } from './fixtures.ts';

const base = report('6.1', [
  figure('round-trip/unmanaged/vapic', [34_000, 34_612, 50_000]),
  figure('round-trip/anonymous/vapic', [15_503, 15_503, 16_000]),
  figure('exit/l1-cpuid', [1000, 1000, 1000]),
  figure('invalidate/madvise/anonymous/vmcs=32', [6000, 6500, 7000]),
  figure('memslot/map/plain/anonymous/slots=32', [10], { parameters: { slots: 32, bytes: 1 } }),
  figure('gone', [1]),
]);
const head = report(
  '6.1-patched',
  [
    figure('round-trip/unmanaged/vapic', [15_000, 15_576, 16_000]),
    figure('round-trip/anonymous/vapic', [15_503, 15_504, 16_000]),
    figure('exit/l1-cpuid', [1000, 1000, 1000]),
    figure('invalidate/madvise/anonymous/vmcs=32', [9000, 9750, 9900]),
    figure('memslot/map/plain/anonymous/slots=32', [10], { parameters: { slots: 32, bytes: 2 } }),
  ],
  { missing: [{ id: 'gone', reason: 'no control | here' }] },
);
const compared = compareReports(base, head) as BenchComparison;

describe('two benchmarks', () => {
  test('every figure has a verdict', () => {
    expect(compared.figures.map(({ id, verdict, ratio }) => [id, verdict, ratio?.toFixed(3)])).toEqual([
      ['round-trip/unmanaged/vapic', 'faster', '0.450'],
      ['round-trip/anonymous/vapic', 'same', '1.000'],
      ['exit/l1-cpuid', 'same', '1.000'],
      ['invalidate/madvise/anonymous/vmcs=32', 'slower', '1.500'],
      ['memslot/map/plain/anonymous/slots=32', 'not comparable', undefined],
      ['gone', 'not comparable', undefined],
    ]);
    expect(compared.figures[4]?.reason).toBe('the parameters differ: bytes 1, 2');
    expect(compared.figures[5]?.reason).toBe('head has no such figure: no control | here');
  });

  test('a figure is too slow only beyond the limit', () => {
    expect(slowerThan(compared, 49).map(({ id }) => id)).toEqual(['invalidate/madvise/anonymous/vmcs=32']);
    expect(slowerThan(compared, 50)).toEqual([]);
  });

  test('an interval that reaches over 1 is no verdict', () => {
    const noisy = (p50: number, interval: readonly [number, number]) =>
      report('k', [{ ...figure('x', [p50]), interval }]);
    const verdict = (one: BenchReport, two: BenchReport) =>
      (compareReports(one, two) as BenchComparison).figures[0];
    expect(verdict(noisy(100, [90, 115]), noisy(110, [105, 120]))?.verdict).toBe('same');
    const clear = verdict(noisy(100, [98, 102]), noisy(110, [105, 120]));
    expect(clear?.verdict).toBe('slower');
    expect(clear?.interval?.map((end) => end.toFixed(3))).toEqual(['1.029', '1.224']);
    expect(verdict(noisy(100, [99, 101]), report('k', [figure('x', [50])]))?.verdict).toBe('faster');
  });

  test('without intervals the quickest sample must say the same as the median', () => {
    const verdict = (...samples: number[]) =>
      (
        compareReports(
          report('k', [figure('x', [100, 100, 100])]),
          report('l', [figure('x', samples)]),
        ) as BenchComparison
      ).figures[0]?.verdict;
    expect(verdict(100, 105, 105)).toBe('same');
    expect(verdict(104, 105, 105)).toBe('slower');
    expect(verdict(50, 105, 105)).toBe('same');
    expect(verdict(94, 95, 99)).toBe('faster');
  });

  test('cycles of two machines are not comparable, their ratios are', () => {
    const ratio = figure('ratio/round-trip/vapic', [2], { unit: 'ratio' });
    const one = report('k', [figure('a', [1]), ratio]);
    const other = { ...one, environment: { ...one.environment, cpu: 'another' } };
    expect((compareReports(one, other) as BenchComparison).figures.map(({ verdict }) => verdict)).toEqual([
      'not comparable',
      'same',
    ]);
  });

  test('what is gone entirely is faster, 0 times', () => {
    const calls = (samples: readonly number[]) =>
      report('k', [figure('memremap/unmanaged/memremap', samples, { unit: 'calls' })]);
    const gone = compareReports(calls([3]), calls([0])) as BenchComparison;
    expect(gone.figures[0]).toMatchObject({ verdict: 'faster', ratio: 0 });
    for (const render of [renderCompareTable, renderCompareText, renderCompareMarkdown]) {
      expect(render(gone)).toMatch(/ 0(\.000| ×)/);
      expect(render(gone)).not.toMatch(/Infinity|NaN/);
    }
    expect(renderCompareHtml(gone)).not.toMatch(/Infinity|NaN/);
  });

  test('a difference in module parameters is a warning', () => {
    const other = {
      ...head,
      environment: { ...head.environment, parameters: { 'kvm_intel.nested': 'Y', 'kvm_intel.ept': 'N' } },
    };
    expect(compareReports(base, other).warnings).toEqual(['kvm_intel.ept: base none, head N']);
  });

  test('the text is 72 columns wide', () => {
    const text = renderCompareText(compared);
    expect(text.split('\n').filter((line) => line.length > 72)).toEqual([]);
    expect(text).toMatchInlineSnapshot(`
      "base: Linux 6.1 (stock), lab, Example CPU <7>, emulator 1
      head: Linux 6.1-patched (stock), lab, Example CPU <7>, emulator 1

      p50                                        base        head   head/base
      round-trip/unmanaged/vapic               34 612      15 576     0.450 -
      round-trip/anonymous/vapic               15 503      15 504     1.000
      exit/l1-cpuid                             1 000       1 000     1.000
      invalidate/madvise/anonymous/vmcs=32      6 500       9 750     1.500 +

      1 faster, 1 slower, 2 same, 2 not comparable (- faster, + slower)
      not comparable: 1 (memslot/map/plain/anonymous/slots=32): the parameters
        differ: bytes 1, 2
      not comparable: 1 (gone): head has no such figure: no control | here
      "
    `);
  });

  test('the Markdown keeps its columns', () => {
    const markdown = renderCompareMarkdown(compared);
    const rows = markdown.split('\n').filter((line) => line.startsWith('|'));
    expect(rows.map((row) => row.replaceAll('\\|', '').split('|').length)).toEqual(rows.map(() => 9));
    expect(markdown).toContain(
      '| `round-trip/unmanaged/vapic` | cycles | 34 612 | 15 576 | 0.450 | exact | faster |',
    );
  });

  test('the terminal table names every figure', () => {
    const table = renderCompareTable(compared);
    for (const { id } of compared.figures) expect(table).toContain(id);
    expect(table).toContain('1 faster, 1 slower, 2 same, 2 not comparable');
  });

  test('the page stands alone: no script, nothing loaded, everything escaped', () => {
    const page = renderCompareHtml(compared);
    expect(page).not.toMatch(/<script|https?:|@import|url\(|src=|href=/);
    expect(page).toContain('Example CPU &#60;7&#62;');
    expect(page.match(/<rect class="faster"/g)).toHaveLength(1);
    expect(page.match(/<rect class="slower"/g)).toHaveLength(1);
  });
});

describe('two test runs', () => {
  test('are compared by verdict, then by evidence', () => {
    const one = tests([
      { id: 'a' },
      { id: 'b', verdict: 'fail', reason: 'x' },
      { id: 'c', evidence: { exits: 1, same: true } },
      { id: 'd', seed: 1, evidence: { exits: 1 } },
      { id: 'e', verdict: 'skip' },
      { id: 'gone' },
      { id: 'stays' },
    ]);
    const two = tests([
      { id: 'a', verdict: 'crash', reason: 'oops\nsecond line' },
      { id: 'b' },
      { id: 'c', evidence: { exits: 8, same: true } },
      { id: 'd', seed: 2, evidence: { exits: 5 } },
      { id: 'e' },
      { id: 'new' },
      { id: 'stays' },
    ]);
    const { changes, unchanged } = compareReports(one, two) as TestComparison;
    expect(changes.map(({ id, change, detail }) => [id, change, detail])).toEqual([
      ['a', 'newly failing', 'oops'],
      ['b', 'newly passing', undefined],
      ['e', 'newly passing', undefined],
      ['c', 'other evidence', 'exits 1 → 8'],
      ['new', 'new', undefined],
      ['gone', 'gone', undefined],
    ]);
    expect(unchanged).toBe(2);
    expect(renderCompareHtml(compareReports(one, two))).toContain('v-newly-failing');
    expect(renderCompareMarkdown(compareReports(one, two))).toContain(
      '| `a` | newly failing | pass | crash | oops |',
    );
  });
});

test('only results of one kind are compared', () => {
  expect(() => compareReports(base, tests([]))).toThrow(CompareError);
  expect(() => parseResult('a.json', '{"schema":"nvmx-bench/9"}')).toThrow(/nvmx-bench\/9/);
  expect(() => parseResult('a.json', 'null')).toThrow(CompareError);
  expect(() => parseResult('a.json', '{')).toThrow(/not JSON/);
  expect(parseResult('a.json', JSON.stringify(base))).toEqual(base);
});

test('an axis has ticks to read, however narrow its range', () => {
  expect(logScale(875, 976, 0, 1).ticks).toEqual([900, 950]);
  expect(logScale(13_248, 17_089, 0, 1).ticks).toEqual([14_000, 15_000, 16_000, 17_000]);
  expect(logScale(800, 6000, 0, 1).ticks).toEqual([1000, 2000, 5000]);
});
