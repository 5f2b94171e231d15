// SPDX-License-Identifier: Apache-2.0
// What a VMCS says about registers beyond the on/off controls: CR masks and shadows, CR3 targets, MSR lists, the
// exception bitmap, and L2's use of L1's x2APIC and TSC MSRs.
import type { Selftest } from '../engine/model.ts';
import { type ScenarioCase, scenarioTest } from './scenario.ts';
import { trace } from './trace.ts';

const TS = 8;
const VMXE = 0x2000;
const CR0 = 0x8001_0033;
/** CR0 as L2 sees it with TS set in the shadow, and after it flipped MP. */
const CR0_SHADOW = (CR0 | TS) >>> 0;
const CR0_FLIPPED = (CR0_SHADOW ^ 2) >>> 0;
const KERNEL_GS_BASE = 0xc000_0102;
const VMX_MISC = 0x485;
const X2APIC = { id: 0x802, tpr: 0x808, selfIpi: 0x83f };
const TSC_ADJUST = 0x3b;
const JUMP = 1n << 44n;
const VECTOR = 0x61;

const CR_CASES: readonly ScenarioCase[] = [
  {
    id: 'controls/cr0/mask-and-shadow',
    title: 'CR0.TS belongs to L1: L2 reads the shadow, and MOV, CLTS and LMSW that would change it exit',
    options: () => ({ fields: { CR0_GUEST_HOST_MASK: TS, CR0_READ_SHADOW: CR0_SHADOW } }),
    program: (p, bench) =>
      p
        .call(bench.code(0x0f, 0x20, 0xc0)) // mov rax, cr0
        .call(bench.code(0x0f, 0x20, 0xc0, 0x48, 0x83, 0xf0, 2, 0x0f, 0x22, 0xc0, 0x0f, 0x20, 0xc0)) // MP flipped
        .call(bench.code(0x0f, 0x20, 0xc0, 0x48, 0x83, 0xf0, 8, 0x0f, 0x22, 0xc0, 0x0f, 0x20, 0xc0)) // TS flipped
        .call(bench.code(0x0f, 0x06, 0x0f, 0x20, 0xc0)) // clts
        .call(bench.code(0xb8, 0x33, 0, 0, 0, 0x0f, 0x01, 0xf0, 0x0f, 0x20, 0xc0)), // lmsw ax, TS clear
    after: async ({ l2 }) => ({ cr0: Number(await l2.vmread('GUEST_CR0')) }),
    expect: {
      exits: [
        'control-register-access len=3',
        'control-register-access q=0x20 len=2',
        'control-register-access q=0x330030 len=3',
        'vmcall',
      ],
      executed: 5,
      values: [CR0_SHADOW, CR0_FLIPPED, CR0_FLIPPED, CR0_FLIPPED, CR0_FLIPPED],
      more: { cr0: (CR0 ^ 2) >>> 0 },
    },
  },
  {
    id: 'controls/cr4/mask-and-shadow',
    title: 'CR4.VMXE belongs to L1: L2 reads the shadow, and a MOV that would change it exits',
    options: () => ({ fields: { CR4_GUEST_HOST_MASK: VMXE, CR4_READ_SHADOW: 0x20 } }),
    program: (p, bench) =>
      p
        .call(bench.code(0x0f, 0x20, 0xe0)) // mov rax, cr4
        .call(bench.code(0x0f, 0x20, 0xe0, 0x48, 0x83, 0xf0, 4, 0x0f, 0x22, 0xe0, 0x0f, 0x20, 0xe0)) // TSD flipped
        .call(bench.code(0x0f, 0x20, 0xe0, 0x48, 0x0d, 0, 0x20, 0, 0, 0x0f, 0x22, 0xe0, 0x0f, 0x20, 0xe0)), // VMXE set
    after: async ({ l2 }) => ({ cr4: Number(await l2.vmread('GUEST_CR4')) }),
    expect: {
      exits: ['control-register-access q=0x4 len=3', 'vmcall'],
      executed: 3,
      values: [0x20, 0x24, 0x24],
      more: { cr4: VMXE | 0x24 },
    },
  },
  {
    id: 'controls/cr3-targets',
    // KVM offers L1 none (IA32_VMX_MISC 24:16 is 0): one is too many, and every MOV to CR3 exits
    title: 'more CR3 targets than IA32_VMX_MISC offers are a bad control field',
    needs: ['primary.cr3-load-exiting'],
    program: (p, bench) => p.call(bench.code(0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0xb8, 7, 0, 0, 0)),
    before: async (bench) => {
      bench.notes['targets'] = ((await bench.cpu.rdmsr(VMX_MISC)) >> 16n) & 0x1ffn;
      await bench.l2.vmwrite('CR3_TARGET_COUNT', (bench.notes['targets'] ?? 0n) + 1n);
    },
    after: async (bench) => {
      await bench.l2.vmwrite('CR3_TARGET_COUNT', bench.notes['targets'] ?? 0n);
      return { targets: Number(bench.notes['targets']), within: (await trace(bench.l2)).exits };
    },
    expect: {
      exits: ['VMLAUNCH VMfailValid 7'],
      more: { targets: 0, within: ['control-register-access q=0x3 len=3', 'vmcall'] },
    },
  },
];

