// SPDX-License-Identifier: Apache-2.0
// What is under way when the state is taken: an entry, an event, a timer, SMM.
import type { L1, L2, L2Options, L2Program } from '../../guest/index.ts';
import { foldChecksum } from '../../guest/index.ts';
import { Kvm, KvmError, KvmUnsupportedError, VCPUEVENT_VALID, type Vcpu } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observed, Requirement, Selftest, SelftestContext } from '../engine/model.ts';
import { vmxControl } from '../engine/requirements.ts';
import { bootL1, hex, type Machine, stat } from './common.ts';
import {
  Copy,
  differences,
  FLAG,
  outsideVmx,
  placesOf,
  stateText,
  WITH_SHADOW,
  WITH_VMCS12,
  withFlags,
} from './nested_state_common.ts';
import { smm } from './nested_state_smm.ts';
import { requires, SMALL, wipe } from './nested_state_where.ts';

const ELSEWHERE = 0xc000_0000;
const VECTOR = 0x61;
const INVALID_OPCODE = 6;
export const ACTIVE = `size=${WITH_VMCS12} flags=guestMode vmxon=region vmcs12=l2`;

export interface Pending {
  readonly id: string;
  readonly title: string;
  readonly requires?: readonly Requirement[];
  readonly irqchip?: boolean;
  readonly options: (machine: Machine) => L2Options | Promise<L2Options>;
  readonly program: (program: L2Program, l1: L1) => unknown;
  readonly prepare?: (machine: Machine, l2: L2) => unknown;
  /** From the VMCS made to the moment the state is taken. */
  readonly reach: (machine: Machine, l2: L2, context: SelftestContext) => Promise<unknown>;
  /** What else is judged, in each place. */
  readonly more?: (copy: Copy) => Observed[];
  /** The state, then stops, entries, operations, and what `more` says. */
  readonly expect: { state: string; stops: string[]; entries: number; executed: number; more?: Observed[] };
  readonly values: readonly number[];
}

/** The same end in a clone, and then on the vCPU itself after it was wiped and restored. */
function pendingTest(one: Pending): Selftest {
  const { state, stops, entries, executed, more = [] } = one.expect;
  const result = [...stops, entries, executed, hex(foldChecksum(one.values)), ...more];
  return selftest({
    id: `nested-state/pending/${one.id}`,
    title: one.title,
    requires: [...requires, ...(one.requires ?? [])],
    expectations: { any: { state, differs: 'differs', clone: result, same: result } },
    body: async (context) => {
      await using machine = await bootL1(context, { memory: SMALL.memory, irqchip: one.irqchip ?? false });
      const { l1, vm } = machine;
      const { vcpu } = l1.cpu(0);
      const options = await one.options(machine);
      const l2 = await l1.createL2(options, (program) => one.program(program, l1));
      l2.setPolicy({});
      await one.prepare?.(machine, l2);
      await one.reach(machine, l2, context);
      const snapshot = vcpu.save();
      using kvm = Kvm.open();
      const clone = kvm.cloneVm(vm);
      const twin = clone.vcpus[0]!;
      const differs = differences(twin.save(), snapshot);
      wipe(vcpu);
      vcpu.restore(snapshot);
      differs.push(...differences(vcpu.save(), snapshot));
      // At the same time: a timer that the state speaks of may be due
      const finish = async (copy: Copy): Promise<Observed[]> => {
        const before = stat(copy.vcpu.stats(), 'nested_run');
        const texts = await copy.finish(context.signal, true);
        const ran = stat(copy.vcpu.stats(), 'nested_run') - before;
        return [...texts, ran, copy.executed, hex(copy.checksum), ...(one.more?.(copy) ?? [])];
      };
      const [inClone, inSame] = await Promise.all([
        finish(new Copy(twin, clone.memory.regionAt(0)!.buffer, l2)),
        finish(new Copy(vcpu, l1.memory.buffer, l2)),
      ]);
      const text = stateText(snapshot.nested!, placesOf(l1, l2));
      return {
        observed: { state: text, differs: ['differs', ...differs].join(' '), clone: inClone, same: inSame },
      };
    },
  });
}

/**
 * Stops a VMLAUNCH between its checks and the entry: KVM waits for the page of the virtual APIC, and finds a signal
 * once it has it.
 */
async function stopInEntry({ vm }: Machine, l2: L2, { signal }: SelftestContext): Promise<void> {
  const page = vm.memory.regionAt(ELSEWHERE)!;
  using faults = watch(page);
  const abort = new AbortController();
  const entering = l2.enter({ signal: AbortSignal.any([signal, abort.signal]) }).then(
    (stop) => stop.kind,
    () => 'interrupted',
  );
  await faults.read({ signal });
  abort.abort();
  faults.zero(0);
  const ended = await entering;
  if (ended !== 'interrupted') throw new Error(`the entry was not interrupted: ${ended}`);
}

