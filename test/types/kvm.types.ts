// SPDX-License-Identifier: Apache-2.0
// The public types of nvmx as a caller sees them. tsc reads this file (npm run check), nothing runs it.
import { expectTypeOf } from 'vitest';
import {
  type BackingSpec,
  type CapabilityName,
  type CpuidEntry,
  EventFd,
  type Exit,
  type ExitRule,
  type GsiRoute,
  Kvm,
  KvmClosedError,
  KvmError,
  KvmMsrError,
  KvmPendingExitError,
  KvmUnsupportedError,
  type MemoryRegion,
  MP_STATE,
  type Regs,
  runSteps,
  type Sregs,
  type Step,
  type Vcpu,
  VcpuBusyError,
  type Vm,
} from '../../lib/kvm/index.ts';

declare const kvm: Kvm;
declare const vm: Vm;
declare const vcpu: Vcpu;
declare const region: MemoryRegion;

export function handles(): void {
  expectTypeOf(Kvm.open()).toEqualTypeOf<Kvm>();
  expectTypeOf(kvm.createVm()).toEqualTypeOf<Vm>();
  expectTypeOf(vm.createVcpu(0)).toEqualTypeOf<Vcpu>();
  expectTypeOf(kvm).toExtend<Disposable>();
  expectTypeOf(vm).toExtend<Disposable>();
  expectTypeOf(vcpu).toExtend<Disposable>();
  expectTypeOf(new EventFd()).toExtend<Disposable>();
  expectTypeOf(vcpu.state).toEqualTypeOf<'idle' | 'running' | 'closed'>();
  expectTypeOf(kvm.capabilities()).toEqualTypeOf<Map<CapabilityName, number>>();
  // @ts-expect-error: a vCPU comes from its VM
  new (vcpu.constructor as typeof Vcpu)();
  // @ts-expect-error: there is no such type of VM
  kvm.createVm({ type: 'sgx' });
  // @ts-expect-error: a capability has a KVM_CAP_ name or a number
  kvm.checkExtension('NESTED_STATE');
  kvm.checkExtension('KVM_CAP_NESTED_STATE');
  kvm.checkExtension(157);
  // @ts-expect-error: an id is a number
  vm.createVcpu(0n);
  // @ts-expect-error: read-only
  vcpu.id = 1;
}

export function exits(exit: Exit): number | bigint | string {
  switch (exit.type) {
    case 'io':
      expectTypeOf(exit.size).toEqualTypeOf<1 | 2 | 4>();
      expectTypeOf(exit.direction).toEqualTypeOf<'in' | 'out'>();
      expectTypeOf(exit.data).toEqualTypeOf<Uint8Array>();
      // @ts-expect-error: a port exit has no address
      return exit.address;
    case 'mmio':
      expectTypeOf(exit.isWrite).toEqualTypeOf<boolean>();
      // @ts-expect-error: a direction is of ports
      exit.direction;
      return exit.address;
    case 'hlt':
    case 'shutdown':
    case 'interrupted':
    case 'irq-window-open':
    case 'dirty-ring-full':
    case 'bus-lock':
      expectTypeOf(exit).toEqualTypeOf<
        | { type: 'hlt' }
        | { type: 'shutdown' }
        | { type: 'interrupted' }
        | { type: 'irq-window-open' }
        | { type: 'dirty-ring-full' }
        | { type: 'bus-lock' }
      >();
      return exit.type;
    case 'fail-entry':
      return exit.hardwareReason;
    case 'internal-error':
      expectTypeOf(exit.data).toEqualTypeOf<bigint[]>();
      return exit.suberror;
    case 'memory-fault':
      expectTypeOf(exit.gpa).toBeNumber();
      expectTypeOf(exit.isPrivate).toBeBoolean();
      return exit.flags;
    case 'system-event':
      return exit.event;
    case 'debug':
      expectTypeOf(exit.exception).toBeNumber();
      return exit.dr6;
    case 'rdmsr':
      // @ts-expect-error: the value is what the reader wants to know
      exit.value;
      return exit.index;
    case 'wrmsr':
      return exit.value;
    case 'hypercall':
      return exit.nr;
    case 'ioapic-eoi':
      return exit.vector;
    case 'notify':
      return exit.flags;
    case 'unknown':
      return exit.reason;
    default:
      // All cases are above: a new type of exit is a compile error here.
      return exit satisfies never;
  }
}

export async function running(): Promise<void> {
  expectTypeOf(vcpu.run()).toEqualTypeOf<Promise<Exit>>();
  expectTypeOf(vcpu.run({ signal: AbortSignal.timeout(1) })).toEqualTypeOf<Promise<Exit>>();
  expectTypeOf(vcpu.runSync()).toEqualTypeOf<Exit>();
  expectTypeOf(vcpu.settle()).toEqualTypeOf<Exit | undefined>();
  for await (const exit of vcpu.exits()) expectTypeOf(exit).toEqualTypeOf<Exit>();
  // @ts-expect-error: milliseconds, not a signal, bound a synchronous run
  vcpu.runSync({ signal: AbortSignal.timeout(1) });
  // @ts-expect-error: a controller is not its signal
  vcpu.run({ signal: new AbortController() });
}

