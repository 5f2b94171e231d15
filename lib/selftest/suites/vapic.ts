// SPDX-License-Identifier: Apache-2.0
// The virtual-APIC page (SDM vol. 3, 30.1): CR8 through it, and what becomes of that when the page changes.
import type { ControlName } from '../../guest/index.ts';
import type { Observed, Selftest } from '../engine/model.ts';
import { PAGE_GPA, pagedOut, twoNodes } from './guest_page.ts';
import {
  type PageRound,
  type PageTest,
  pageTest,
  pageTestsOf,
  type Stage,
  switchBit,
} from './page_rounds.ts';
import { vapicMore } from './vapic_more.ts';

const SHADOW = 'primary.use-tpr-shadow';
const X2APIC_TPR = 0x808;
const VTPR = 0x80;
const APIC_GPA = PAGE_GPA + 0x10_0000;

/** Round n reads CR8 and writes n + 1 to it. `page` is VTPR afterwards, null without memory. */
interface Row {
  readonly at: PageRound['at'];
  readonly reads: number;
  readonly page: Observed;
  readonly patched?: { readonly reads: number; readonly page: Observed };
  readonly act?: (stage: Stage) => unknown;
}

function tpr({ at, reads, page, patched, act }: Row, index: number): PageRound {
  return {
    at,
    ...(act ? { act } : {}),
    run: (p) => p.readCr8().writeCr8(index + 1),
    exits: [],
    values: patched ? { stock: [reads], patched: [patched.reads] } : [reads],
    page: patched ? { stock: page, patched: patched.page } : page,
  };
}

/** The CPU refuses a virtual-APIC address that leads nowhere. */
const refused = (instruction: 'VMLAUNCH' | 'VMRESUME', act: Row['act']): PageRound => ({
  at: 'entry',
  ...(act ? { act } : {}),
  exits: [`${instruction} VMfailValid 7`],
});

const rows = (...list: readonly (Row | PageRound)[]): PageRound[] =>
  list.map((row, index) => ('reads' in row ? tpr(row, index) : row));

const look = ({ page }: Stage): Observed => (page.isBacked ? page.view.getUint8(VTPR) : null);

const test = pageTestsOf('vapic', {
  needs: [SHADOW],
  options: ({ page }) => ({ virtualApic: page.gpa }),
  look,
});

const primary = (control: bigint, on: boolean) => switchBit('CPU_BASED_VM_EXEC_CONTROL', control)(on);
const TPR_SHADOW = 1n << 21n;
const CR8_EXITING = 3n << 19n;
const EXITING: readonly ControlName[] = ['primary.cr8-load-exiting', 'primary.cr8-store-exiting'];

/** mov eax, 0x11; mov rax, cr8; ret */
const FROM_CR8 = [0xb8, 0x11, 0, 0, 0, 0x44, 0x0f, 0x20, 0xc0, 0xc3];
/** mov cr8, rdi; mov eax, 0x22; ret */
const TO_CR8 = [0x44, 0x0f, 0x22, 0xc7, 0xb8, 0x22, 0, 0, 0, 0xc3];
const cr8ByCode: PageRound['run'] = (p, place) => p.call(place(...FROM_CR8)).call(place(...TO_CR8), 6);

