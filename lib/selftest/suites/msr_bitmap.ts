// SPDX-License-Identifier: Apache-2.0
// The MSR bitmap (SDM vol. 3, 25.6.9): what exits, and what becomes of it when the page beneath it changes.
import { Batch } from '../../guest/index.ts';
import type { Selftest } from '../engine/model.ts';
import { swapSpace, twoNodes } from './guest_page.ts';
import {
  type Access,
  HIGH,
  LOW,
  type Round,
  type RoundsTest,
  reads,
  roundsTest,
  type Stage,
  writes,
} from './msr_accesses.ts';
import { msrBitmapMore } from './msr_bitmap_more.ts';

const SYSENTER_ESP = 0x175;
const SYSENTER_EIP = 0x176;
const STAR = 0xc000_0081;
const KERNEL_GS_BASE = 0xc000_0102;

/** KVM reads L1's bitmap at each exit of these to L0. */
const L0_TRAPS = [...reads(SYSENTER_ESP, STAR), ...writes(0n, SYSENTER_EIP, STAR)];
/** While L1 intercepts none of these, KVM lets the CPU do them; it merges the bitmaps at VM entry. */
const PASSED_THROUGH = [...reads(KERNEL_GS_BASE), ...writes(0n, KERNEL_GS_BASE)];
/** Those without an exit first: every exit to L1 leads to an entry that merges again. */
const ALL = [...PASSED_THROUGH, ...L0_TRAPS];

const round = (
  at: Round['at'],
  exits: readonly Access[],
  act?: Round['act'],
  accesses: readonly Access[] = ALL,
): Round => ({ at, accesses, exits, ...(act ? { act } : {}) });

const set = (accesses: readonly Access[]) => (stage: Stage) => stage.intercept(accesses);

/** Every other MSR, then the others, then none; what is not intercepted works, and L2 reads back all it wrote. */
function rangeTest(range: 'low' | 'high', access: 'read' | 'write'): RoundsTest {
  const msrs = Object.keys(range === 'low' ? LOW : HIGH).map(Number);
  const even = msrs.filter((_, i) => i % 2 === 0);
  const odd = msrs.filter((_, i) => i % 2 === 1);
  const make = access === 'read' ? reads : (...list: number[]) => writes(0x1000n, ...list);
  // The other direction of the same MSRs must go through
  const other = access === 'read' ? writes(0x2000n, ...msrs) : reads(...msrs);
  const accesses = [...make(...msrs), ...other];
  return {
    id: `msr-bitmap/${range}/${access}`,
    title: `${access === 'read' ? 'RDMSR' : 'WRMSR'} of MSRs in the ${range} range exits exactly if its bit is set`,
    rounds: [
      round('entry', make(...even), set(make(...even)), accesses),
      round('entry', make(...odd), set(make(...odd)), accesses),
      round('entry', [], set([]), [...accesses, ...reads(...msrs)]),
    ],
  };
}

const EDGES = [0, 0x1fff, 0xc000_0000, 0xc000_1fff];
const OUTSIDE = [0x2000, 0x4000_0000, 0xbfff_ffff, 0xc000_2000, 0xffff_ffff];
const both = (...msrs: number[]): Access[] => [...reads(...msrs), ...writes(0n, ...msrs)];

