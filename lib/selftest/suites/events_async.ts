// SPDX-License-Identifier: Apache-2.0
// Events that come from outside: interrupts, NMIs, INIT and SIPI, windows, and what blocks them.
import { Batch } from '../../guest/index.ts';
import { VCPUEVENT_VALID } from '../../kvm/index.ts';
import type { Selftest } from '../engine/model.ts';
import { capability } from '../engine/requirements.ts';
import { type Bench, type ScenarioCase, scenarioTest } from './scenario.ts';

const VECTOR = 0x61;
const OTHER_VECTOR = 0x62;
/** Where the images of both levels have their handlers. */
const L2_BASE = 0x20_0000n;
const NMI = 2;
const STI_BLOCKING = 1;
const MOV_SS_BLOCKING = 2;
const NMI_BLOCKING = 8;
const HLT_STATE = 1;
/** What a reset leaves. */
const SMBASE = 0x3_0000;
const WAIT_FOR_SIPI = 3;
const IF_OFF = 2;
/** ICR: vCPU 0 is the destination, as it is of every MSI here. */
const ICR = { init: 0x4500n, sipi: 0x4612n, fixed: 0x4000n | BigInt(VECTOR) };
/** nop; nop; nop; vmcall */
const NOPS = [0x90, 0x90, 0x90, 0x0f, 0x01, 0xc1];
/** mov rax, rsp; push SS, RSP, RFLAGS, CS and the address behind; iretq */
const IRET = [0x48, 0x89, 0xe0, 0x6a, 0x10, 0x50, 0x9c, 0x6a, 8, 0x48, 0x8d, 5, 3, 0, 0, 0, 0x50, 0x48, 0xcf];

const counts = ({ l2, cpu }: Bench) => ({
  l2Irqs: l2.interruptCount(VECTOR),
  l1Irqs: cpu.interruptCount(VECTOR),
});

/** L1 with interrupts on for a moment. */
async function openWindow(bench: Bench): Promise<void> {
  await bench.cpu.executeAll(new Batch().spin(bench.page('zero'), 8, 0));
}

/** The other vCPU of L1 writes its ICR. */
async function ipi(bench: Bench, icr: bigint): Promise<void> {
  await bench.l1.cpu(1).executeAll(new Batch().ipi(icr));
}

async function bothApics(bench: Bench): Promise<void> {
  await bench.cpu.x2apicEnable();
  await bench.l1.cpu(1).x2apicEnable();
}

