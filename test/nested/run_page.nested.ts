// SPDX-License-Identifier: Apache-2.0
// What userspace and KVM tell each other in struct kvm_run besides the exit itself, and what userspace injects. No L2:
// these are here because a software backend of /dev/kvm does not have them all, and a real kvm_intel does.
import assert from 'node:assert/strict';
import { type TestContext, test } from 'node:test';
import { Kvm, SYNC, type Vm } from '../../lib/kvm/index.ts';
import {
  cli,
  expectOut,
  HANDLER_PORT,
  hlt,
  load,
  nop,
  out,
  rdmsr,
  run,
  spin,
  sti,
  vmcall,
  wrmsr,
} from './real_mode.ts';

function onVm(name: string, body: (vm: Vm, kvm: Kvm, context: TestContext) => unknown): void {
  test(name, async (context) => {
    using kvm = Kvm.open();
    using vm = kvm.createVm();
    await body(vm, kvm, context);
  });
}

onVm('an interrupt window opens when the guest can take an interrupt, which then comes', (vm) => {
  const vcpu = load(vm, [cli, ...out(1), sti, nop, nop, hlt], [0x20]);
  const { kvmRun } = vcpu;
  expectOut(run(vcpu), 1);
  assert.deepEqual([kvmRun.ifFlag, kvmRun.readyForInterruptInjection], [false, false]);
  kvmRun.requestInterruptWindow = true;
  assert.deepEqual(run(vcpu), { type: 'irq-window-open' });
  assert.deepEqual([kvmRun.ifFlag, kvmRun.readyForInterruptInjection, kvmRun.exitReason], [true, true, 7]);
  assert.equal(kvmRun.requestInterruptWindow, true);
  kvmRun.requestInterruptWindow = false;
  vcpu.injectInterrupt(0x20);
  expectOut(run(vcpu), HANDLER_PORT);
  assert.deepEqual(run(vcpu), { type: 'hlt' });
  assert.throws(() => vcpu.injectInterrupt(256), RangeError);
});

onVm('an NMI is taken whatever RFLAGS.IF is, and masks others until IRET', (vm) => {
  const vcpu = load(vm, [cli, ...out(1), nop, hlt], [2]);
  expectOut(run(vcpu), 1);
  vcpu.injectNmi();
  assert.deepEqual(vcpu.getEvents().nmi, { injected: 0, pending: 1, masked: 0 });
  expectOut(run(vcpu), HANDLER_PORT);
  assert.deepEqual(vcpu.getEvents().nmi, { injected: 0, pending: 0, masked: 1 });
  assert.deepEqual(run(vcpu), { type: 'hlt' });
  assert.equal(vcpu.getEvents().nmi.masked, 0);
});

onVm('RDMSR and WRMSR of an MSR that KVM does not know are answered, or #GP', (vm) => {
  const index = 0x1234_5678;
  const why = 2;
  vm.enableCap('KVM_CAP_X86_USER_SPACE_MSR', { args: [BigInt(why)] });
  const vcpu = load(vm, [...rdmsr, ...out(1), ...wrmsr, ...out(2), ...rdmsr, hlt], [13]);
  vcpu.setRegs({ rcx: BigInt(index) });
  assert.deepEqual(run(vcpu), { type: 'rdmsr', index, why });
  vcpu.kvmRun.answerMsr(0x1122_3344_5566_775an);
  expectOut(run(vcpu), 1, 0x5a);
  const { rax, rdx } = vcpu.getRegs();
  assert.deepEqual([rax, rdx], [0x5566_775an, 0x1122_3344n]);
  assert.deepEqual(run(vcpu), { type: 'wrmsr', index, why, value: 0x1122_3344_5566_775an });
  vcpu.kvmRun.answerMsr(0n);
  expectOut(run(vcpu), 2);
  assert.deepEqual(run(vcpu), { type: 'rdmsr', index, why });
  vcpu.kvmRun.answerMsr(undefined);
  expectOut(run(vcpu), HANDLER_PORT);
  assert.throws(() => vcpu.kvmRun.answerMsr(-1n), RangeError);
});

onVm('a hypercall that userspace asked for is answered', (vm) => {
  const MAP_GPA_RANGE = 12;
  vm.enableCap('KVM_CAP_EXIT_HYPERCALL', { args: [1n << BigInt(MAP_GPA_RANGE)] });
  const vcpu = load(vm, [...vmcall, ...out(1), hlt]);
  vcpu.setRegs({ rax: BigInt(MAP_GPA_RANGE), rbx: 0x3000n, rcx: 2n, rdx: 0x10n });
  const exit = run(vcpu);
  assert(exit.type === 'hypercall');
  assert.deepEqual([exit.nr, ...exit.args.slice(0, 3)], [12n, 0x3000n, 2n, 0x10n]);
  vcpu.kvmRun.answerHypercall(0x5cn);
  expectOut(run(vcpu), 1, 0x5c);
});