const TESTS: readonly RoundsTest[] = [
  rangeTest('low', 'read'),
  rangeTest('low', 'write'),
  rangeTest('high', 'read'),
  rangeTest('high', 'write'),
  {
    id: 'msr-bitmap/edges',
    title: 'the first and last MSR of each range obey their bits; MSRs outside exit whatever the bits say',
    rounds: [
      round('entry', both(...EDGES), set(both(...EDGES)), both(...EDGES)),
      round('entry', both(...OUTSIDE), set([]), both(...OUTSIDE)),
    ],
  },
  {
    id: 'msr-bitmap/flip',
    title: 'bits that the host and another vCPU of L1 change between entries and while L2 is active',
    vcpus: 2,
    rounds: [
      round('entry', []),
      // An MSR that L2 has without an exit stays so until the next entry
      round('active', L0_TRAPS, set(ALL)),
      round('entry', ALL),
      round('active', PASSED_THROUGH, set(PASSED_THROUGH)),
      round('active', [], set([])),
      round('entry', []),
      round('active', reads(SYSENTER_ESP), ({ l1, page }) =>
        l1.cpu(1).executeAll(new Batch().write(page.gpa + (SYSENTER_ESP >> 3), 1, 1 << (SYSENTER_ESP & 7))),
      ),
    ],
  },
  {
    id: 'msr-bitmap/madvise',
    title: 'the bitmap is discarded, which leaves no bit, and filled again',
    rounds: [
      round('entry', ALL, set(ALL)),
      round('entry', [], ({ page }) => page.discard()),
      round('entry', ALL, set(ALL)),
      round('active', [], ({ page }) => page.discard()),
      round('active', L0_TRAPS, set(ALL), L0_TRAPS),
      round('entry', ALL),
    ],
  },
  {
    id: 'msr-bitmap/memslot-move',
    title: 'the bitmap moves away, where L1 cannot say no: every access exits; and back',
    rounds: [
      round('entry', []),
      round('entry', ALL, ({ page }) => page.moveAway()),
      round('active', L0_TRAPS, undefined, L0_TRAPS),
      round('entry', [], ({ page }) => page.moveBack()),
      round('active', L0_TRAPS, ({ page }) => page.moveAway(), L0_TRAPS),
      round('active', [], ({ page }) => page.moveBack()),
      round('entry', []),
    ],
  },
  {
    id: 'msr-bitmap/swap',
    title: 'other memory with other bits comes beneath the same guest address',
    rounds: [
      round('entry', reads(STAR), set(reads(STAR))),
      round('entry', L0_TRAPS, (stage) => {
        stage.page.swap();
        stage.intercept(L0_TRAPS);
      }),
      round('entry', ALL, set(ALL)),
      round('active', reads(SYSENTER_ESP), (stage) => {
        stage.page.swap();
        stage.intercept(reads(SYSENTER_ESP));
      }),
      round('entry', reads(SYSENTER_ESP), ({ page }) => page.swap(true)),
      round('active', [], ({ page }) => page.swap(), L0_TRAPS),
    ],
  },
  {
    id: 'msr-bitmap/delete',
    title: 'the memslot of the bitmap is deleted and comes back with and without bits',
    rounds: [
      round('entry', []),
      round('entry', ALL, ({ page }) => page.delete()),
      round('entry', [], ({ page }) => page.add()),
      round('active', L0_TRAPS, ({ page }) => page.delete(), L0_TRAPS),
      round(
        'active',
        reads(STAR),
        (stage) => {
          stage.page.add();
          stage.intercept(reads(STAR));
        },
        L0_TRAPS,
      ),
      round('entry', reads(STAR)),
    ],
  },
  {
    id: 'msr-bitmap/unbacked',
    title: 'a bitmap where no memory is: L2 is entered, and every access exits; until there is memory',
    rounds: [
      round('entry', ALL, ({ page }) => page.delete()),
      round('active', [], ({ page }) => page.add()),
      round('entry', []),
    ],
  },
  {
    id: 'msr-bitmap/migrate',
    title: 'the bitmap migrates to another NUMA node between entries and while L2 is active',
    requires: [twoNodes],
    rounds: [
      round('entry', reads(STAR), set(reads(STAR))),
      round('entry', reads(STAR), ({ page }) => mustMigrate(page.migrate())),
      round('active', reads(STAR), ({ page }) => mustMigrate(page.migrate())),
      round('active', [], set([])),
      round('entry', []),
    ],
  },
  {
    id: 'msr-bitmap/pageout',
    title: 'the bitmap is paged out between entries and while L2 is active',
    requires: [swapSpace],
    rounds: [
      round('entry', reads(STAR), set(reads(STAR))),
      round('entry', reads(STAR), mustPageOut),
      round('active', reads(STAR), mustPageOut),
      round('active', [], set([])),
      round('entry', []),
    ],
  },
];

function mustPageOut({ page }: Stage): void {
  page.pageout();
  if (page.pageouts.at(-1) !== 'out') throw new Error('the page stayed in memory');
}

function mustMigrate(moved: boolean): void {
  if (!moved) throw new Error('the page did not move to the other node');
}

export const msrBitmap: readonly Selftest[] = [...TESTS.map(roundsTest), ...msrBitmapMore];
