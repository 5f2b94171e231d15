// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { ContextTable, countersOf, turnsOf } from '../../lib/selftest/suites/context_table.ts';

const M = 8;
const range = (from: number, to: number) => Array.from({ length: to - from + 1 }, (_, i) => from + i);

describe('the counters of the nested context table', () => {
  // Seen on a patched 7.3.4: s = 4, c = 2 … 16, one L1 vCPU.
  test.each([
    ['sched', 2, 6, 0],
    ['sched', 8, 24, 0],
    ['sched', 9, 24, 0],
    ['sched', 16, 24, 0],
    ['migrate', 2, 6, 0],
    ['migrate', 8, 24, 0],
    ['migrate', 9, 0, 28],
    ['migrate', 16, 0, 56],
    ['evmcs', 8, 24, 0],
    ['evmcs', 9, 0, 28],
    ['evmcs', 16, 0, 56],
  ] as const)('%s, c = %i: reuse %i, recycle %i', (mode, c, reuse, recycle) => {
    expect(countersOf(mode, c, 4, 1, M)).toEqual({ reuse, recycle });
  });

  test('a lone VMCS stays current, unless it is cleared', () => {
    expect(countersOf('sched', 1, 64, 1, M)).toEqual({ reuse: 0, recycle: 0 });
    expect(countersOf('evmcs', 1, 64, 1, M)).toEqual({ reuse: 0, recycle: 0 });
    expect(countersOf('migrate', 1, 64, 1, M)).toEqual({ reuse: 63, recycle: 0 });
  });

  test('the formulas for every c, s and number of vCPUs', () => {
    for (const c of range(2, 24)) {
      for (const s of [1, 2, 3, 4, 17, 64]) {
        expect(countersOf('sched', c, s, 1, M)).toEqual({ reuse: Math.min(c, M) * (s - 1), recycle: 0 });
        const cycling = c <= M ? { reuse: c * (s - 1), recycle: 0 } : { reuse: 0, recycle: c * s - M };
        expect(countersOf('migrate', c, s, 1, M)).toEqual(cycling);
        expect(countersOf('evmcs', c, s, 1, M)).toEqual(cycling);
        for (const v of [2, 4]) {
          const fits = c <= M * v;
          expect(countersOf('migrate-vcpus', c, s, v, M)).toEqual(
            fits ? { reuse: c * (s - 1), recycle: 0 } : { reuse: 0, recycle: c * s - M * v },
          );
          // a vCPU with one VMCS never loads it again
          const alone = range(0, v - 1).filter((vcpu) => Math.ceil((c - vcpu) / v) === 1).length;
          expect(countersOf('sched-vcpus', c, s, v, M)).toEqual({
            reuse: (Math.min(c, M * v) - alone) * (s - 1),
            recycle: 0,
          });
        }
      }
    }
  });

  test('VMXOFF leaves all but the current one loaded', () => {
    const table = new ContextTable(M);
    for (const vmcs of range(0, 7)) table.load(0, vmcs);
    table.off(0);
    for (const vmcs of range(100, 107)) table.load(0, vmcs);
    // one context was free; the others were nowhere to be had
    expect(table.counters).toEqual({ reuse: 0, recycle: 1 });
  });

  test('each VMCS has s turns, and migrates to the next vCPU each round', () => {
    const [turns] = turnsOf('migrate-vcpus', 3, 4, 2);
    expect(turns?.filter(({ vmcs }) => vmcs === 2).map(({ vcpu }) => vcpu)).toEqual([0, 1, 0, 1]);
    expect(turnsOf('sched-vcpus', 5, 2, 4).map((list) => list.map(({ vmcs }) => vmcs))).toEqual([
      [0, 4, 0, 4],
      [1, 1],
      [2, 2],
      [3, 3],
    ]);
  });
});