const MSR_CASES: readonly ScenarioCase[] = [
  {
    id: 'controls/msr-lists/load-store-load',
    title: 'entry loads an MSR for L2, exit stores what L2 wrote and loads another value for L1',
    options: () => ({
      msrBitmap: true,
      entryLoadMsrs: [[KERNEL_GS_BASE, 0x1111n]],
      exitStoreMsrs: [KERNEL_GS_BASE],
      exitLoadMsrs: [[KERNEL_GS_BASE, 0x3333n]],
    }),
    program: (p) => p.rdmsr(KERNEL_GS_BASE).wrmsr(KERNEL_GS_BASE, 0x2222),
    after: async ({ l2, cpu }) => ({
      stored: Number(l2.structures.exitStoreMsrs?.get(KERNEL_GS_BASE) ?? -1n),
      loaded: Number(await cpu.rdmsr(KERNEL_GS_BASE)),
    }),
    expect: { exits: ['vmcall'], executed: 2, values: [0x1111], more: { stored: 0x2222, loaded: 0x3333 } },
  },
  ...(
    [
      ['fs-base', 0xc000_0100],
      ['gs-base', 0xc000_0101],
      ['x2apic', X2APIC.tpr],
      ['microcode-update', 0x79],
      ['no-such-msr', 0x1234],
    ] as const
  ).map(
    ([name, index]): ScenarioCase => ({
      id: `controls/msr-lists/entry-load/${name}`,
      title: `MSR 0x${index.toString(16)} as the second entry cannot be loaded: the entry fails and names it`,
      options: () => ({
        entryLoadMsrs: [
          [KERNEL_GS_BASE, 1n],
          [index, 0n],
        ],
      }),
      program: (p) => p.fold(7),
      expect: { exits: ['msr-loading at-entry q=0x2'], executed: 0, values: [] },
    }),
  ),
  ...(
    [
      ['exit-load', { exitLoadMsrs: [[0x1234, 0n]] as const }],
      ['exit-store', { exitStoreMsrs: [0x1234] }],
    ] as const
  ).map(
    ([name, options]): ScenarioCase => ({
      id: `controls/msr-lists/${name}/abort`,
      title: `an MSR that does not exist in the ${name} list: VMX abort, which shuts L1's vCPU down`,
      options: () => options,
      program: (p) => p.fold(7),
      expect: { exits: ['userspace shutdown'], executed: 1, values: [7] },
    }),
  ),
];

const PASS_THROUGH: readonly ScenarioCase[] = [
  {
    id: 'controls/x2apic/pass-through',
    title: "L2 uses L1's x2APIC: TPR, id, and an interrupt to itself",
    options: () => ({ msrBitmap: true, autoEoi: 'x2apic' }),
    program: (p) =>
      p.wrmsr(X2APIC.tpr, 0x40).rdmsr(X2APIC.tpr).rdmsr(X2APIC.id).wrmsr(X2APIC.selfIpi, VECTOR).fold(7),
    before: ({ cpu }) => cpu.x2apicEnable(),
    after: async ({ l2, cpu }) => ({
      tpr: Number(await cpu.rdmsr(X2APIC.tpr)),
      l2Irqs: l2.interruptCount(VECTOR),
      l1Irqs: cpu.interruptCount(VECTOR),
    }),
    expect: {
      exits: ['vmcall'],
      executed: 5,
      values: [0x40, 0, 7],
      more: { tpr: 0x40, l2Irqs: 1, l1Irqs: 0 },
    },
  },
  {
    id: 'controls/tsc-adjust',
    title: "IA32_TSC_ADJUST that L2 writes is L1's, and moves L1's TSC by as much",
    options: () => ({ msrBitmap: true }),
    program: (p) => p.rdmsr(TSC_ADJUST).wrmsr(TSC_ADJUST, JUMP).rdmsr(TSC_ADJUST),
    before: async (bench) => {
      bench.notes['before'] = await bench.cpu.rdtsc();
    },
    after: async (bench) => {
      const moved = (await bench.cpu.rdtsc()) - (bench.notes['before'] ?? 0n);
      return { adjust: (await bench.cpu.rdmsr(TSC_ADJUST)).toString(16), jumps: Number(moved / JUMP) };
    },
    expect: {
      exits: ['vmcall'],
      executed: 3,
      values: [0, JUMP],
      more: { adjust: JUMP.toString(16), jumps: 1 },
    },
  },
];

