// SPDX-License-Identifier: Apache-2.0
// Which parts of an enlightened VMCS the next entry reads again: the clean-field matrix.
import {
  EVMCS_CLEAN,
  type EvmcsGroup,
  type L2Options,
  type L2Program,
  type VmcsField,
} from '../../guest/index.ts';
import type { Observations, Selftest } from '../engine/model.ts';
import { type Bench, MARK, MARKED, type ScenarioCase, scenarioTest } from './scenario.ts';
import { trace } from './trace.ts';

const UD = 1 << 6;
const PAT = 0x277;
const PAT_ALL_WB = 0x0606_0606_0606_0606n;
const PAT_RESET = 0x0007_0406_0007_0406n;
const FS_BASE = 0xc000_0100;
const SYSENTER_ESP = 0x175;
const TRUSTS_MSR_BITMAP = 2n;

/** A field of each clean group, and how L2 or L1 notices that it was changed between two entries. */
interface GroupRow {
  readonly group: EvmcsGroup;
  readonly field: VmcsField;
  readonly options?: (bench: Bench) => L2Options;
  /** One round: the program is this, VMCALL, this again. */
  readonly round: (program: L2Program, bench: Bench) => unknown;
  readonly value: (bench: Bench, old: bigint) => bigint | number;
  readonly old: { exits: readonly string[]; values: readonly (bigint | number)[]; l1?: number };
  readonly changed: { exits: readonly string[]; values: readonly (bigint | number)[]; l1?: number };
  /** An MSR of L1 after the second round. */
  readonly msr?: number;
}

