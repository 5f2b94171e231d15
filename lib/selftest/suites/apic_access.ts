// SPDX-License-Identifier: Apache-2.0
// The APIC-access page (SDM vol. 3, 30.4): which accesses exit, and what becomes of that when the page changes.
import type { Selftest } from '../engine/model.ts';
import { apicAccessMore } from './apic_access_more.ts';
import { access, look, type Row, ZEROES } from './apic_accesses.ts';
import { pagedOut, twoNodes } from './guest_page.ts';
import { type PageRound, type PageTest, pageTest, pageTestsOf, switchBit } from './page_rounds.ts';

const CONTROL = 'secondary.virtualize-apic-accesses';
/** The entry fails: userspace must provide the page first. */
const refused = (act: Row['act']): PageRound => ({
  at: 'entry',
  ...(act ? { act } : {}),
  exits: ['internal-error 1'],
  page: false,
});

const accesses = (...rows: readonly (Row | PageRound)[]): PageRound[] =>
  rows.map((row, index) => ('how' in row ? access(row, index) : row));

const isOn = switchBit('SECONDARY_VM_EXEC_CONTROL', 1n);

const test = pageTestsOf('apic-access', {
  needs: [CONTROL],
  options: ({ page }) => ({ apicAccess: page.gpa }),
  look,
});

/** A patched kernel comes to userspace before L2 gets to its accesses. */
const withoutPage = (round: PageRound): PageRound => ({
  ...round,
  exits: { stock: round.exits as readonly string[], patched: ['internal-error 1'] },
  values: { stock: round.values as readonly number[], patched: [] },
});

const STALE = { how: ZEROES, patched: 'trap' } as const;

const TESTS: readonly PageTest[] = [
  test(
    'madvise',
    'the page is discarded: accesses trap at once (stock KVM: from the next entry on)',
    accesses(
      { at: 'entry', how: 'trap' },
      { at: 'entry', how: 'trap', act: ({ page }) => page.discard() },
      { at: 'active', ...STALE, act: ({ page }) => page.discard() },
      { at: 'active', ...STALE },
      { at: 'entry', how: 'trap' },
    ),
  ),
  test(
    'swap',
    'other memory comes beneath the page: accesses trap at once (stock KVM: from the next entry on)',
    accesses(
      { at: 'entry', how: 'trap' },
      { at: 'entry', how: 'trap', act: ({ page }) => page.swap() },
      { at: 'active', ...STALE, act: ({ page }) => page.swap() },
      { at: 'entry', how: 'trap', act: ({ page }) => page.swap(true) },
    ),
  ),
  test(
    'memslot-move',
    'the page moves away: accesses come to userspace, and an entry needs userspace to bring it back',
    accesses(
      { at: 'entry', how: 'trap' },
      { at: 'active', how: 'mmio', act: ({ page }) => page.moveAway() },
      { at: 'active', how: 'trap', act: ({ page }) => page.moveBack() },
      refused(({ page }) => page.moveAway()),
      { at: 'active', how: 'trap', act: ({ page }) => page.moveBack() },
    ),
  ),
  test(
    'delete',
    'the memslot is deleted, and comes back with other memory: accesses trap (stock KVM: from the next entry on)',
    [
      ...accesses(
        { at: 'entry', how: 'trap' },
        { at: 'active', ...STALE, act: ({ page }) => page.replace() },
        { at: 'entry', how: 'trap' },
        refused(({ page }) => page.delete()),
        { at: 'active', how: 'trap', act: ({ page }) => page.add() },
      ),
      // Its memory goes too, which a patched kernel hears of: there is no page to trap accesses to.
      withoutPage(access({ at: 'active', how: 'mmio', act: ({ page }) => page.delete() }, 5)),
    ],
  ),
  test(
    'unbacked',
    'the page was never there: the entry comes to userspace, and goes on when it has made the page',
    accesses(
      refused(({ page }) => page.delete()),
      { at: 'active', how: 'trap', act: ({ page }) => page.add() },
      { at: 'entry', how: 'trap' },
    ),
  ),
  test(
    'toggle',
    'the control is off while the page is discarded, swapped and deleted: accesses are plain; then on again',
    accesses(
      { at: 'entry', how: 'trap' },
      {
        at: 'entry',
        how: ZEROES,
        act: async (stage) => {
          await isOn(false)(stage);
          stage.page.discard();
        },
      },
      { at: 'active', how: ZEROES, act: ({ page }) => page.discard() },
      { at: 'entry', how: 'trap', act: isOn(true) },
      { at: 'entry', how: ZEROES, act: isOn(false) },
      { at: 'active', how: ZEROES, act: ({ page }) => page.swap() },
      { at: 'entry', how: 'trap', act: isOn(true) },
      { at: 'entry', how: ZEROES, act: isOn(false) },
      { at: 'active', how: 'mmio', act: ({ page }) => page.delete() },
      {
        at: 'entry',
        how: 'trap',
        act: async (stage) => {
          stage.page.add();
          await isOn(true)(stage);
        },
      },
    ),
  ),
  test(
    'migrate',
    'the page migrates to another NUMA node: accesses trap (stock KVM pins it while L2 is active)',
    [
      { ...access({ at: 'entry', how: 'trap' }, 0), page: 'never' },
      { ...access({ at: 'entry', how: 'trap', act: ({ page }) => page.migrate() }, 1), page: 'moved' },
      {
        ...access({ at: 'active', how: 'trap', act: ({ page }) => page.migrate() }, 2),
        page: { stock: 'stayed', patched: 'moved' },
      },
    ],
    { requires: [twoNodes], look: ({ page }) => page.migrations.at(-1) ?? 'never' },
  ),
  test(
    'pageout',
    'the page is paged out: accesses trap',
    accesses(
      { at: 'entry', how: 'trap' },
      { at: 'entry', how: 'trap', act: ({ page }) => page.pageout() },
      { at: 'active', how: 'trap', act: ({ page }) => page.pageout() },
      { at: 'entry', how: 'trap' },
    ),
    pagedOut,
  ),
];

export const apicAccess: readonly Selftest[] = [...TESTS.map(pageTest), ...apicAccessMore];