onVm('synchronised special registers and events go in without a call', (vm) => {
  const vcpu = load(vm, [...out(1), ...out(2), hlt], [2]);
  const { kvmRun } = vcpu;
  kvmRun.validRegs = SYNC.sregs | SYNC.events;
  expectOut(run(vcpu), 1);
  kvmRun.setSyncSregs({ cr2: 0x1234_5000n, gs: { base: 0x7000n } });
  kvmRun.setSyncEvents({ nmi: { injected: 0, pending: 1, masked: 0 }, flags: 1 });
  assert.equal(kvmRun.dirtyRegs, SYNC.sregs | SYNC.events);
  // The NMI that was put there comes before the second OUT
  expectOut(run(vcpu), HANDLER_PORT);
  assert.equal(kvmRun.dirtyRegs, 0);
  const { cr2, gs } = vcpu.getSregs();
  assert.deepEqual([cr2, gs.base], [0x1234_5000n, 0x7000n]);
  assert.deepEqual([kvmRun.syncSregs.cr2, kvmRun.syncEvents.nmi.masked], [0x1234_5000n, 1]);
  expectOut(run(vcpu), 2);
});

onVm('CR8, the APIC’s base and immediate_exit are in the page', async (vm) => {
  const vcpu = load(vm, [...out(1), ...spin]);
  const { kvmRun } = vcpu;
  vcpu.setSregs({ cr8: 5n, apicBase: 0xfee0_0900n });
  assert.equal(kvmRun.cr8, 5n);
  expectOut(run(vcpu), 1);
  assert.deepEqual([kvmRun.cr8, kvmRun.apicBase, kvmRun.immediateExit], [5n, 0xfee0_0900n, false]);
  const running = vcpu.run();
  vcpu.kick();
  assert.deepEqual(await running, { type: 'interrupted' });
  assert.equal(kvmRun.immediateExit, true);
  vcpu.settle();
  assert.equal(kvmRun.immediateExit, false);
});

onVm('notifyPaused tells a guest that has a kvmclock', (vm) => {
  const SYSTEM_TIME = 0x4b56_4d01;
  const [CLOCK, FLAGS_AT, STOPPED] = [0x1800, 29, 2];
  const vcpu = load(vm, [...out(1), ...out(2), hlt]);
  const flags = () => vm.memory.read(CLOCK + FLAGS_AT, 1)[0]! & STOPPED;
  assert.throws(() => vcpu.notifyPaused(), { code: 'EINVAL', request: 'KVM_KVMCLOCK_CTRL' });
  vcpu.setMsrs([[SYSTEM_TIME, BigInt(CLOCK | 1)]]);
  expectOut(run(vcpu), 1);
  assert.equal(flags(), 0);
  vcpu.notifyPaused();
  expectOut(run(vcpu), 2);
  assert.equal(flags(), STOPPED);
});

onVm('an identity map’s address is taken until there is a vCPU', (vm) => {
  vm.setIdentityMapAddr(0xfffb_c000);
  vm.setIdentityMapAddr(0);
  const request = 'KVM_SET_IDENTITY_MAP_ADDR';
  assert.deepEqual(vm.setup, [
    { request, argument: Uint8Array.of(0, 0xc0, 0xfb, 0xff, 0, 0, 0, 0) },
    { request, argument: new Uint8Array(8) },
  ]);
  vm.createVcpu(0);
  assert.throws(() => vm.setIdentityMapAddr(0xfffb_c000), { name: 'KvmError', code: 'EINVAL', request });
  assert.throws(() => vm.setIdentityMapAddr(-1), RangeError);
});

onVm('Hyper-V’s CPUID says so, and a vCPU’s has its eVMCS', (vm, kvm) => {
  const signature = 'Linux KVM Hv';
  const [NESTED_FEATURES, VENDOR] = [0x4000_000a, 0x4000_0000];
  const vcpu = vm.createVcpu(0);
  const leaf = (entries: ReturnType<Kvm['supportedHvCpuid']>, number: number) =>
    entries.find((entry) => entry.function === number);
  const text = (entry: { ebx: number; ecx: number; edx: number } | undefined) =>
    Buffer.from(Uint32Array.of(entry!.ebx, entry!.ecx, entry!.edx).buffer).toString('latin1');
  for (const entries of [kvm.supportedHvCpuid(), vcpu.supportedHvCpuid()])
    assert.equal(text(leaf(entries, VENDOR)), signature);
  const versions = () => leaf(vcpu.supportedHvCpuid(), NESTED_FEATURES)!.eax & 0xffff;
  const before = versions();
  assert.equal(vcpu.enableEnlightenedVmcs(), 0x0101);
  assert.deepEqual([before, versions()], [0, 0x0101]);
});