const INTERRUPTS: readonly ScenarioCase[] = [
  {
    id: 'events/external-interrupt/active/exits',
    title: 'an interrupt for L1 while L2 is active ends L2, although L2 has interrupts off',
    options: () => ({ externalInterrupts: 'acknowledge', fields: { GUEST_RFLAGS: IF_OFF } }),
    program: (p) => p.sync(1).fold(7),
    trace: (bench) => ({ onSync: () => bench.interrupt(VECTOR), onExit: () => bench.cpu.eoi() }),
    after: counts,
    expect: {
      exits: ['sync 1', 'external-interrupt info=0x80000061', 'vmcall'],
      executed: 2,
      values: [7],
      more: { l2Irqs: 0, l1Irqs: 0 },
    },
  },
  {
    id: 'events/external-interrupt/active/delivered',
    title: 'without external-interrupt exiting L2 takes it, and not before it turns interrupts on',
    options: () => ({ fields: { GUEST_RFLAGS: IF_OFF } }),
    // mov rax, [rdi]: the count before STI and after
    program: (p, bench) =>
      p
        .sync(1)
        .call(bench.code(0x48, 0x8b, 0x07), bench.page('zero'))
        .sync(2)
        .sti()
        .fold(7),
    before: ({ cpu }) => cpu.x2apicEnable(),
    trace: (bench) => ({
      onSync: (value) => {
        if (value === 1) bench.interrupt(VECTOR);
        else bench.notes['early'] = BigInt(bench.l2.interruptCount(VECTOR));
      },
    }),
    after: (bench) => ({ ...counts(bench), early: Number(bench.notes['early'] ?? -1n) }),
    expect: {
      exits: ['sync 1', 'sync 2', 'vmcall'],
      executed: 5,
      values: [0, 7],
      more: { l2Irqs: 1, l1Irqs: 0, early: 0 },
    },
  },
  {
    id: 'events/external-interrupt/ipi',
    title: "an IPI from L1's other vCPU reaches the one whose L2 is active as an exit",
    vcpus: 2,
    options: () => ({ externalInterrupts: 'exit' }),
    program: (p) => p.sync(1).fold(7),
    before: bothApics,
    trace: (bench) => ({ onSync: () => ipi(bench, ICR.fixed), onExit: () => openWindow(bench) }),
    after: counts,
    expect: {
      exits: ['sync 1', 'external-interrupt', 'vmcall'],
      executed: 2,
      values: [7],
      more: { l2Irqs: 0, l1Irqs: 1 },
    },
  },
  {
    id: 'events/external-interrupt/halted',
    title: 'an interrupt that is pending when L2 is entered in the HLT state ends it at once',
    options: () => ({ externalInterrupts: 'acknowledge', fields: { GUEST_ACTIVITY_STATE: HLT_STATE } }),
    program: (p) => p.fold(7),
    before: (bench) => bench.interrupt(VECTOR),
    trace: (bench) => ({
      onExit: async (exit) => {
        bench.notes['activity'] = BigInt(exit.activityState);
        await bench.cpu.eoi();
        await bench.l2.vmwrite('GUEST_ACTIVITY_STATE', 0);
      },
    }),
    after: (bench) => ({ activity: Number(bench.notes['activity'] ?? -1n) }),
    expect: {
      exits: ['external-interrupt info=0x80000061', 'vmcall'],
      executed: 1,
      values: [7],
      // Since 6.12 (__kvm_emulate_halt) such an L2 does not go to sleep at all
      more: { activity: { oneOf: [HLT_STATE, 0] } },
    },
  },
  {
    id: 'events/nmi/active',
    title: 'two NMIs while L2 is active: L2 takes one, and the other when its handler has returned',
    program: (p) => p.sync(1).fold(7).sync(2).fold(8),
    trace: (bench) => ({ onSync: () => bench.cpu.vcpu.injectNmi() }),
    after: ({ l2, cpu }) => ({ l2Nmis: l2.interruptCount(NMI), l1Nmis: cpu.interruptCount(NMI) }),
    expect: {
      exits: ['sync 1', 'sync 2', 'vmcall'],
      executed: 4,
      values: [7, 8],
      more: { l2Nmis: 2, l1Nmis: 0 },
    },
  },
];