function watch(page: NonNullable<ReturnType<Machine['vm']['memory']['regionAt']>>) {
  try {
    return page.watchFaults();
  } catch (error) {
    if (error instanceof KvmError && error.code === 'EPERM') {
      throw new KvmUnsupportedError('userfaultfd with CAP_SYS_PTRACE', 'watchFaults');
    }
    throw error;
  }
}

const apicElsewhere = ({ vm }: Machine): L2Options => {
  vm.memory.add({ gpa: ELSEWHERE, size: 4096 });
  return { virtualApic: ELSEWHERE };
};
export const toSync = async (_: Machine, l2: L2, { signal }: SelftestContext): Promise<void> => {
  await l2.enter({ signal });
};

const CASES: readonly Pending[] = [
  {
    id: 'entry',
    title: 'VMLAUNCH is done and L2 not entered, with an interrupt to inject: L2 takes it once',
    requires: [vmxControl('primary.use-tpr-shadow')],
    options: apicElsewhere,
    program: (p) => p.fold(1).sync(1).fold(2),
    prepare: (_, l2) => l2.inject({ type: 'external-interrupt', vector: VECTOR }),
    reach: stopInEntry,
    more: (copy) => [copy.interruptCount(VECTOR)],
    expect: {
      state: `size=${WITH_VMCS12} flags=guestMode+runPending vmxon=region vmcs12=l2`,
      stops: ['sync 1', 'vmcall'],
      entries: 1,
      executed: 3,
      more: [1],
    },
    values: [1, 2],
  },
  {
    id: 'interrupt',
    title: "an interrupt that L1 wants waits in L1's local APIC while L2 is active",
    irqchip: true,
    options: async ({ l1 }) => {
      await l1.cpu(0).x2apicEnable();
      return { externalInterrupts: 'acknowledge' };
    },
    program: (p) => p.fold(1).sync(1).fold(2),
    reach: async (machine, l2, context) => {
      await toSync(machine, l2, context);
      machine.l1.signal(VECTOR);
    },
    expect: {
      state: ACTIVE,
      stops: [`external-interrupt info=0x800000${VECTOR.toString(16)}`, 'vmcall'],
      entries: 1,
      executed: 3,
    },
    values: [1, 2],
  },
  {
    id: 'exception',
    title: "an exception that L1 wants waits for L2's next instruction",
    options: ({ vm }) => {
      vm.enableCap('KVM_CAP_EXCEPTION_PAYLOAD', { args: [1n] });
      return { exceptionBitmap: 1 << INVALID_OPCODE };
    },
    program: (p) => p.fold(1).sync(1).fold(2),
    reach: async (machine, l2, context) => {
      await toSync(machine, l2, context);
      const { vcpu } = l2.cpu;
      vcpu.settle();
      const { flags } = vcpu.getEvents();
      vcpu.setEvents({
        flags: flags | VCPUEVENT_VALID.payload,
        exception: { pending: 1, nr: INVALID_OPCODE },
      });
    },
    expect: { state: ACTIVE, stops: ['exception-or-nmi info=0x80000306'], entries: 0, executed: 1 },
    values: [1],
  },
  {
    id: 'preemption-timer',
    title: 'the VMX-preemption timer goes on in the new place and wakes L2 there',
    requires: [vmxControl('pin.activate-vmx-preemption-timer')],
    irqchip: true,
    options: () => ({ preemptionTimer: 16_000_000 }),
    program: (p) => p.fold(1).sync(1).hlt(),
    reach: toSync,
    expect: { state: `${ACTIVE} vmx=deadline`, stops: ['vmx-preemption-timer'], entries: 0, executed: 2 },
    values: [1],
  },
  {
    id: 'shadow-vmcs',
    title: "L2's shadow VMCS is part of the state",
    requires: [vmxControl('secondary.vmcs-shadowing')],
    options: async ({ l1 }) => {
      const { revision } = await l1.controls();
      const bitmap = l1.allocate();
      const shadow = l1.allocate();
      new DataView(l1.memory.buffer).setUint32(shadow, revision | 0x8000_0000, true);
      return {
        controls: ['secondary.vmcs-shadowing'],
        fields: { VMREAD_BITMAP: bitmap, VMWRITE_BITMAP: bitmap, VMCS_LINK_POINTER: shadow },
      };
    },
    // mov eax, 0x6800 (GUEST_CR0); mov ecx, 0x123; vmwrite rax, rcx; vmread rax, rax; ret
    program: (p, l1) =>
      p
        .call(code(l1, 0xb8, 0, 0x68, 0, 0, 0xb9, 0x23, 1, 0, 0, 0x0f, 0x79, 0xc1))
        .sync(1)
        .call(code(l1, 0xb8, 0, 0x68, 0, 0, 0x0f, 0x78, 0xc0)),
    reach: toSync,
    expect: {
      state: `size=${WITH_SHADOW} flags=guestMode vmxon=region vmcs12=l2`,
      stops: ['vmcall'],
      entries: 0,
      executed: 3,
    },
    values: [0x6800, 0x123],
  },
  smm,
];

