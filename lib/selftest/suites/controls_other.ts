// SPDX-License-Identifier: Apache-2.0
// Pin-based, VM-exit and VM-entry controls, SDM vol. 3, 25.6.1, 25.7.1 and 25.8.1.
import { Batch } from '../../guest/index.ts';
import type { Observations, Selftest } from '../engine/model.ts';
import { type Bench, type ControlCase, controlTest, MARK, MARKED } from './scenario.ts';

const VECTOR = 0x51;
const NMI = 2;
const PAT = 0x277;
const EFER = 0xc000_0080;
/** Write-back in all eight entries, and what a reset (and L2's VMCS here) has. */
const PAT_ALL_WB = 0x0606_0606_0606_0606n;
const PAT_RESET = 0x0007_0406_0007_0406n;
/** LME and LMA, and SCE, which nothing here depends on. */
const EFER_LONG = 0x500;
const EFER_SCE = 0x501;
const DR7_RESET = 0x400;
const DR7_L0 = 0x401;
const PERF_GLOBAL_RESERVED = 1n << 63n;

const irqCounts = ({ cpu, l2 }: Bench): Observations => ({
  l1Irqs: cpu.interruptCount(VECTOR),
  l2Irqs: l2.control.u32('irq_counts', VECTOR),
});

/** L1 with interrupts on for a moment. */
async function openWindow(bench: Bench): Promise<void> {
  await bench.cpu.executeAll(new Batch().spin(bench.page('zero'), 8, 0));
}

const PIN: readonly ControlCase[] = [
  {
    control: 'pin.external-interrupt-exiting',
    title:
      "an interrupt pending at entry exits before L2's first instruction and stays L1's; when clear L2 takes it",
    program: (p) => p.fold(7),
    before: async (bench) => {
      await bench.cpu.x2apicEnable();
      bench.interrupt(VECTOR);
    },
    trace: (bench) => ({
      onExit: async () => {
        bench.notes['executed'] = BigInt(bench.l2.progress.executed);
        await openWindow(bench);
      },
    }),
    after: (bench) => ({ ...irqCounts(bench), executedBefore: Number(bench.notes['executed'] ?? -1n) }),
    set: {
      exits: ['external-interrupt', 'vmcall'],
      executed: 1,
      values: [7],
      more: { l1Irqs: 1, l2Irqs: 0, executedBefore: 0 },
    },
    clear: {
      exits: ['vmcall'],
      executed: 1,
      values: [7],
      more: { l1Irqs: 0, l2Irqs: 1, executedBefore: -1 },
    },
  },
  {
    control: 'pin.nmi-exiting',
    title: 'an NMI that arrives while L2 is active exits; when clear L2 takes it through its IDT',
    program: (p) => p.sync(1).fold(7),
    trace: (bench) => ({ onSync: () => bench.cpu.vcpu.injectNmi(), onExit: () => {} }),
    after: ({ l2, cpu }) => ({ l2Nmis: l2.control.u32('irq_counts', NMI), l1Nmis: cpu.interruptCount(NMI) }),
    set: {
      exits: ['sync 1', 'exception-or-nmi info=0x80000202', 'vmcall'],
      executed: 2,
      values: [7],
      more: { l2Nmis: 0, l1Nmis: 0 },
    },
    clear: { exits: ['sync 1', 'vmcall'], executed: 2, values: [7], more: { l2Nmis: 1, l1Nmis: 0 } },
  },
  {
    control: 'pin.virtual-nmis',
    title: 'NMI-window exiting needs virtual NMIs: without them it is a bad control field',
    needs: ['pin.nmi-exiting', 'primary.nmi-window-exiting'],
    program: (p) => p.fold(7),
    trace: (bench) => ({ onExit: () => bench.write('primary.nmi-window-exiting', false) }),
    set: { exits: ['nmi-window', 'vmcall'], executed: 1, values: [7] },
    clear: { exits: ['VMLAUNCH VMfailValid 7'], executed: 0, values: [] },
  },
  {
    control: 'pin.activate-vmx-preemption-timer',
    title: 'a timer of 0 exits before the first instruction',
    options: () => ({ fields: { VMX_PREEMPTION_TIMER_VALUE: 0 } }),
    program: (p) => p.fold(7),
    trace: (bench) => ({
      onExit: async () => {
        bench.notes['executed'] = BigInt(bench.l2.progress.executed);
        await bench.write('pin.activate-vmx-preemption-timer', false);
      },
    }),
    after: (bench) => ({ executedBefore: Number(bench.notes['executed'] ?? -1n) }),
    set: { exits: ['vmx-preemption-timer', 'vmcall'], executed: 1, values: [7], more: { executedBefore: 0 } },
    clear: { exits: ['vmcall'], executed: 1, values: [7], more: { executedBefore: -1 } },
  },
  {
    control: 'pin.activate-vmx-preemption-timer',
    variant: 'running',
    title: 'a timer that runs out while L2 waits for what L1 does at the exit',
    options: () => ({ fields: { VMX_PREEMPTION_TIMER_VALUE: 10_000 } }),
    program: (p, bench) => p.fold(7).spin(bench.page('flag'), 8, 1).fold(8),
    before: (bench) => bench.view('flag').setBigUint64(0, bench.isSet ? 0n : 1n, true),
    trace: (bench) => ({
      onExit: async () => {
        bench.view('flag').setBigUint64(0, 1n, true);
        await bench.write('pin.activate-vmx-preemption-timer', false);
      },
    }),
    set: {
      exits: ['vmx-preemption-timer', 'vmcall'],
      executed: 3,
      values: [7, 8],
    },
    clear: { exits: ['vmcall'], executed: 3, values: [7, 8] },
  },
];