export function state(): void {
  expectTypeOf(vcpu.getRegs()).toEqualTypeOf<Regs>();
  expectTypeOf<Regs['rip']>().toEqualTypeOf<bigint>();
  vcpu.setRegs({ rip: 0x1000n });
  // @ts-expect-error: a register is a bigint
  vcpu.setRegs({ rip: 0x1000 });
  // @ts-expect-error: not a register of the 64-bit set
  vcpu.setRegs({ eip: 0x1000n });
  expectTypeOf<Sregs['cs']['base']>().toEqualTypeOf<bigint>();
  expectTypeOf<Sregs['cs']['selector']>().toEqualTypeOf<number>();
  vcpu.setSregs({ cs: { base: 0n }, cr0: 1n });
  // @ts-expect-error: a selector is a number
  vcpu.setSregs({ cs: { selector: 8n } });
  expectTypeOf(vcpu.getMsrs([0x10])).toEqualTypeOf<Map<number, bigint>>();
  vcpu.setMsrs(new Map([[0x10, 0n]]));
  // @ts-expect-error: an MSR's value is a bigint
  vcpu.setMsrs([[0x10, 0]]);
  expectTypeOf(vcpu.getCpuid()).toEqualTypeOf<CpuidEntry[]>();
  vcpu.setMpState(MP_STATE.halted);
  expectTypeOf(vcpu.getNestedState()).toEqualTypeOf<Uint8Array>();
  // @ts-expect-error: bytes, not a decoded structure
  vcpu.setNestedState({ flags: 0 });
  vcpu.setGuestDebug({ singleStep: true, breakpoints: [{ address: 0n, on: 'execute' }] });
  // @ts-expect-error: a debug register breaks on execution or access
  vcpu.setGuestDebug({ breakpoints: [{ address: 0n, on: 'jump' }] });
}

export function memory(): void {
  expectTypeOf(vm.memory.add({ gpa: 0, size: 4096 })).toEqualTypeOf<MemoryRegion>();
  vm.memory.add({ gpa: 0, size: 4096, backing: 'memfd', readOnly: true });
  vm.memory.add({ gpa: 0, size: 4096, backing: { type: 'hugetlb', pageSize: '1G' } });
  vm.memory.add({ gpa: 0, size: 4096, backing: { type: 'file', path: '/dev/mem', offset: 0 } });
  // @ts-expect-error: a size is needed
  vm.memory.add({ gpa: 0 });
  // @ts-expect-error: a guest-physical address is a number
  vm.memory.add({ gpa: 0n, size: 4096 });
  // @ts-expect-error: a file needs to be named
  vm.memory.add({ gpa: 0, size: 4096, backing: 'file' });
  // @ts-expect-error: huge pages have 2M or 1G
  vm.memory.add({ gpa: 0, size: 4096, backing: { type: 'hugetlb', pageSize: '4K' } });
  // @ts-expect-error: only a file has a path
  expectTypeOf<BackingSpec>({ type: 'memfd', path: '/x' });
  expectTypeOf(region.buffer).toEqualTypeOf<ArrayBuffer>();
  expectTypeOf(region.hva).toEqualTypeOf<bigint>();
  expectTypeOf(region.nodes()).toEqualTypeOf<Int32Array>();
  region.protect('read');
  // @ts-expect-error: not a protection of this library
  region.protect('execute');
}

export function devices(event: EventFd): void {
  vm.addIoeventfd(event, { port: 0x10, length: 1, match: 1n });
  vm.addIrqfd(event, 5, { resample: event });
  expectTypeOf(vm.irqchip).toEqualTypeOf<'none' | 'kernel' | 'split'>();
  vm.setGsiRouting([{ type: 'irqchip', gsi: 4, chip: 'ioapic', pin: 4 }]);
  // @ts-expect-error: an MSI route has no pin
  expectTypeOf<GsiRoute>({ type: 'msi', gsi: 4, address: 0n, data: 0, pin: 4 });
  // @ts-expect-error: not an interrupt controller of the kernel
  vm.getIrqchip('lapic');
  vcpu.setExitFilter([
    { type: 'io', direction: 'in', port: [0x10, 0x1f], answer: 0n },
    { type: 'mmio', isWrite: true, address: 0xd000_0000 },
  ]);
  // @ts-expect-error: a port rule says in or out
  expectTypeOf<ExitRule>({ type: 'io', port: 0x10 });
  // @ts-expect-error: a range has a first and a last
  expectTypeOf<ExitRule>({ type: 'mmio', isWrite: true, address: [1, 2, 3] });
}

export function steps(): void {
  expectTypeOf(runSteps(vcpu, [{ kind: 'run', port: 1 }], 3).times).toEqualTypeOf<Float64Array>();
  // @ts-expect-error: a run ends at a port
  expectTypeOf<Step>({ kind: 'run' });
  // @ts-expect-error: a move needs an address
  expectTypeOf<Step>({ kind: 'move', region });
}

export function errors(error: unknown): void {
  if (error instanceof KvmUnsupportedError) {
    expectTypeOf(error).toExtend<KvmError>();
    expectTypeOf(error.capability).toEqualTypeOf<string>();
  } else if (error instanceof KvmMsrError) {
    expectTypeOf(error.index).toEqualTypeOf<number>();
    // @ts-expect-error: MSRs are no capability
    error.capability;
  } else if (error instanceof KvmError) {
    expectTypeOf(error.errno).toEqualTypeOf<number>();
    expectTypeOf(error.request).toEqualTypeOf<string | undefined>();
    // @ts-expect-error: read-only
    error.code = 'EINVAL';
  } else if (error instanceof KvmClosedError) {
    expectTypeOf<(typeof error)['code']>().toEqualTypeOf<'ERR_KVM_CLOSED'>();
  } else if (error instanceof VcpuBusyError) {
    expectTypeOf<(typeof error)['code']>().toEqualTypeOf<'ERR_KVM_VCPU_BUSY'>();
  } else if (error instanceof KvmPendingExitError) {
    expectTypeOf(error.exit).toEqualTypeOf<Exit>();
  }
}