const GROUPS: readonly GroupRow[] = [
  {
    group: 'ioBitmap',
    field: 'IO_BITMAP_A',
    options: () => ({ ioBitmap: true }),
    round: (p) => p.out8(0x80, 1),
    value: (bench) => {
      bench.view('bitmap').setUint8(0x80 >> 3, 1);
      return bench.page('bitmap');
    },
    old: { exits: ['userspace out port=0x80 data=0x1'], values: [] },
    changed: { exits: ['io-instruction q=0x800000 len=1'], values: [] },
  },
  {
    group: 'msrBitmap',
    field: 'MSR_BITMAP',
    options: () => ({ msrBitmap: true }),
    round: (p) => p.wrmsr(SYSENTER_ESP, 0x1000),
    value: (bench) => {
      bench.l1.bytes(bench.page('bitmap'), 4096).fill(0xff);
      return bench.page('bitmap');
    },
    old: { exits: [], values: [] },
    changed: { exits: ['wrmsr len=2'], values: [] },
  },
  {
    group: 'controlGroup1',
    field: 'SECONDARY_VM_EXEC_CONTROL',
    round: (p, bench) => p.call(bench.code(0x0f, 0x09, ...MARK)),
    value: (_, old) => old | (1n << 6n), // WBINVD exiting
    old: { exits: [], values: MARKED },
    changed: { exits: ['wbinvd len=2'], values: MARKED },
  },
  {
    group: 'controlGroup2',
    field: 'TSC_OFFSET',
    options: () => ({ controls: ['primary.use-tsc-offsetting'], fields: { TSC_OFFSET: 0 } }),
    // rdtsc; mov eax, edx; shr eax, 12: what bits 63:44 of the TSC are
    round: (p, bench) => p.call(bench.code(0x0f, 0x31, 0x89, 0xd0, 0xc1, 0xe8, 12)),
    value: () => 1n << 44n,
    old: { exits: [], values: [0] },
    changed: { exits: [], values: [1] },
  },
  {
    group: 'controlProcessor',
    field: 'CPU_BASED_VM_EXEC_CONTROL',
    round: (p, bench) => p.call(bench.code(0xf3, 0x90, ...MARK)),
    value: (_, old) => old | (1n << 30n), // PAUSE exiting
    old: { exits: [], values: MARKED },
    changed: { exits: ['pause len=2'], values: MARKED },
  },
  {
    group: 'controlEvent',
    field: 'VM_ENTRY_INTR_INFO_FIELD',
    // the count of vector 0x61, which the handler keeps in the control page
    round: (p, bench) => p.call(bench.code(0x65, 0x8b, 0x04, 0x25, ...irqCountOffset(0x61))),
    value: () => 0x8000_0061,
    old: { exits: [], values: [0] },
    changed: { exits: [], values: [1] },
  },
  {
    group: 'controlEntry',
    field: 'VM_ENTRY_CONTROLS',
    options: () => ({ msrBitmap: true, fields: { GUEST_IA32_PAT: PAT_ALL_WB, HOST_IA32_PAT: PAT_RESET } }),
    round: (p) => p.rdmsr(PAT),
    value: (_, old) => old & ~(1n << 14n), // load IA32_PAT
    old: { exits: [], values: [PAT_ALL_WB] },
    changed: { exits: [], values: [PAT_RESET] },
  },
  {
    group: 'controlExceptions',
    field: 'EXCEPTION_BITMAP',
    options: () => ({ exceptionBitmap: UD }),
    round: (p, bench) => p.call(bench.code(0x0f, 0x0b)),
    value: () => 0,
    old: { exits: ['exception-or-nmi info=0x80000306'], values: MARKED },
    changed: { exits: ['L2 exception 6 code=0x0'], values: [] },
  },
  {
    group: 'controlRegisters',
    field: 'CR4_READ_SHADOW',
    options: () => ({ fields: { CR4_GUEST_HOST_MASK: 0x2000, CR4_READ_SHADOW: 0x2020 } }),
    round: (p, bench) => p.call(bench.code(0x0f, 0x20, 0xe0)),
    value: () => 0x20,
    old: { exits: [], values: [0x2020] },
    changed: { exits: [], values: [0x20] },
  },
  {
    group: 'controlTranslation',
    field: 'EPT_POINTER',
    round: (p, bench) => p.read64(bench.page('a')),
    value: (bench) => {
      bench.view('b').setBigUint64(0, 0xbbn, true);
      const other = bench.l1.createEpt();
      other.map(bench.page('a'), bench.page('b'));
      return other.pointer;
    },
    old: { exits: [], values: [0] },
    changed: { exits: [], values: [0xbb] },
  },
  {
    group: 'guestBasic',
    field: 'GUEST_RFLAGS',
    // pushfq; pop rax; shr eax, 21; and eax, 1: RFLAGS.ID
    round: (p, bench) => p.call(bench.code(0x9c, 0x58, 0xc1, 0xe8, 21, 0x83, 0xe0, 1)),
    value: (_, old) => old | (1n << 21n),
    old: { exits: [], values: [0] },
    changed: { exits: [], values: [1] },
  },
  {
    group: 'guestGroup1',
    field: 'GUEST_IA32_PAT',
    options: () => ({ msrBitmap: true }),
    round: (p) => p.rdmsr(PAT),
    value: () => PAT_ALL_WB,
    old: { exits: [], values: [PAT_RESET] },
    changed: { exits: [], values: [PAT_ALL_WB] },
  },
  {
    group: 'guestGroup2',
    field: 'GUEST_FS_BASE',
    options: () => ({ msrBitmap: true }),
    round: (p) => p.rdmsr(FS_BASE),
    value: () => 0x1234_5000,
    old: { exits: [], values: [0] },
    changed: { exits: [], values: [0x1234_5000] },
  },
  {
    group: 'hostPointers',
    field: 'HOST_FS_BASE',
    round: (p) => p.fold(7),
    value: () => 0x1234_5000,
    msr: FS_BASE,
    old: { exits: [], values: [7], l1: 0 },
    changed: { exits: [], values: [7], l1: 0x1234_5000 },
  },
  {
    group: 'hostGroup1',
    field: 'HOST_IA32_SYSENTER_ESP',
    round: (p) => p.fold(7),
    value: () => 0x1234_5000,
    msr: SYSENTER_ESP,
    old: { exits: [], values: [7], l1: 0 },
    changed: { exits: [], values: [7], l1: 0x1234_5000 },
  },
];

