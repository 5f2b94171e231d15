// SPDX-License-Identifier: Apache-2.0
// Hazards of the APIC pages, and of many VMCSs on few contexts.
import {
  Batch,
  foldChecksum,
  type L1,
  type L2Options,
  type L2Program,
  type L2Stop,
} from '../../guest/index.ts';
import type { Vm } from '../../kvm/index.ts';
import type { Observations, SelftestContext } from '../engine/model.ts';
import { vmxControl } from '../engine/requirements.ts';
import { bootL1, hex, stopText } from './common.ts';
import { GuestPage, PAGE_GPA } from './guest_page.ts';
import type { HazardTest } from './hazard.ts';
import { NOTIFICATION, OPTIONS, POSTED_CONTROLS, post, VECTOR } from './posted.ts';
import { isHalted, meanwhile, until } from './watchdog.ts';

export const VAPIC_GPA = PAGE_GPA + 0x10_0000;
export const DESCRIPTOR_GPA = PAGE_GPA + 0x20_0000;
export const ELSEWHERE = PAGE_GPA + 0x30_0000;
export const UNRELATED = PAGE_GPA + 0x40_0000;
const VTPR = 0x80;
export const APIC = vmxControl('secondary.virtualize-apic-accesses');
export const posted = POSTED_CONTROLS.map(vmxControl);

export const text = (stop: L2Stop | undefined): string => (stop ? stopText(stop) : 'no progress');

/** An L2 with posted interrupts, its two pages in memslots of their own. */
async function postedPages(l1: L1, vm: Vm, program: (p: L2Program) => unknown) {
  const vapic = new GuestPage(vm, VAPIC_GPA);
  const descriptor = new GuestPage(vm, DESCRIPTOR_GPA);
  const l2 = await l1.createL2(
    {
      ...OPTIONS,
      virtualApic: VAPIC_GPA,
      postedInterrupts: { vector: NOTIFICATION, descriptor: DESCRIPTOR_GPA },
    },
    program,
  );
  return { vapic, descriptor, l2 };
}

/** L2 has used a page, L1 takes the control away, the host drops the page: KVM must not wait for it for ever. */
async function controlOff(context: SelftestContext): Promise<Observations> {
  const stops: string[] = [];
  const executed: number[] = [];
  for (const kind of ['apic-access', 'vapic'] as const) {
    await using machine = await bootL1(context);
    const { vm, l1 } = machine;
    const page = new GuestPage(vm);
    const options: L2Options = kind === 'apic-access' ? { apicAccess: page.gpa } : { virtualApic: page.gpa };
    const l2 = await l1.createL2(options, (p) => p.fold(1).vmcall().fold(2).sync(1).fold(3));
    const step = (start: (signal: AbortSignal) => Promise<L2Stop>) => meanwhile(context, start);
    stops.push(text(await step((signal) => l2.enter({ signal }))));
    const field = kind === 'apic-access' ? 'SECONDARY_VM_EXEC_CONTROL' : 'CPU_BASED_VM_EXEC_CONTROL';
    const bit = kind === 'apic-access' ? 1n : 1n << 21n;
    await l2.vmwrite(field, (await l2.vmread(field)) & ~bit);
    page.discard();
    const second = await step((signal) => l2.enter({ signal }));
    stops.push(text(second));
    if (second) {
      page.discard();
      page.delete();
      stops.push(text(await step((signal) => l2.continue({ signal }))));
    }
    executed.push(l2.progress.executed);
  }
  return { stops, executed };
}

/** Memslots change while L2 is active, then a notification is processed in KVM_RUN's innermost loop. */
async function postedAfterChange(context: SelftestContext): Promise<Observations> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const { vapic, descriptor, l2 } = await postedPages(l1, vm, (p) => {
    for (let i = 0; i < 4; i++) p.sync(i).read64(Number(l1.images.l2.symbol('idt').address));
  });
  const idt = new DataView(l1.memory.buffer).getBigUint64(Number(l1.images.l2.symbol('idt').address), true);
  const changes = [
    () => vm.memory.add({ gpa: ELSEWHERE, size: 4096 }),
    () => vapic.swap(true),
    () => {
      descriptor.moveAway();
      descriptor.moveBack();
    },
    () => vm.memory.regionAt(ELSEWHERE)?.delete(),
  ];
  let stop = await meanwhile(context, (signal) => l2.enter({ signal }));
  const taken: number[] = [];
  for (const change of changes) {
    change();
    // L2 first finds its way back into memory, then the interrupt comes
    stop = await meanwhile(context, (signal) => l2.continue({ signal }));
    if (!stop) break;
    if (stop.kind !== 'sync') break;
    vm.memory.add({ gpa: UNRELATED, size: 4096 }).delete();
    post({ l1, l2 });
    taken.push(l2.interruptCount(VECTOR));
  }
  return {
    last: text(stop),
    taken,
    total: l2.interruptCount(VECTOR),
    executed: l2.progress.executed,
    right: l2.progress.checksum === foldChecksum([idt, idt, idt, idt]),
  };
}