const WINDOWS: readonly ScenarioCase[] = [
  {
    id: 'events/nmi/iret-unblocks',
    title: 'with virtual NMIs, IRET ends the blocking that entry loaded',
    needs: ['pin.nmi-exiting', 'pin.virtual-nmis'],
    options: (bench) => ({
      entry: bench.raw('code', 0x90, ...IRET, 0x0f, 0x01, 0xc1),
      fields: { GUEST_INTERRUPTIBILITY_INFO: NMI_BLOCKING },
    }),
    after: (_, last) => ({ interruptibility: last?.interruptibility ?? -1 }),
    expect: { exits: ['vmcall'], more: { interruptibility: 0 } },
  },
  {
    id: 'events/nmi-window/after-iret',
    title: 'the NMI window opens behind the IRET and not before',
    needs: ['pin.nmi-exiting', 'pin.virtual-nmis', 'primary.nmi-window-exiting'],
    options: (bench) => ({
      entry: bench.raw('code', 0x90, ...IRET, 0x0f, 0x01, 0xc1),
      fields: { GUEST_INTERRUPTIBILITY_INFO: NMI_BLOCKING },
    }),
    trace: (bench) => ({ onExit: () => bench.write('primary.nmi-window-exiting', false) }),
    expect: { exits: [`nmi-window at=code+0x${(IRET.length + 1).toString(16)}`, 'vmcall'] },
  },
  {
    id: 'events/nmi-window/injected-nmi',
    title: 'an injected NMI blocks NMIs: the window opens when its handler has returned',
    needs: ['pin.nmi-exiting', 'pin.virtual-nmis', 'primary.nmi-window-exiting'],
    options: (bench) => ({ entry: bench.raw('code', ...NOPS) }),
    before: ({ l2 }) => l2.inject({ type: 'nmi', vector: NMI }),
    trace: (bench) => ({
      onExit: async () => {
        bench.notes['taken'] = BigInt(bench.l2.interruptCount(NMI));
        await bench.write('primary.nmi-window-exiting', false);
      },
    }),
    after: (bench) => ({ takenBefore: Number(bench.notes['taken'] ?? -1n) }),
    expect: { exits: ['nmi-window at=code+0x0', 'vmcall'], more: { takenBefore: 1 } },
  },
  ...(
    [
      ['sti', STI_BLOCKING],
      ['mov-ss', MOV_SS_BLOCKING],
    ] as const
  ).map(
    ([name, blocking]): ScenarioCase => ({
      id: `events/interruptibility/${name}`,
      title: `blocking by ${name.toUpperCase()} loaded at entry keeps the interrupt window shut for one instruction`,
      needs: ['primary.interrupt-window-exiting'],
      options: (bench) => ({
        entry: bench.raw('code', ...NOPS),
        fields: { GUEST_INTERRUPTIBILITY_INFO: blocking },
      }),
      trace: (bench) => ({ onExit: () => bench.write('primary.interrupt-window-exiting', false) }),
      after: (_, last) => ({ interruptibility: last?.interruptibility ?? -1 }),
      expect: { exits: ['interrupt-window at=code+0x1', 'vmcall'], more: { interruptibility: 0 } },
    }),
  ),
  {
    id: 'events/interruptibility/sti-saved',
    title: 'an exit right behind STI saves the blocking',
    options: (bench) => ({ entry: bench.raw('code', 0xfa, 0xfb, 0x0f, 0x01, 0xc1) }), // cli; sti; vmcall
    after: (_, last) => ({ interruptibility: last?.interruptibility ?? -1 }),
    expect: { exits: ['vmcall'], more: { interruptibility: STI_BLOCKING } },
  },
  {
    id: 'events/interruptibility/mov-ss-saved',
    title: 'an exit right behind MOV SS saves the blocking',
    options: (bench) => ({ entry: bench.raw('code', 0x8c, 0xd0, 0x8e, 0xd0, 0x0f, 0x01, 0xc1) }), // mov eax, ss; mov ss, eax; vmcall
    after: (_, last) => ({ interruptibility: last?.interruptibility ?? -1 }),
    expect: { exits: ['vmcall'], more: { interruptibility: MOV_SS_BLOCKING } },
  },
];