/** disp32 of irq_counts[vector] in the control page, which GS.base points at. */
function irqCountOffset(vector: number): number[] {
  const offset = 112 + vector * 4;
  return [offset & 0xff, offset >> 8, 0, 0];
}

const GROUP_CASES: readonly ScenarioCase[] = GROUPS.flatMap((row) =>
  (['changed', 'old'] as const).map((which): ScenarioCase => {
    const { exits, values, l1 } = row[which];
    const isOver = exits.some((text) => text.startsWith('L2 exception'));
    return {
      id: `evmcs/clean-fields/${row.group}/${which === 'changed' ? 'dirty' : 'clean'}`,
      title:
        which === 'changed'
          ? `${row.field} changed and its group marked so: the next entry uses the new value`
          : `${row.field} changed behind a group marked clean: the next entry uses the old value`,
      evmcs: true,
      ...(row.options ? { options: row.options } : {}),
      program: (p, bench) => {
        row.round(p, bench);
        p.vmcall();
        row.round(p, bench);
      },
      before: async (bench) => {
        const { evmcs, fields } = bench.l2;
        if (!evmcs) throw new Error('no eVMCS');
        await trace(bench.l2, traceOptions(bench));
        const value = row.value(bench, await fields.read(row.field));
        evmcs.cleanFields = EVMCS_CLEAN.all;
        await fields.write(row.field, value);
        if (which === 'old') evmcs.cleanFields = EVMCS_CLEAN.all;
      },
      trace: traceOptions,
      after: async (bench): Promise<Observations> =>
        row.msr === undefined ? {} : { l1: Number(await bench.cpu.rdmsr(row.msr)) },
      expect: {
        exits: [...exits, ...(isOver ? [] : ['vmcall'])],
        executed: isOver ? 2 : 3,
        values: [...row.old.values, ...values],
        ...(l1 === undefined ? {} : { more: { l1 } }),
      },
    };
  }),
);

/** A #UD that exits is over when RIP is past it: the code then returns 0x5a. */
function traceOptions(bench: Bench) {
  return {
    onExit: async (exit: { reason: string; rip: bigint }) => {
      if (exit.reason !== 'exception-or-nmi') return;
      const skip = bench.raw('skip', ...MARK, 0xc3);
      await bench.l2.vmwrite('GUEST_RIP', skip);
    },
  };
}

const ENLIGHTENMENT_CASES: readonly ScenarioCase[] = (
  [
    ['dirty', TRUSTS_MSR_BITMAP, false, true],
    ['not-trusted', 0n, true, true],
    ['trusted-clean', TRUSTS_MSR_BITMAP, true, false],
  ] as const
).map(([name, enlightenments, isClean, exits]) => ({
  id: `evmcs/msr-bitmap-enlightenment/${name}`,
  title: `a bit flipped in the MSR bitmap's page with the group ${isClean ? 'clean' : 'dirty'} and the enlightenment ${enlightenments ? 'on' : 'off'}`,
  evmcs: true,
  options: () => ({ msrBitmap: true }),
  program: (p) => p.wrmsr(SYSENTER_ESP, 0x1000).vmcall().wrmsr(SYSENTER_ESP, 0x2000),
  before: async ({ l2 }) => {
    l2.evmcs?.setWord('enlightenmentsControl', enlightenments);
    await trace(l2);
    l2.msrBitmap?.interceptWrite(SYSENTER_ESP);
    if (l2.evmcs) l2.evmcs.cleanFields = isClean ? EVMCS_CLEAN.all : EVMCS_CLEAN.all & ~EVMCS_CLEAN.msrBitmap;
  },
  expect: {
    // TLFS: with the bit on and the group clean KVM may go on with the bitmap it has merged
    exits: exits ? ['wrmsr len=2', 'vmcall'] : { oneOf: [['vmcall'], ['wrmsr len=2', 'vmcall']] },
    executed: 3,
  },
}));

export const cleanFields: readonly Selftest[] = [...GROUP_CASES, ...ENLIGHTENMENT_CASES].map(scenarioTest);