/** L2 sleeps in HLT, its virtual-APIC page goes, the vCPU is kicked, sleeps on, and is woken. */
async function haltedWithoutPage(context: SelftestContext): Promise<Observations> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const { vapic, l2 } = await postedPages(l1, vm, (p) => p.sync(1).hlt().fold(7));
  const { vcpu } = l1.cpu(0);
  vcpu.stats();
  const slept: boolean[] = [];
  const stops = [text(await meanwhile(context, (signal) => l2.enter({ signal })))];
  const resume = (signal: AbortSignal) => l2.continue({ signal });
  const asleep = async (act: () => unknown): Promise<L2Stop | undefined> => {
    const stop = await meanwhile(context, resume, async () => {
      slept.push(await until(context, () => isHalted(vcpu)));
      vapic.discard();
      act();
    });
    stops.push(text(stop));
    return stop;
  };
  await asleep(() => vcpu.kick());
  const exit = await asleep(() => l1.signal(VECTOR));
  const activity = exit?.kind === 'exit' ? exit.exit.activityState : -1;
  if (exit?.kind === 'exit') {
    await l1.cpu(0).eoi();
    await l2.vmwrite('GUEST_ACTIVITY_STATE', 0);
    stops.push(text(await meanwhile(context, (signal) => l2.enter({ signal }))));
  }
  return { slept, stops, activity, executed: l2.progress.executed, folded: Number(l2.progress.last) };
}

/** One VMCS, current on two vCPUs: against the SDM's rules, and nothing to warn of. */
async function twoVcpusOneVmcs(context: SelftestContext): Promise<Observations> {
  await using machine = await bootL1(context, 2);
  const { vm, l1 } = machine;
  const apic = new GuestPage(vm);
  const l2 = await l1.createL2({ apicAccess: PAGE_GPA }, (p) => p.fold(1).vmcall().fold(2));
  const { signal } = context;
  const stops = [stopText(await l2.enter({ signal }))];
  await l1.vmxon(1);
  const other = l1.cpu(1);
  const loads: string[] = [];
  for (let i = 0; i < 3; i++) {
    const results = await other.execute(new Batch().vmptrld(l2.vmcs).keepGoing().vmptrst().keepGoing());
    loads.push(...results.map(({ command, status }) => `${command} ${status}`));
    apic.discard();
  }
  stops.push(stopText(await l2.enter({ signal })));
  await other.vmclear(l2.vmcs);
  await l2.vmclear();
  return { stops, loads: [...new Set(loads)], executed: l2.progress.executed };
}

const VCPUS = 2;
/** More than 8 for each vCPU. */
const VMCSS = 10;
const CYCLES = 3;

/** VMPTRLD of more VMCSs than there are contexts, never VMCLEAR, VMXOFF; again and again, pages going meanwhile. */
async function exhaustion(context: SelftestContext): Promise<Observations> {
  await using machine = await bootL1(context, VCPUS);
  const { vm, l1 } = machine;
  const { revision } = await l1.controls();
  const page = new GuestPage(vm);
  let loaded = 0;
  for (let cycle = 0; cycle < CYCLES; cycle++) {
    for (const cpu of l1.vcpus) {
      await l1.vmxon(cpu.index);
      const batch = new Batch();
      for (let i = 0; i < VMCSS; i++) {
        const vmcs = l1.allocate();
        new DataView(l1.memory.buffer).setUint32(vmcs, revision, true);
        batch.vmptrld(vmcs);
      }
      loaded += (await cpu.executeAll(batch)).length;
      page.discard();
    }
    for (const cpu of l1.vcpus) await cpu.vmxoff();
  }
  const checksums: string[] = [];
  for (const cpu of l1.vcpus) {
    const l2 = await l1.createL2({ cpu: cpu.index, apicAccess: page.gpa }, (p) =>
      p.write32(PAGE_GPA + VTPR, 1).fold(cpu.index + 1),
    );
    const stop = await l2.enter({ policy: { 'apic-access': 'skip' }, signal: context.signal });
    checksums.push(`${stopText(stop)} ${l2.exitCount('apic-access')} ${hex(l2.progress.checksum)}`);
  }
  return { loaded, checksums };
}

export const PAGE_HAZARDS: readonly HazardTest[] = [
  {
    id: 'control-off',
    title: 'a page L2 used is dropped after L1 turned its control off: KVM_RUN makes progress',
    requires: [APIC, vmxControl('primary.use-tpr-shadow')],
    expect: {
      stops: ['vmcall', 'sync 1', 'vmcall', 'vmcall', 'sync 1', 'vmcall'],
      executed: [5, 5],
    },
    body: controlOff,
  },
  {
    id: 'posted-after-memslot-change',
    title:
      'a posted interrupt directly after a change of memslots is delivered; nothing sleeps in atomic context',
    requires: posted,
    expect: { last: 'vmcall', taken: [0, 1, 2], total: 3, executed: 8, right: true },
    body: postedAfterChange,
  },
  {
    id: 'halted-vapic',
    title: 'the virtual-APIC page goes while L2 sleeps in HLT with virtual-interrupt delivery',
    requires: posted,
    expect: {
      slept: [true, true],
      stops: ['sync 1', 'userspace interrupted', 'external-interrupt', 'vmcall'],
      activity: 1,
      executed: 3,
      folded: 7,
    },
    body: haltedWithoutPage,
  },
  {
    id: 'vmptrld-on-two-vcpus',
    title: 'VMPTRLD of a VMCS that is current on another vCPU succeeds, and L2 runs on where it was',
    requires: [APIC],
    expect: { stops: ['vmcall', 'vmcall'], loads: ['VMPTRLD ok', 'VMPTRST ok'], executed: 3 },
    body: twoVcpusOneVmcs,
  },
  {
    id: 'contexts-exhausted',
    title: 'more VMCSs loaded and never cleared than KVM has contexts, and VMXOFF, three times on two vCPUs',
    requires: [APIC],
    expect: {
      loaded: VCPUS * VMCSS * CYCLES,
      checksums: [1, 2].map((value) => `vmcall 1 ${hex(foldChecksum([value]))}`),
    },
    body: exhaustion,
  },
];