const PRIORITIES: readonly ScenarioCase[] = [
  {
    id: 'events/priority/nmi-before-interrupt',
    title: 'an NMI and an interrupt pending at once: the NMI exits first',
    needs: ['pin.nmi-exiting'],
    options: () => ({ externalInterrupts: 'acknowledge' }),
    program: (p) => p.sync(1).fold(7),
    trace: (bench) => ({
      onSync: () => {
        bench.interrupt(VECTOR);
        bench.cpu.vcpu.injectNmi();
      },
      onExit: () => {},
    }),
    expect: {
      exits: ['sync 1', 'exception-or-nmi info=0x80000202', 'external-interrupt info=0x80000061', 'vmcall'],
      executed: 2,
      values: [7],
    },
  },
  {
    id: 'events/priority/nmi-window-before-interrupt-window',
    title: 'both windows open: the NMI window exits first',
    needs: [
      'pin.nmi-exiting',
      'pin.virtual-nmis',
      'primary.nmi-window-exiting',
      'primary.interrupt-window-exiting',
    ],
    program: (p) => p.fold(7),
    trace: (bench) => ({
      onExit: (exit) =>
        bench.write(
          exit.reason === 'nmi-window' ? 'primary.nmi-window-exiting' : 'primary.interrupt-window-exiting',
          false,
        ),
    }),
    expect: { exits: ['nmi-window', 'interrupt-window', 'vmcall'], executed: 1, values: [7] },
  },
  {
    id: 'events/priority/injection-before-window',
    title: 'an injected interrupt is delivered before the window exits, which then stands behind the handler',
    needs: ['primary.interrupt-window-exiting'],
    options: (bench) => ({ entry: bench.raw('code', ...NOPS) }),
    before: ({ l2 }) => l2.inject({ type: 'external-interrupt', vector: VECTOR }),
    trace: (bench) => ({
      onExit: async () => {
        bench.notes['taken'] = BigInt(bench.l2.interruptCount(VECTOR));
        await bench.write('primary.interrupt-window-exiting', false);
      },
    }),
    after: (bench) => ({ takenBefore: Number(bench.notes['taken'] ?? -1n) }),
    expect: { exits: ['interrupt-window at=code+0x0', 'vmcall'], more: { takenBefore: 1 } },
  },
  {
    id: 'events/priority/injection-before-interrupt',
    title: 'an injected event is delivered first; the pending interrupt exits before its handler runs',
    options: () => ({ externalInterrupts: 'acknowledge' }),
    program: (p) => p.fold(7),
    before: async (bench) => {
      bench.interrupt(VECTOR);
      await bench.l2.inject({ type: 'external-interrupt', vector: OTHER_VECTOR });
    },
    trace: (bench) => ({
      onExit: async (exit) => {
        // every handler starts with a stub of 16 bytes at the image's base
        bench.notes['stub'] = exit.rip - L2_BASE;
        bench.notes['taken'] = BigInt(bench.l2.interruptCount(OTHER_VECTOR));
        await bench.cpu.eoi();
      },
    }),
    after: (bench) => ({
      stub: Number(bench.notes['stub'] ?? -1n),
      takenBefore: Number(bench.notes['taken'] ?? -1n),
      taken: bench.l2.interruptCount(OTHER_VECTOR),
    }),
    expect: {
      exits: ['external-interrupt info=0x80000061', 'vmcall'],
      executed: 1,
      values: [7],
      more: { stub: 16 * OTHER_VECTOR, takenBefore: 0, taken: 1 },
    },
  },
];

const tripleFaultEvent = capability('KVM_CAP_X86_TRIPLE_FAULT_EVENT', 'a kernel from 6.1 on has it');

