// SPDX-License-Identifier: Apache-2.0
import { beforeAll, describe, expect, test } from 'vitest';
import { type BenchReport, runBench, selectFigures } from '../../lib/bench/index.ts';
import { describeLab } from '../../lib/lab/index.ts';

const lab = describeLab();

/** One quick set in two machines at once: what is exact there is asserted, times only against each other. */
describe.skipIf(!lab.possible)('nvmx bench in the lab', () => {
  let report: BenchReport;
  const figure = (id: string) => report.figures.find((one) => one.id === id)!;

  beforeAll(async () => {
    const patterns = [
      'exit',
      'round-trip/*/none',
      'round-trip/*/vapic',
      'round-trip/anonymous/evmcs',
      'switch/anonymous/vmcs=2',
      'memremap',
      'nested-state',
      'invalidate/*/anonymous/vmcs=1',
      'memslot/*/*/anonymous/slots=32',
    ];
    report = await runBench({
      machine: 'lab',
      ids: selectFigures(patterns).map(({ id }) => id),
      quick: true,
      unmanaged: true,
      lab: {},
    });
  });

  test('two machines measure the same in every number', () => {
    expect(report.secondRun).toEqual({ differing: [] });
  });

  test('nothing failed; what is not there has its reason', () => {
    expect(report.missing.filter(({ reason }) => reason.startsWith('failed'))).toEqual([]);
    expect(report.missing.every(({ id }) => /hugetlb|guest-memfd/.test(id))).toBe(true);
    expect(report.environment).toMatchObject({ kind: 'lab', cpusOnline: 1 });
    expect(report.environment.unmanaged).toMatchObject({ address: 0x2000_0000 });
  });

  test('every round trip was counted', () => {
    const { count, counts, histogram } = figure('round-trip/anonymous/vapic');
    expect(count).toBe(300);
    expect(counts['vmcallExits']).toBe(300);
    expect(histogram.reduce((sum, [, samples]) => sum + samples, 0)).toBe(300);
    expect(figure('round-trip/anonymous/evmcs').counts['vmcallExits']).toBe(300);
  });

  test('stock KVM maps three unmanaged pages at every entry, and no managed one', ({ skip }) => {
    if (report.environment.fingerprint.kind !== 'stock') skip('this kernel is patched');
    expect(figure('memremap/unmanaged/memremap').p50).toBe(3);
    expect(figure('memremap/unmanaged/memunmap').p50).toBe(3);
    expect(figure('memremap/anonymous/memremap').p50).toBe(0);
    // Emulated time is the number of instructions: more work is more time, always.
    expect(figure('ratio/round-trip/vapic').p50).toBeGreaterThan(1.5);
    expect(figure('ratio/round-trip/none').p50).toBeLessThan(1.1);
  });

  test("a round trip through L1 takes several of L0's own exits", () => {
    expect(figure('round-trip/anonymous/none').min).toBeGreaterThan(4 * figure('exit/l2-rdmsr').min);
  });
});

test('a machine to measure in', ({ skip }) => {
  if (!lab.possible) skip(lab.why);
});
