// SPDX-License-Identifier: Apache-2.0
// Posted interrupts (SDM vol. 3, 30.6), and what becomes of them when the descriptor's page changes.
import type { Observed, Selftest } from '../engine/model.ts';
import { hex } from './common.ts';
import { migrated, pagedOut } from './guest_page.ts';
import {
  type PageRound,
  type PageTest,
  pageTest,
  pageTestsOf,
  type Stage,
  switchBit,
} from './page_rounds.ts';
import { NOTIFICATION, OPTIONS, POSTED_CONTROLS, post, VECTOR } from './posted.ts';
import { postedInterruptMore } from './posted_interrupt_more.ts';

/** Interrupts L2 has taken so far, vectors in the PIR, ON; or no page. */
type Seen = readonly [number, readonly number[], boolean] | null;

interface Row {
  readonly at: PageRound['at'];
  readonly seen: Seen;
  readonly patched?: Seen;
  readonly exits?: readonly string[];
  readonly act?: (stage: Stage) => unknown;
}

/**
 * Reads the IDT and the first page of handlers: a changed memslot costs L2 all its mappings, and delivery must meet no
 * EPT violation (see guests/l2/main.c). So every post has a round of its own.
 */
const WARM = [
  ...[0x48, 0x83, 0xec, 0x10, 0x0f, 0x01, 0x0c, 0x24], // sub rsp, 16; sidt [rsp]
  ...[0x48, 0x8b, 0x44, 0x24, 0x02], // mov rax, [rsp+2]
  ...[0x8a, 0x08, 0x8a, 0x88, 0xff, 0x0f, 0, 0], // mov cl, [rax]; mov cl, [rax+4095]
  ...[0x8a, 0x0c, 0x25, 0, 0, 0x20, 0], // mov cl, [L2_BASE]
  ...[0xb8, 7, 0, 0, 0, 0x48, 0x83, 0xc4, 0x10, 0xc3], // mov eax, 7; add rsp, 16; ret
];

function row({ at, seen, patched, exits = [], act }: Row): PageRound {
  return {
    at,
    ...(act ? { act } : {}),
    run: (p, place) => p.call(place(...WARM)),
    exits,
    values: [7],
    page: patched === undefined ? seen : { stock: seen, patched },
  };
}

const rows = (...list: readonly (Row | PageRound)[]): PageRound[] =>
  list.map((one) => ('seen' in one ? row(one) : one));

const none = (taken: number): Seen => [taken, [], false];
/** Posted, and nobody has looked. */
const waiting = (taken: number): Seen => [taken, [VECTOR], true];

const look = ({ l2, page }: Stage): Observed => {
  const descriptor = l2.postedInterrupts;
  return page.isBacked && descriptor
    ? [l2.interruptCount(VECTOR), descriptor.pending, descriptor.outstanding]
    : null;
};

/** Does several things in order. */
const all =
  (...acts: readonly ((stage: Stage) => unknown)[]) =>
  async (stage: Stage): Promise<void> => {
    for (const act of acts) await act(stage);
  };

const notify = ({ l1 }: Stage) => l1.signal(NOTIFICATION);
const discard = ({ page }: Stage) => page.discard();
const swap = ({ page }: Stage) => page.swap();
const remove = ({ page }: Stage) => page.delete();
const add = ({ page }: Stage) => page.add();

/** The notification vector while the control is off; 6.1 takes that of the last entry with it for its own. */
const OTHER = 0x52;
const vector =
  (value: number) =>
  ({ l2 }: Stage) =>
    l2.vmwrite('POSTED_INTR_NV', value);
const isOn = switchBit('PIN_BASED_VM_EXEC_CONTROL', 0x80n);

const test = pageTestsOf('posted-interrupt', {
  needs: POSTED_CONTROLS,
  options: ({ page }) => ({
    ...OPTIONS,
    postedInterrupts: { vector: NOTIFICATION, descriptor: page.gpa },
  }),
  look,
});

/** The descriptor is another one from here on: stock KVM goes on with the old one until the next entry. */
const replaced = (change: (stage: Stage) => unknown) =>
  rows(
    { at: 'entry', seen: none(0) },
    { at: 'active', seen: none(1), act: post },
    { at: 'entry', seen: none(1), act: change },
    { at: 'active', seen: none(2), act: post },
    { at: 'active', seen: none(2), act: change },
    { at: 'active', seen: waiting(2), patched: none(3), act: post },
    { at: 'active', seen: waiting(2), patched: none(3), act: notify },
    { at: 'entry', seen: waiting(2), patched: none(3) },
    { at: 'active', seen: none(3), act: notify },
  );

const VTPR = 0x80;

/**
 * The vAPIC page changes, the descriptor stays. Each round also writes its own value to CR8, which lands in VTPR of the
 * page that the CPU uses; `old`: stock KVM still has it use the old one.
 */
const vapicRows = (...list: readonly (Row & { readonly old?: boolean })[]): PageRound[] => list.map(vapicRow);

function vapicRow({ old = false, ...one }: Row & { readonly old?: boolean }, index: number): PageRound {
  const cr8 = 1 + (index % 4);
  const seen = (vtpr: number): Observed => [...(one.seen ?? []), vtpr];
  const base = row(one);
  return {
    ...base,
    run: (p, place) => base.run?.(p.writeCr8(cr8), place),
    page: old ? { stock: seen(0), patched: seen(cr8 << 4) } : seen(cr8 << 4),
  };
}