function code(l1: L1, ...bytes: number[]): number {
  return l1.place(Uint8Array.from([...bytes, 0xc3]));
}

/** One NOP a turn: with the monitor trap flag L2 exits behind each. */
const monitorTrap = selftest({
  id: 'nested-state/pending/monitor-trap',
  title: 'with the flag MTF_PENDING the trap comes before the next instruction, without it behind it',
  requires: [...requires, vmxControl('primary.monitor-trap-flag'), vmxControl('primary.use-tpr-shadow')],
  expectations: {
    any: {
      entry: ['monitor-trap-flag', 1],
      pending: ['monitor-trap-flag', 0],
      states: [
        `size=${WITH_VMCS12} flags=guestMode+runPending vmxon=region vmcs12=l2`,
        `size=${WITH_VMCS12} flags=guestMode+mtfPending vmxon=region vmcs12=l2`,
      ],
    },
  },
  body: async (context) => {
    await using machine = await bootL1(context, SMALL);
    const { l1 } = machine;
    const { vcpu } = l1.cpu(0);
    const nops = l1.place(new Uint8Array(16).fill(0x90));
    const controls = ['primary.monitor-trap-flag'] as const;
    const options = { ...apicElsewhere(machine), controls, entry: nops };
    const l2 = await l1.createL2(options, () => {});
    l2.setPolicy({});
    await stopInEntry(machine, l2, context);
    const snapshot = vcpu.save();
    using kvm = Kvm.open();
    const clone = kvm.cloneVm(machine.vm);
    const states: string[] = [];
    const finish = async (where: Vcpu, memory: ArrayBuffer, nested: Uint8Array): Promise<Observed[]> => {
      wipe(where);
      where.restore({ ...snapshot, nested });
      states.push(stateText(where.getNestedState(), placesOf(l1, l2)));
      const copy = new Copy(where, memory, l2);
      return [await copy.run(context.signal), Number(copy.rip - BigInt(nops))];
    };
    const trapped = withFlags(snapshot.nested!, FLAG.mtfPending, FLAG.runPending);
    const entry = await finish(vcpu, l1.memory.buffer, snapshot.nested!);
    const pending = await finish(clone.vcpus[0]!, clone.memory.regionAt(0)!.buffer, trapped);
    return { observed: { entry, pending, states } };
  },
});

/** The deadline is a time of L1's TSC; KVM (vmx_calc_preemption_timer_value) takes one that has passed for one far away. */
const deadlinePassed = selftest({
  id: 'nested-state/pending/preemption-timer-passed',
  title: 'the VMX-preemption timer ran out while the state was away: KVM to 7.3 forgets it, and L2 sleeps on',
  requires: [...requires, vmxControl('pin.activate-vmx-preemption-timer')],
  expectations: {
    any: {
      state: `${ACTIVE} vmx=deadline`,
      stop: { oneOf: ['vmx-preemption-timer', 'nothing'] },
      executed: 2,
    },
  },
  body: async (context) => {
    await using machine = await bootL1(context, { memory: SMALL.memory });
    const { l1 } = machine;
    const { vcpu } = l1.cpu(0);
    // The first TSC that userspace writes turns L1's time back; the next ones, in the same second, no more
    vcpu.restore(vcpu.save());
    const l2 = await l1.createL2({ preemptionTimer: 100_000 }, (program) => program.fold(1).sync(1).hlt());
    await toSync(machine, l2, context);
    const snapshot = vcpu.save();
    vcpu.setNestedState(outsideVmx());
    await context.sleep(100);
    vcpu.restore(snapshot);
    const copy = new Copy(vcpu, l1.memory.buffer, l2);
    const patience = AbortSignal.any([context.signal, AbortSignal.timeout(200)]);
    const stop = await copy.run(patience).catch(() => 'nothing');
    const state = stateText(snapshot.nested!, placesOf(l1, l2));
    return { observed: { state, stop, executed: copy.executed } };
  },
});

export const pending: readonly Selftest[] = [...CASES.map(pendingTest), deadlinePassed, monitorTrap];
