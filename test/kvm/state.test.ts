// SPDX-License-Identifier: Apache-2.0
import { describe, expect } from 'vitest';
import { decodeSregs, patchSregs, SREGS_SIZE } from '../../lib/kvm/abi/regs.ts';
import {
  KvmMsrError,
  KvmUnsupportedError,
  MP_STATE,
  type Register,
  type Regs,
  VCPUEVENT_VALID,
} from '../../lib/kvm/index.ts';
import { hlt, load, movAl, outAl, spin, test } from './machine.ts';

describe('system', () => {
  test('version, capabilities, MSR lists', ({ kvm, vm }) => {
    expect(kvm.apiVersion).toBe(12);
    expect(kvm.checkExtension('KVM_CAP_USER_MEMORY')).toBe(1);
    expect(kvm.checkExtension(3)).toBe(1);
    expect(vm.checkExtension('KVM_CAP_NR_MEMSLOTS')).toBeGreaterThan(31);
    expect(() => kvm.checkExtension('KVM_CAP_TEA' as never)).toThrow(/unknown capability KVM_CAP_TEA/);
    expect(() => kvm.checkExtension(-1)).toThrow(RangeError);
  });

  test('every feature MSR can be read', ({ kvm }) => {
    const indices = kvm.featureMsrIndices();
    expect([...kvm.readFeatureMsrs(indices).keys()]).toEqual(indices);
    expect(new Set(kvm.msrIndices()).has(0x174)).toBe(true);
  });

  test('a feature MSR that is none is named', ({ kvm }) => {
    expect(() => kvm.readFeatureMsrs([0xdead_beef])).toThrow(KvmMsrError);
    expect(() => kvm.readFeatureMsrs([0xdead_beef])).toThrow(
      /KVM_GET_MSRS refused MSR 0xdeadbeef after 0 others/,
    );
  });

  test('supported CPUID has the vendor leaf', ({ kvm }) => {
    const leaf0 = kvm.supportedCpuid().find((entry) => entry.function === 0);
    const text = Buffer.from(new Uint32Array([leaf0!.ebx, leaf0!.edx, leaf0!.ecx]).buffer).toString();
    expect(text).toMatch(/^(GenuineIntel|AuthenticAMD|HygonGenuine|CentaurHauls)$/);
  });
});