const vapicOf: Partial<PageTest> = {
  options: ({ page }) => ({
    ...OPTIONS,
    virtualApic: page.gpa,
    postedInterrupts: { vector: NOTIFICATION },
  }),
  look: (stage) => {
    const seen = look(stage);
    return Array.isArray(seen) ? [...seen, stage.page.view.getUint8(VTPR)] : null;
  },
};

const TESTS: readonly PageTest[] = [
  test(
    'madvise',
    'the descriptor is discarded: what is posted in the new page is delivered (stock KVM: from the next entry on)',
    replaced(discard),
  ),
  test(
    'swap',
    'other memory comes beneath the descriptor: what is posted there is delivered (stock KVM: from the next entry on)',
    replaced(swap),
  ),
  test(
    'delete',
    'the memslot is deleted and comes back; without it L2 runs until a notification needs it',
    rows(
      { at: 'entry', seen: none(0) },
      { at: 'active', seen: none(0), act: ({ page }) => page.replace() },
      { at: 'active', seen: waiting(0), patched: none(1), act: post },
      { at: 'entry', seen: null, act: remove },
      { at: 'active', act: notify, exits: ['internal-error 1'] },
      { at: 'active', seen: none(0), patched: none(1), act: add },
      { at: 'entry', seen: none(0), patched: none(1) },
      { at: 'active', seen: none(1), patched: none(2), act: post },
    ),
  ),
  test(
    'memslot-move',
    'the descriptor moves away and back; while it is away L2 runs until a notification needs it',
    rows(
      { at: 'entry', seen: none(0) },
      {
        at: 'active',
        seen: none(0),
        act: all(
          ({ page }) => page.moveAway(),
          ({ page }) => page.moveBack(),
        ),
      },
      { at: 'active', seen: none(1), act: post },
      { at: 'entry', seen: null, act: ({ page }) => page.moveAway() },
      { at: 'active', act: notify, exits: ['internal-error 1'] },
      { at: 'active', seen: none(1), act: ({ page }) => page.moveBack() },
      { at: 'entry', seen: none(1) },
      { at: 'active', seen: none(2), act: post },
    ),
    {
      look: (stage) => (stage.page.region.gpa === stage.page.gpa ? look(stage) : null),
    },
  ),
  test(
    'unbacked',
    'the descriptor was never there: L2 runs until a notification needs it',
    rows(
      { at: 'entry', seen: null, act: remove },
      { at: 'active', act: notify, exits: ['internal-error 1'] },
      { at: 'active', seen: none(0), act: add },
      { at: 'entry', seen: none(0) },
      { at: 'active', seen: none(1), act: post },
    ),
  ),
  test(
    'toggle',
    'control off, page discarded: the notification exits and the descriptor stays; then on again with another page',
    rows(
      { at: 'entry', seen: none(0) },
      { at: 'active', seen: none(1), act: post },
      { at: 'entry', seen: none(1), act: all(isOn(false), vector(OTHER), discard) },
      {
        at: 'active',
        seen: waiting(1),
        act: all(
          discard,
          ({ l2 }) => l2.postedInterrupts?.post(VECTOR),
          ({ l1 }) => l1.signal(OTHER),
        ),
        exits: [`external-interrupt info=${hex(0x8000_0000 + OTHER)}`],
      },
      {
        at: 'entry',
        seen: none(1),
        act: all(({ l1 }) => l1.cpu(0).eoi(), swap, vector(NOTIFICATION), isOn(true)),
      },
      { at: 'active', seen: none(2), act: post },
    ),
    { before: ({ l1 }) => l1.cpu(0).x2apicEnable() },
  ),
  ...(
    [
      ['madvise', discard],
      ['swap', swap],
    ] as const
  ).map(([name, change]) =>
    test(
      `vapic/${name}`,
      'the virtual-APIC page changes: CR8 goes to the new one, and the posted interrupt is delivered all the same',
      vapicRows(
        { at: 'entry', seen: none(0) },
        { at: 'active', seen: none(0), act: change, old: true },
        { at: 'active', seen: none(1), act: post, old: true },
        { at: 'entry', seen: none(1), act: change },
        { at: 'active', seen: none(2), act: post },
        { at: 'active', seen: none(2), act: change, old: true },
        { at: 'active', seen: none(3), act: post, old: true },
      ),
      vapicOf,
    ),
  ),
  test(
    'migrate',
    'the descriptor migrates to another NUMA node',
    rows(
      { at: 'entry', seen: none(0) },
      { at: 'entry', seen: none(0), act: ({ page }) => page.migrate() },
      { at: 'active', seen: none(1), act: all(({ page }) => page.migrate(), post) },
    ),
    migrated,
  ),
  test(
    'pageout',
    'the descriptor is paged out',
    rows(
      { at: 'entry', seen: none(0) },
      { at: 'entry', seen: none(0), act: ({ page }) => page.pageout() },
      { at: 'active', seen: none(1), act: all(({ page }) => page.pageout(), post) },
    ),
    pagedOut,
  ),
];

export const postedInterrupt: readonly Selftest[] = [...TESTS.map(pageTest), ...postedInterruptMore];