const RESETS: readonly ScenarioCase[] = [
  {
    id: 'events/triple-fault',
    title: 'an exception that an empty IDT cannot deliver: exit 2, and L1 lives',
    options: () => ({ fields: { GUEST_IDTR_LIMIT: 0 } }),
    program: (p, bench) => p.fold(7).call(bench.code(0x0f, 0x0b)),
    after: async ({ cpu }) => ({ l1: (await cpu.cpuid(0)).eax > 0 }),
    expect: { exits: ['triple-fault'], executed: 1, values: [7], more: { l1: true } },
  },
  {
    id: 'events/triple-fault/double-fault-exits',
    title: 'with #DF in the exception bitmap the same L2 exits before it shuts down',
    options: () => ({ fields: { GUEST_IDTR_LIMIT: 0 }, exceptionBitmap: 1 << 8 }),
    program: (p, bench) => p.fold(7).call(bench.code(0x0f, 0x0b)),
    expect: { exits: ['exception-or-nmi info=0x80000b08 code=0x0'], executed: 1, values: [7] },
  },
  {
    id: 'events/triple-fault/by-userspace',
    title:
      'userspace makes a triple fault pending while L2 is active, and reads it back: exit 2, and L1 lives',
    requires: [tripleFaultEvent],
    program: (p) => p.fold(7).sync(1).fold(8),
    before: ({ vm }) => vm.enableCap('KVM_CAP_X86_TRIPLE_FAULT_EVENT', { args: [1n] }),
    trace: (bench) => ({
      onSync: () => {
        const { vcpu } = bench.cpu;
        vcpu.setEvents({ flags: VCPUEVENT_VALID.tripleFault, tripleFault: { pending: 1 } });
        bench.results['pending'] = vcpu.getEvents().tripleFault.pending;
      },
    }),
    after: async ({ cpu, results }) => ({ ...results, l1: (await cpu.cpuid(0)).eax > 0 }),
    expect: {
      exits: ['sync 1', 'triple-fault'],
      executed: 1,
      values: [7],
      more: { pending: 1, l1: true },
    },
  },
  {
    id: 'events/init',
    title: "an INIT from L1's other vCPU while L2 is active: exit 3, and L1 is not reset",
    vcpus: 2,
    program: (p) => p.sync(1).fold(7),
    before: bothApics,
    trace: (bench) => ({ onSync: () => ipi(bench, ICR.init), onExit: () => {} }),
    after: async ({ cpu }) => ({ l1: (await cpu.cpuid(0)).eax > 0 }),
    expect: { exits: ['sync 1', 'init-signal', 'vmcall'], executed: 2, values: [7], more: { l1: true } },
  },
  {
    id: 'events/smi',
    title: 'an SMI while L2 is active: the handler runs, RSM goes back to L2, and L1 sees nothing',
    program: (p) => p.sync(1).fold(7).cpuid(0),
    before: ({ vm }) => {
      // SMM has memslots of its own: those whose number is from 0x10000 on
      const smram = vm.memory.add({ gpa: SMBASE, size: 0x1_0000, slot: 0x1_0000 });
      // mov byte cs:[0x9000], 0x5a; rsm
      new Uint8Array(smram.buffer, 0x8000).set([0x2e, 0xc6, 0x06, 0x00, 0x90, 0x5a, 0x0f, 0xaa]);
    },
    trace: (bench) => ({ onSync: () => bench.cpu.vcpu.injectSmi() }),
    after: ({ vm }) => {
      const smram = vm.memory.regions.find(({ slot }) => slot === 0x1_0000);
      return { handled: smram?.bytes(0x9000, 1)[0] ?? 0 };
    },
    expect: { exits: ['sync 1', 'cpuid len=2', 'vmcall'], executed: 3, more: { handled: 0x5a } },
  },
  {
    id: 'events/sipi',
    title: 'an L2 entered in wait-for-SIPI: exit 4 with the vector of the SIPI',
    vcpus: 2,
    options: () => ({ fields: { GUEST_ACTIVITY_STATE: WAIT_FOR_SIPI } }),
    program: (p) => p.fold(7),
    before: (bench) => {
      // A SIPI that comes before the entry is lost: repeat it until the vCPU has left that state.
      const send = async (): Promise<void> => {
        await bench.l1.cpu(1).x2apicEnable();
        while (bench.notes['over'] === undefined) await ipi(bench, ICR.sipi);
      };
      return bench.cpu.x2apicEnable().then(() => void send().catch(() => {}));
    },
    trace: (bench) => ({
      onExit: async () => {
        bench.notes['over'] = 1n;
        await bench.l2.vmwrite('GUEST_ACTIVITY_STATE', 0);
      },
    }),
    expect: { exits: ['sipi q=0x12', 'vmcall'], executed: 1, values: [7] },
  },
];

export const asyncEvents: readonly Selftest[] = [...INTERRUPTS, ...WINDOWS, ...PRIORITIES, ...RESETS].map(
  scenarioTest,
);