describe('vCPU state', () => {
  test('registers', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const all = Object.fromEntries(
      Object.keys(vcpu.getRegs()).map((name, i) => [name, BigInt(i + 1) << 40n]),
    );
    vcpu.setRegs({ ...all, rflags: 0x202n });
    expect(vcpu.getRegs()).toEqual({ ...all, rflags: 0x202n });
    vcpu.setRegs({ rbx: 0xffff_ffff_ffff_ffffn });
    expect(vcpu.getRegs()).toEqual({ ...all, rbx: 0xffff_ffff_ffff_ffffn, rflags: 0x202n });
  });

  test('all registers at once, each its own, and none when one is wrong', ({ vm }) => {
    const vcpu = vm.createVcpu(0);
    const names = Object.keys(vcpu.getRegs()) as Register[];
    expect(names.length).toBe(18);
    const wanted = Object.fromEntries(names.map((name, i) => [name, (1n << 64n) - 1n - BigInt(i)])) as Regs;
    // RFLAGS has fixed bits.
    wanted.rflags = 0x246n;
    vcpu.setRegs(wanted);
    expect(vcpu.getRegs()).toEqual(wanted);
    for (const wrong of [
      { ...wanted, rax: 1n, r15: 1n << 64n },
      { ...wanted, rax: 1n, rflags: -1n },
      { ...wanted, rax: 1n, rip: 5 },
      { ...wanted, rax: 1n, eip: 5n },
    ]) {
      expect(() => vcpu.setRegs(wrong as Regs)).toThrow(/r15|rflags|rip|eip/);
    }
    expect(vcpu.getRegs()).toEqual(wanted);
  });

  test('special registers, segments in part', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const before = vcpu.getSregs();
    vcpu.setSregs({ gs: { base: 0x12340n, selector: 0x1234 }, gdt: { base: 0x5000n, limit: 0x27 }, cr8: 3n });
    expect(vcpu.getSregs()).toEqual({
      ...before,
      gs: { ...before.gs, base: 0x12340n, selector: 0x1234 },
      gdt: { base: 0x5000n, limit: 0x27 },
      cr8: 3n,
    });
  });

  test('a segment is struct kvm_segment, its fields in their places', () => {
    const bytes = new Uint8Array(SREGS_SIZE);
    const ds = { base: 0x1122n, limit: 0x3344_5566, selector: 0x7788, type: 1, present: 2, dpl: 3 };
    const rest = { db: 4, s: 5, l: 6, g: 7, avl: 8, unusable: 9 };
    patchSregs(bytes, { ds: { ...ds, ...rest } });
    expect(Buffer.from(bytes).toString('hex', 24, 48)).toBe(
      '221100000000000066554433887701020304050607080900',
    );
    expect(decodeSregs(bytes).ds).toEqual({ ...ds, ...rest });
    const refused = (patch: object) => () => patchSregs(bytes, { ds: patch });
    expect(refused({ type: 256 })).toThrow('ds.type must be an integer from 0 to 255, not 256');
    expect(refused({ limit: -1 })).toThrow('ds.limit must be an integer from 0 to 4294967295, not -1');
    expect(refused({ g: '1' })).toThrow('ds.g must be a number, not string');
    expect(refused({ dpk: 0 })).toThrow('ds.dpk is not a field of a segment');
  });

  test('CR8 set here survives a run', async ({ vm }) => {
    const vcpu = load(vm, hlt);
    vcpu.setSregs({ cr8: 5n });
    await vcpu.run();
    expect(vcpu.getSregs().cr8).toBe(5n);
  });

  test('MSRs, also more than the kernel takes at once', ({ vm }) => {
    const vcpu = load(vm, hlt);
    vcpu.setMsrs([
      [0x174, 0x10n],
      [0x175, 0xffff_8000_1234_5678n],
    ]);
    expect(vcpu.getMsrs([0x175, 0x174])).toEqual(
      new Map([
        [0x175, 0xffff_8000_1234_5678n],
        [0x174, 0x10n],
      ]),
    );
    const many = Array.from({ length: 600 }, (_, i) => 0x174 + (i & 1));
    expect(vcpu.getMsrs(many).size).toBe(2);
    const refused = () => vcpu.setMsrs([...many.map((index) => [index, 1n] as const), [0xdead_beef, 1n]]);
    expect(refused).toThrow(/refused MSR 0xdeadbeef after 600 others/);
    expect(vcpu.getMsrs([0x175]).get(0x175)).toBe(1n);
  });

  test('CPUID', ({ kvm, vm }) => {
    const vcpu = vm.createVcpu(0);
    expect(vcpu.getCpuid()).toEqual([]);
    const supported = kvm.supportedCpuid();
    vcpu.setCpuid(supported);
    expect(vcpu.getCpuid().map((entry) => [entry.function, entry.index])).toEqual(
      supported.map((entry) => [entry.function, entry.index]),
    );
    vcpu.setCpuid([{ function: 0x4000_0123, index: 0, flags: 0, eax: 1, ebx: 0xffff_ffff, ecx: 3, edx: 4 }]);
    expect(vcpu.getCpuid()).toEqual([
      { function: 0x4000_0123, index: 0, flags: 0, eax: 1, ebx: 0xffff_ffff, ecx: 3, edx: 4 },
    ]);
  });

  test('events', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const before = vcpu.getEvents();
    vcpu.setEvents({
      nmi: { masked: 1 },
      exception: { injected: 1, nr: 6 },
      flags: VCPUEVENT_VALID.nmiPending,
    });
    const after = vcpu.getEvents();
    expect(after.nmi).toEqual({ ...before.nmi, masked: 1 });
    expect([after.exception.injected, after.exception.nr]).toEqual([1, 6]);
  });

  test('LAPIC and MP state with an in-kernel irqchip', ({ vm }) => {
    vm.createIrqchip();
    const vcpus = [vm.createVcpu(0), vm.createVcpu(1)] as const;
    expect(vcpus.map((vcpu) => vcpu.getMpState())).toEqual([MP_STATE.runnable, MP_STATE.uninitialized]);
    vcpus[1].setMpState(MP_STATE.runnable);
    expect(vcpus[1].getMpState()).toBe(MP_STATE.runnable);
    const lapic = vcpus[0].getLapic();
    expect(lapic.length).toBe(1024);
    lapic[0x80] = 0x30;
    vcpus[0].setLapic(lapic);
    expect(vcpus[0].getLapic()[0x80]).toBe(0x30);
    expect(() => vcpus[0].setLapic(new Uint8Array(4))).toThrow(RangeError);
  });

  test('nested state names the missing capability, or is a header', ({ vm }) => {
    const vcpu = load(vm, hlt);
    expect(() => vcpu.setNestedState(new Uint8Array(127))).toThrow(RangeError);
    if (vm.checkExtension('KVM_CAP_NESTED_STATE') > 0) {
      const state = vcpu.getNestedState();
      expect(state.length).toBe(128);
      vcpu.setNestedState(state);
      return;
    }
    const header = new Uint8Array(128);
    new DataView(header.buffer).setUint32(4, 128, true);
    for (const call of [() => vcpu.getNestedState(), () => vcpu.setNestedState(header)]) {
      expect(call).toThrow(KvmUnsupportedError);
      expect(call).toThrow(/^KVM_[GS]ET_NESTED_STATE needs KVM_CAP_NESTED_STATE/);
    }
    // With an explicit size the kernel itself is asked.
    expect(() => vcpu.getNestedState(128)).toThrow(/EINVAL: the kernel refused ioctl KVM_GET_NESTED_STATE/);
  });

  test('enlightened VMCS: its version, or the request that was refused', ({ kvm, vm }) => {
    const vcpu = vm.createVcpu(0);
    if (kvm.checkExtension('KVM_CAP_HYPERV_ENLIGHTENED_VMCS') > 0) {
      expect(vcpu.enableEnlightenedVmcs() & 0xff).toBe(1);
    } else {
      expect(() => vcpu.enableEnlightenedVmcs()).toThrow(/refused ioctl KVM_ENABLE_CAP|needs KVM_CAP_/);
    }
  });
});