const EXIT: readonly ControlCase[] = [
  {
    control: 'exit.acknowledge-interrupt-on-exit',
    title: 'the exit names the vector and the interrupt is over; when clear L1 takes it afterwards',
    needs: ['pin.external-interrupt-exiting'],
    program: (p) => p.fold(7),
    before: async (bench) => {
      await bench.cpu.x2apicEnable();
      bench.interrupt(VECTOR);
    },
    trace: (bench) => ({ onExit: () => openWindow(bench) }),
    after: irqCounts,
    set: {
      exits: ['external-interrupt info=0x80000051', 'vmcall'],
      executed: 1,
      values: [7],
      more: { l1Irqs: 0, l2Irqs: 0 },
    },
    clear: {
      exits: ['external-interrupt', 'vmcall'],
      executed: 1,
      values: [7],
      more: { l1Irqs: 1, l2Irqs: 0 },
    },
  },
  {
    control: 'exit.save-debug-controls',
    title: 'DR7 that L2 wrote is in the VMCS after the exit; when clear the VMCS keeps what it had',
    // mov eax, 0x401; mov dr7, rax
    program: (p, bench) => p.call(bench.code(0xb8, 1, 4, 0, 0, 0x0f, 0x23, 0xf8, ...MARK)),
    after: async ({ l2 }) => ({ dr7: Number(await l2.vmread('GUEST_DR7')) }),
    set: { exits: ['vmcall'], executed: 1, values: MARKED, more: { dr7: DR7_L0 } },
    clear: { exits: ['vmcall'], executed: 1, values: MARKED, more: { dr7: DR7_RESET } },
  },
  {
    control: 'exit.host-address-space-size',
    title: 'a 64-bit L1 that asks for a 32-bit host is refused: bad host state',
    program: (p) => p.fold(7),
    set: { exits: ['vmcall'], executed: 1, values: [7] },
    clear: { exits: ['VMLAUNCH VMfailValid 8'], executed: 0, values: [] },
  },
  {
    control: 'exit.load-ia32-perf-global-ctrl',
    title: 'a reserved bit in the host field is refused; when clear nobody looks at it',
    options: () => ({ fields: { HOST_IA32_PERF_GLOBAL_CTRL: PERF_GLOBAL_RESERVED } }),
    program: (p) => p.fold(7),
    set: { exits: ['VMLAUNCH VMfailValid 8'], executed: 0, values: [] },
    clear: { exits: ['vmcall'], executed: 1, values: [7] },
  },
  {
    control: 'exit.save-ia32-pat',
    title: 'PAT that L2 wrote is in the VMCS after the exit; when clear the VMCS keeps what it had',
    options: () => ({ msrBitmap: true }),
    program: (p) => p.wrmsr(PAT, PAT_ALL_WB).rdmsr(PAT),
    after: async ({ l2 }) => ({ field: (await l2.vmread('GUEST_IA32_PAT')).toString(16) }),
    set: { exits: ['vmcall'], executed: 2, values: [PAT_ALL_WB], more: { field: PAT_ALL_WB.toString(16) } },
    clear: { exits: ['vmcall'], executed: 2, values: [PAT_ALL_WB], more: { field: PAT_RESET.toString(16) } },
  },
  {
    control: 'exit.load-ia32-pat',
    title: "L1's PAT comes back from the host field; when clear L2's stays",
    options: () => ({ msrBitmap: true }),
    program: (p) => p.wrmsr(PAT, PAT_ALL_WB),
    after: async ({ cpu }) => ({ l1: (await cpu.rdmsr(PAT)).toString(16) }),
    set: { exits: ['vmcall'], executed: 1, more: { l1: PAT_RESET.toString(16) } },
    clear: { exits: ['vmcall'], executed: 1, more: { l1: PAT_ALL_WB.toString(16) } },
  },
  {
    control: 'exit.save-ia32-efer',
    title: 'EFER that L2 wrote is in the VMCS after the exit; when clear the VMCS keeps what it had',
    options: () => ({ msrBitmap: true }),
    program: (p) => p.wrmsr(EFER, EFER_SCE).rdmsr(EFER),
    after: async ({ l2 }) => ({ field: Number(await l2.vmread('GUEST_IA32_EFER')) }),
    set: { exits: ['vmcall'], executed: 2, values: [EFER_SCE], more: { field: EFER_SCE } },
    clear: { exits: ['vmcall'], executed: 2, values: [EFER_SCE], more: { field: EFER_LONG } },
  },
  {
    control: 'exit.load-ia32-efer',
    title: "L1's EFER comes back from the host field; when clear only LME and LMA do",
    options: () => ({ msrBitmap: true }),
    program: (p) => p.wrmsr(EFER, EFER_SCE),
    after: async ({ cpu }) => ({ l1: Number(await cpu.rdmsr(EFER)) }),
    set: { exits: ['vmcall'], executed: 1, more: { l1: EFER_LONG } },
    clear: { exits: ['vmcall'], executed: 1, more: { l1: EFER_SCE } },
  },
  {
    control: 'exit.save-vmx-preemption-timer',
    title: 'the time left is in the VMCS after the exit; when clear the VMCS keeps the whole',
    needs: ['pin.activate-vmx-preemption-timer'],
    options: () => ({ fields: { VMX_PREEMPTION_TIMER_VALUE: 0x4000_0000 } }),
    program: (p) => p.pause(100).fold(7),
    after: async ({ l2 }) => {
      const left = Number(await l2.vmread('VMX_PREEMPTION_TIMER_VALUE'));
      return { spent: left !== 0x4000_0000, some: left > 0 && left <= 0x4000_0000 };
    },
    set: { exits: ['vmcall'], executed: 2, values: [7], more: { spent: true, some: true } },
    clear: { exits: ['vmcall'], executed: 2, values: [7], more: { spent: false, some: true } },
  },
];