const EXCEPTIONS = [
  { name: 'de', vector: 0, code: [0x31, 0xc9, 0xf7, 0xf1], exit: 'info=0x80000300' }, // xor ecx, ecx; div ecx
  { name: 'db', vector: 1, code: [0xf1], exit: 'info=0x80000501' }, // int1
  { name: 'bp', vector: 3, code: [0xcc], exit: 'info=0x80000603' }, // int3
  { name: 'ud', vector: 6, code: [0x0f, 0x0b], exit: 'info=0x80000306' }, // ud2
  {
    name: 'ss',
    vector: 12,
    code: [0x48, 0x0f, 0xba, 0xed, 0x3f, 0x8b, 0x45, 0],
    exit: 'info=0x80000b0c code=0x0',
  }, // bts rbp, 63; mov eax, [rbp]
  {
    name: 'gp',
    vector: 13,
    code: [0x48, 0x0f, 0xba, 0xef, 0x3f, 0x8b, 0x07],
    exit: 'info=0x80000b0d code=0x0',
  }, // bts rdi, 63; mov eax, [rdi]
] as const;

const BITMAP: readonly ScenarioCase[] = EXCEPTIONS.flatMap(({ name, vector, code, exit }) =>
  [true, false].map(
    (isSet): ScenarioCase => ({
      id: `controls/exception-bitmap/${name}/${isSet ? 'set' : 'clear'}`,
      title: `exception ${vector} in L2 ${isSet ? 'exits' : 'is its own affair, although every other one would exit'}`,
      options: () => ({ exceptionBitmap: isSet ? 1 << vector : ~(1 << vector) >>> 0 }),
      program: (p, bench) => p.fold(7).call(bench.code(...code), bench.page('page')),
      expect: {
        exits: [isSet ? `exception-or-nmi ${exit}` : `L2 exception ${vector} code=0x0`],
        executed: 1,
        values: [7],
      },
    }),
  ),
);

const WRITE = 2;
/** Bit 14 of the exception bitmap, mask and match, and which kinds of #PF then exit (SDM vol. 3, 26.2). */
const PAGE_FAULTS = [
  { bit: 1, mask: 0, match: 0, exits: ['read', 'write'] },
  { bit: 1, mask: WRITE, match: WRITE, exits: ['write'] },
  { bit: 1, mask: WRITE, match: 0, exits: ['read'] },
  { bit: 1, mask: 0, match: WRITE, exits: [] },
  { bit: 0, mask: 0, match: 0, exits: [] },
  { bit: 0, mask: WRITE, match: WRITE, exits: ['read'] },
  { bit: 0, mask: 0, match: WRITE, exits: ['read', 'write'] },
] as const;

const PAGE_FAULT_CASES: readonly ScenarioCase[] = PAGE_FAULTS.flatMap(({ bit, mask, match, exits }) =>
  (['read', 'write'] as const).map((access): ScenarioCase => {
    const code = access === 'write' ? '0x2' : '0x0';
    const leaves = (exits as readonly string[]).includes(access);
    return {
      id: `controls/page-fault/bit=${bit},mask=${mask},match=${match}/${access}`,
      title: `#PF of a ${access} ${leaves ? 'exits with its error code and address' : 'is delivered to L2'}`,
      options: ({ l1 }) => ({
        pageTables: l1.createPageTables(),
        exceptionBitmap: bit << 14,
        fields: { PAGE_FAULT_ERROR_CODE_MASK: mask, PAGE_FAULT_ERROR_CODE_MATCH: match },
      }),
      program: (p, bench) =>
        access === 'write'
          ? p.fold(7).write64(bench.page('page') + 8, 1)
          : p.fold(7).read64(bench.page('page') + 8),
      before: (bench) => bench.l2.options.pageTables?.unmap(bench.page('page')),
      expect: {
        exits: [
          leaves
            ? `exception-or-nmi info=0x80000b0e code=${code} q=page+0x8`
            : `L2 exception 14 code=${code}`,
        ],
        executed: 1,
        values: [7],
      },
    };
  }),
);

export const registerControls: readonly Selftest[] = [
  ...CR_CASES,
  ...MSR_CASES,
  ...PASS_THROUGH,
  ...BITMAP,
  ...PAGE_FAULT_CASES,
].map(scenarioTest);