describe('statistics', () => {
  test('count halts and signals exactly', async ({ vm, skip }) => {
    const vcpu = load(vm, [...movAl(1), ...outAl(0x10), ...hlt]);
    if (vm.checkExtension('KVM_CAP_BINARY_STATS_FD') === 0) skip('no KVM_CAP_BINARY_STATS_FD');
    const count = (name: string) => vcpu.stats().get(name);
    const before = [count('halt_exits'), count('signal_exits')] as [bigint, bigint];
    for (let round = 0; round < 3; round++) {
      vcpu.setRegs({ rip: 0x1000n });
      expect(await vcpu.run()).toMatchObject({ type: 'io' });
      expect(await vcpu.run()).toEqual({ type: 'hlt' });
    }
    vm.memory.write(0x1000, Uint8Array.from(spin));
    vcpu.setRegs({ rip: 0x1000n });
    const run = vcpu.run();
    await new Promise((resolve) => setTimeout(resolve, 20));
    // Open descriptors can be read while the guest runs.
    expect(count('halt_exits')).toBe(before[0] + 3n);
    vcpu.kick();
    await run;
    expect([count('halt_exits'), count('signal_exits')]).toEqual([before[0] + 3n, before[1] + 1n]);
  });

  test('a histogram is an array, a VM has its own names', ({ vm, skip }) => {
    const vcpu = load(vm, hlt);
    if (vm.checkExtension('KVM_CAP_BINARY_STATS_FD') === 0) skip('no KVM_CAP_BINARY_STATS_FD');
    expect(vcpu.stats().get('halt_poll_success_hist')).toEqual(Array.from({ length: 32 }, () => 0n));
    expect(vm.stats().get('remote_tlb_flush')).toBeTypeOf('bigint');
    expect(vm.stats().has('halt_exits')).toBe(false);
  });
});