const ENTRY: readonly ControlCase[] = [
  {
    control: 'entry.load-debug-controls',
    title: "L2's DR7 comes from the VMCS; when clear it is what L1 had",
    options: () => ({ fields: { GUEST_DR7: DR7_L0 } }),
    program: (p, bench) => p.call(bench.code(0x0f, 0x21, 0xf8)), // mov rax, dr7
    set: { exits: ['vmcall'], executed: 1, values: [DR7_L0] },
    clear: { exits: ['vmcall'], executed: 1, values: [DR7_RESET] },
  },
  {
    control: 'entry.ia-32e-mode-guest',
    title:
      'the same bytes as 64-bit and as 32-bit code: 0x48 is a REX prefix in one and DEC EAX in the other',
    needs: ['secondary.unrestricted-guest'],
    options: (bench) => {
      // xor eax, eax; 48 ff c0; vmcall
      const entry = bench.raw('code', 0x31, 0xc0, 0x48, 0xff, 0xc0, 0x0f, 0x01, 0xc1);
      // protected mode without paging, 32-bit code segment
      const flat = { GUEST_CR0: 0x31, GUEST_CR4: 0x2000, GUEST_IA32_EFER: 0, GUEST_CS_AR_BYTES: 0xc09b };
      return { entry, ...(bench.isSet ? {} : { fields: flat }) };
    },
    after: (_, last) => ({ rax: Number(last?.registers.rax ?? -1n) }),
    set: { exits: ['vmcall'], more: { rax: 1 } },
    clear: { exits: ['vmcall'], more: { rax: 0 } },
  },
  {
    control: 'entry.load-ia32-perf-global-ctrl',
    title: 'a reserved bit in the guest field is invalid guest state; when clear nobody looks at it',
    options: () => ({ fields: { GUEST_IA32_PERF_GLOBAL_CTRL: PERF_GLOBAL_RESERVED } }),
    program: (p) => p.fold(7),
    set: { exits: ['invalid-guest-state at-entry'], executed: 0, values: [] },
    clear: { exits: ['vmcall'], executed: 1, values: [7] },
  },
  {
    control: 'entry.load-ia32-pat',
    title: "L2's PAT comes from the VMCS; when clear it is what L1 had",
    options: () => ({ msrBitmap: true, fields: { GUEST_IA32_PAT: PAT_ALL_WB } }),
    program: (p) => p.rdmsr(PAT),
    set: { exits: ['vmcall'], executed: 1, values: [PAT_ALL_WB] },
    clear: { exits: ['vmcall'], executed: 1, values: [PAT_RESET] },
  },
  {
    control: 'entry.load-ia32-efer',
    title: "L2's EFER comes from the VMCS; when clear it is L1's",
    options: () => ({ msrBitmap: true, fields: { GUEST_IA32_EFER: EFER_SCE } }),
    program: (p) => p.rdmsr(EFER),
    set: { exits: ['vmcall'], executed: 1, values: [EFER_SCE] },
    clear: { exits: ['vmcall'], executed: 1, values: [EFER_LONG] },
  },
];

export const otherControls: readonly Selftest[] = [...PIN, ...EXIT, ...ENTRY].map(controlTest);