const TESTS: readonly PageTest[] = [
  test(
    'madvise',
    'the page is discarded: CR8 is that of the new page at once (stock KVM: from the next entry on)',
    rows(
      { at: 'entry', reads: 0, page: 0x10 },
      { at: 'entry', reads: 0, page: 0x20, act: ({ page }) => page.discard() },
      {
        at: 'active',
        reads: 2,
        page: 0,
        patched: { reads: 0, page: 0x30 },
        act: ({ page }) => page.discard(),
      },
      { at: 'active', reads: 3, page: 0, patched: { reads: 3, page: 0x40 } },
      { at: 'entry', reads: 0, page: 0x50, patched: { reads: 4, page: 0x50 } },
    ),
  ),
  test(
    'swap',
    'other memory comes beneath the page: CR8 is in it at once (stock KVM: from the next entry on)',
    rows(
      { at: 'entry', reads: 0, page: 0x10 },
      { at: 'entry', reads: 0, page: 0x20, act: ({ page }) => page.swap() },
      {
        at: 'active',
        reads: 2,
        page: 0,
        patched: { reads: 0, page: 0x30 },
        act: ({ page }) => page.swap(),
      },
      {
        at: 'entry',
        reads: 0,
        page: 0x40,
        patched: { reads: 3, page: 0x40 },
        act: ({ page }) => page.swap(true),
      },
    ),
  ),
  test(
    'memslot-move',
    'the page moves away and back beneath an active L2; while it is away L2 cannot be entered',
    rows(
      { at: 'entry', reads: 0, page: 0x10 },
      {
        at: 'active',
        reads: 1,
        page: 0x20,
        act: ({ page }) => {
          page.moveAway();
          page.moveBack();
        },
      },
      refused('VMRESUME', ({ page }) => page.moveAway()),
      { at: 'entry', reads: 2, page: 0x40, act: ({ page }) => page.moveBack() },
    ),
  ),
  test(
    'delete',
    'the memslot is deleted and comes back with other memory',
    rows(
      { at: 'entry', reads: 0, page: 0x10 },
      {
        at: 'active',
        reads: 1,
        page: 0,
        patched: { reads: 0, page: 0x20 },
        act: ({ page }) => {
          page.replace();
        },
      },
      { at: 'entry', reads: 0, page: 0x30, patched: { reads: 2, page: 0x30 } },
      refused('VMRESUME', ({ page }) => page.delete()),
      { at: 'entry', reads: 0, page: 0x50, act: ({ page }) => page.add() },
    ),
  ),
  test(
    'unbacked',
    'no page: VMfail; but with CR8 exiting both ways L2 is entered, and CR8 exits',
    [
      refused('VMLAUNCH', ({ page }) => page.delete()),
      {
        at: 'entry',
        act: primary(CR8_EXITING, true),
        run: cr8ByCode,
        exits: ['control-register-access q=0x18 len=4', 'control-register-access q=0x708 len=4'],
        values: [0x11, 0x22],
        page: null,
      },
      {
        at: 'entry',
        act: async (stage) => {
          stage.page.add();
          await primary(CR8_EXITING, false)(stage);
        },
        run: cr8ByCode,
        exits: [],
        values: [0, 0x22],
        page: 0x60,
      },
    ],
    { needs: [SHADOW, ...EXITING], before: primary(CR8_EXITING, false) },
  ),
  test(
    'toggle',
    "the TPR shadow is off while the page is discarded and deleted: CR8 is L1's; then on again",
    rows(
      { at: 'entry', reads: 0, page: 0x10 },
      {
        at: 'entry',
        reads: 3,
        page: 0,
        act: async (stage) => {
          await primary(TPR_SHADOW, false)(stage);
          stage.page.discard();
        },
      },
      { at: 'active', reads: 2, page: 0, act: ({ page }) => page.discard() },
      { at: 'entry', reads: 0, page: 0x40, act: primary(TPR_SHADOW, true) },
      { at: 'entry', reads: 3, page: 0x40, act: primary(TPR_SHADOW, false) },
      { at: 'active', reads: 5, page: null, act: ({ page }) => page.delete() },
      {
        at: 'entry',
        reads: 0,
        page: 0x70,
        act: async (stage) => {
          stage.page.add();
          await primary(TPR_SHADOW, true)(stage);
        },
      },
    ),
    {
      before: async ({ l1 }) => {
        await l1.cpu(0).x2apicEnable();
        await l1.cpu(0).wrmsr(X2APIC_TPR, 0x30n);
      },
    },
  ),
  test(
    'apic-access',
    'the TPR register of the APIC-access page is VTPR; other registers exit; both pages may be discarded',
    [0, 1].map((round) => ({
      at: 'entry',
      act: ({ page, vm }: Stage) => {
        page.discard();
        vm.memory.regionAt(APIC_GPA)?.discard();
      },
      run: (p) =>
        p
          .read32(APIC_GPA + VTPR)
          .write32(APIC_GPA + VTPR, 0x30 + round)
          .read32(APIC_GPA + VTPR)
          .write32(APIC_GPA + 0xd0, 1)
          .readCr8(),
      exits: ['apic-access q=0x10d0'],
      values: [0, 0x30 + round, 3],
      page: 0x30 + round,
    })),
    {
      needs: [SHADOW, 'secondary.virtualize-apic-accesses'],
      options: ({ l1, page }) => {
        l1.vm.memory.add({ gpa: APIC_GPA, size: 4096 });
        return { virtualApic: page.gpa, apicAccess: APIC_GPA };
      },
    },
  ),
  test(
    'written-by-host',
    'what the host and another vCPU of L1 write to VTPR is what L2 reads next, while it is active',
    rows(
      { at: 'entry', reads: 0, page: 0x10 },
      { at: 'active', reads: 7, page: 0x20, act: ({ page }) => page.view.setUint8(VTPR, 0x70) },
      {
        at: 'active',
        reads: 9,
        page: 0x30,
        act: ({ l1, page }) => l1.cpu(1).write(page.gpa + VTPR, 1, 0x90),
      },
    ),
    { vcpus: 2 },
  ),
  test(
    'migrate',
    'the page migrates to another NUMA node (stock KVM pins it while L2 is active)',
    [
      { ...tpr({ at: 'entry', reads: 0, page: null }, 0), page: 'never' },
      { ...tpr({ at: 'entry', reads: 1, page: null, act: ({ page }) => page.migrate() }, 1), page: 'moved' },
      {
        ...tpr({ at: 'active', reads: 2, page: null, act: ({ page }) => page.migrate() }, 2),
        page: { stock: 'stayed', patched: 'moved' },
      },
    ],
    { requires: [twoNodes], look: ({ page }) => page.migrations.at(-1) ?? 'never' },
  ),
  test(
    'pageout',
    'the page is paged out: CR8 stays',
    rows(
      { at: 'entry', reads: 0, page: 0x10 },
      { at: 'entry', reads: 1, page: 0x20, act: ({ page }) => page.pageout() },
      { at: 'active', reads: 2, page: 0x30, act: ({ page }) => page.pageout() },
      { at: 'entry', reads: 3, page: 0x40 },
    ),
    pagedOut,
  ),
];

export const vapic: readonly Selftest[] = [...TESTS.map(pageTest), ...vapicMore];
