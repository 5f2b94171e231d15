// SPDX-License-Identifier: Apache-2.0
import { readdirSync } from 'node:fs';
import { setImmediate } from 'node:timers/promises';
import { describe, expect } from 'vitest';
import { Kvm, KvmClosedError, KvmError } from '../../lib/kvm/index.ts';
import { native } from '../../lib/kvm/loader.ts';
import { hlt, load, spin, test, thrown } from './machine.ts';

const openFds = () => readdirSync('/proc/self/fd').length;
const threads = () => readdirSync('/proc/self/task').length;

describe('opening', () => {
  test('a device that is not there says what to do', () => {
    const error = thrown(() => Kvm.open('/nonexistent/kvm'));
    expect(error).toBeInstanceOf(KvmError);
    expect(error).toMatchObject({ code: 'ENOENT', errno: -2, syscall: 'open', request: '/nonexistent/kvm' });
    expect((error as Error).message).toMatch(/^ENOENT: cannot open \/nonexistent\/kvm: .*modprobe kvm_intel/);
  });

  test('a file that is not KVM is refused by the first ioctl', () => {
    expect(thrown(() => Kvm.open('/dev/null'))).toMatchObject({
      code: 'ENOTTY',
      request: 'KVM_GET_API_VERSION',
    });
    expect(() => Kvm.open(3 as never)).toThrow(TypeError);
  });
});

describe('closed handles', () => {
  test('throw KvmClosedError from every method, and close() again is silent', async ({ kvm, vm }) => {
    const vcpu = load(vm, hlt);
    vcpu.stats();
    vm.stats();
    kvm.close();
    for (const handle of [kvm, vm, vcpu]) handle.close();
    expect([kvm.closed, vm.closed, vcpu.state]).toEqual([true, true, 'closed']);
    const uses: (() => unknown)[] = [
      () => kvm.checkExtension(0),
      () => kvm.supportedCpuid(),
      () => kvm.createVm(),
      () => vm.checkExtension(0),
      () => vm.createVcpu(1),
      () => vm.stats(),
      () => vm.memory.add({ gpa: 0x9000, size: 0x1000 }),
      () => vcpu.getRegs(),
      () => vcpu.setRegs({}),
      () => vcpu.getNestedState(),
      () => vcpu.stats(),
      () => vcpu.runSync(),
    ];
    for (const use of uses) expect(use).toThrow(KvmClosedError);
    await expect(vcpu.run()).rejects.toThrow(KvmClosedError);
    vcpu.kick();
    expect(vcpu.runPage.byteLength).toBe(0);
  });

  test('using disposes in order', ({ kvm }) => {
    let outer: unknown;
    {
      using vm = kvm.createVm();
      using vcpu = vm.createVcpu(0);
      outer = [vm, vcpu];
    }
    const [vm, vcpu] = outer as [ReturnType<Kvm['createVm']>, { state: string }];
    expect([vm.closed, vcpu.state]).toEqual([true, 'closed']);
  });

  test('nothing is left: descriptors and threads are back to what they were', async ({ kvm }) => {
    const cycle = async (running: boolean) => {
      const vm = kvm.createVm();
      const vcpu = load(vm, spin);
      vcpu.stats();
      vm.stats();
      vm.memory.add({ gpa: 0x10000, size: 0x1000, backing: 'memfd' });
      const run = running ? vcpu.run() : undefined;
      vm.close();
      await expect(run ?? Promise.reject(new KvmClosedError('Vcpu'))).rejects.toThrow(KvmClosedError);
    };
    await cycle(false);
    await setImmediate();
    const before = [openFds(), threads()];
    for (let i = 0; i < 20; i++) await cycle(i % 2 === 0);
    expect([openFds(), threads()]).toEqual(before);
  });
});

describe('arguments', () => {
  test('of the wrong type or out of range have named errors', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const typeErrors: (() => unknown)[] = [
      () => vm.createVcpu('0' as never),
      () => vm.enableCap('KVM_CAP_NONSENSE' as never),
      () => vm.setTssAddr(1n as never),
      () => vm.signalMsi({ address: 1 as never, data: 0 }),
      () => vcpu.setRegs({ rip: 1 as never }),
      () => vcpu.setRegs({ eip: 1n } as never),
      () => vcpu.setSregs({ cs: { colour: 1 } } as never),
      () => vcpu.setSregs({ cr9: 1n } as never),
      () => vcpu.setNestedState('x' as never),
      () => vcpu.setMsrs([['0x10' as never, 1n]]),
      () => vcpu.setMsrs([[0x10, 1 as never]]),
      () => vcpu.setLapic(null as never),
      () => Object.getPrototypeOf(vcpu).getRegs.call({}),
      () => Object.getPrototypeOf(vm).createVcpu.call(vcpu, 1),
    ];
    for (const use of typeErrors) expect(use).toThrow(TypeError);
    const rangeErrors: (() => unknown)[] = [
      () => vm.createVcpu(-1),
      () => vm.createVcpu(2 ** 32),
      () => vm.setTssAddr(2 ** 32),
      () => vcpu.setRegs({ rip: -1n }),
      () => vcpu.setRegs({ rip: 1n << 64n }),
      () => vcpu.setSregs({ cs: { selector: 0x1_0000 } }),
      () => vcpu.setMsrs([[2 ** 32, 0n]]),
      () => vcpu.getNestedState(127),
      () => vcpu.setCpuid([{ function: -1, index: 0, flags: 0, eax: 0, ebx: 0, ecx: 0, edx: 0 }]),
      () => vm.enableCap(0, { args: [1n, 2n, 3n, 4n, 5n] }),
      () => vm.signalMsi({ address: 0n, data: 2 ** 32 }),
    ];
    for (const use of rangeErrors) expect(use).toThrow(RangeError);
  });

  test('the kernel refuses: the error names the request', ({ vm }) => {
    const vcpu = vm.createVcpu(0);
    expect(thrown(() => vm.createVcpu(0))).toMatchObject({
      code: 'EEXIST',
      errno: -17,
      request: 'KVM_CREATE_VCPU',
    });
    expect(thrown(() => vm.createIrqchip())).toMatchObject({ code: 'EINVAL', request: 'KVM_CREATE_IRQCHIP' });
    expect(thrown(() => vcpu.getLapic())).toMatchObject({ code: 'EINVAL', request: 'KVM_GET_LAPIC' });
    expect(thrown(() => vm.enableCap(0x7fff_ffff))).toMatchObject({
      code: 'EINVAL',
      request: 'KVM_ENABLE_CAP',
    });
    expect(thrown(() => vcpu.setSregs({ cr0: 1n << 40n }))).toMatchObject({ request: 'KVM_SET_SREGS' });
    expect(vm.vcpus).toEqual([vcpu]);
  });
});

describe('the addon itself', () => {
  test('takes only handles of the right kind, and enough bytes', () => {
    const addon = native();
    const system = addon.systemOpen('/dev/kvm');
    const vm = addon.systemCreateVm(system, 0);
    const vcpu = addon.vmCreateVcpu(vm, 0, () => {});
    const getRegs = addon.ioctls.vcpu['KVM_GET_REGS']!;
    for (const wrong of [vm, system, {}, null, undefined, 1, 'x', new Proxy(vcpu, {})]) {
      expect(() => addon.vcpuCalls(wrong as never, new ArrayBuffer(144))).toThrow(TypeError);
      expect(() => addon.vcpuSettle(wrong as never)).toThrow(TypeError);
    }
    expect(() => addon.vcpuCalls(vcpu, new ArrayBuffer(143))).toThrow(RangeError);
    expect(() => addon.vcpuCalls(vcpu, new Uint8Array(144) as never)).toThrow(TypeError);
    const calls = addon.vcpuCalls(vcpu, new ArrayBuffer(144));
    expect(() => calls.ioctl(getRegs, new Uint8Array(143))).toThrow(
      /^KVM_GET_REGS needs 144 bytes, the buffer has 143$/,
    );
    expect(() => calls.ioctl(getRegs, new Uint16Array(144) as never)).toThrow(TypeError);
    expect(() => calls.ioctl(getRegs)).toThrow(TypeError);
    expect(() => calls.ioctl(1e9, new Uint8Array(144))).toThrow(RangeError);
    expect(() => calls.ioctl(Number.NaN, new Uint8Array(144))).toThrow(RangeError);
    expect(() => calls.ioctl(addon.ioctls.vm['KVM_IRQ_LINE']!, new Uint8Array(144))).toThrow(TypeError);
    // The header claims more entries than there is room for.
    const msrs = new Uint8Array(8 + 16);
    msrs[0] = 2;
    expect(() => calls.ioctl(addon.ioctls.vcpu['KVM_GET_MSRS']!, msrs)).toThrow(
      /header claims 40 bytes, the buffer has 24/,
    );
    const nested = new Uint8Array(128);
    nested[5] = 2;
    expect(() => addon.vcpuSetNestedState(vcpu, nested)).toThrow(
      /header claims 512 bytes, the buffer has 128/,
    );
    expect(() => addon.vmCreateVcpu(vm, 1, undefined as never)).toThrow(TypeError);
    expect(() => addon.vmReadStats(vm, new BigUint64Array(1))).toThrow(RangeError);
    expect(() => addon.vmCalls(vcpu as never)).toThrow(/argument 0 is not a Vm handle/);
    const memory = addon.vmCalls(vm);
    expect(() => memory.region(3)).toThrow(KvmClosedError);
    expect(() => memory.removeMemory(3)).toThrow(KvmClosedError);
    expect(memory.addMemory(3, 0, 0x1000, 0, undefined)).toBe(3);
    const region = memory.region(3);
    expect(addon.regionHva(region)).toBe(addon.regionHva(memory.region(3)));
    memory.removeMemory(3);
    expect(() => addon.regionHva(region)).toThrow(KvmClosedError);
    expect(memory.addMemory(3, 0, 0x1000, 0, undefined)).toBe(3);
    expect(() => addon.regionHva(region)).toThrow(KvmClosedError);
    expect(() => memory.removeMemory(-1)).toThrow(RangeError);
    expect(() => memory.region(undefined as never)).toThrow(TypeError);
    addon.systemClose(system);
    expect(() => memory.addMemory(4, 0x1000, 0x1000, 0, undefined)).toThrow(KvmClosedError);
    expect(() => memory.removeMemory(3)).toThrow(KvmClosedError);
    expect(() => calls.ioctl(getRegs, new Uint8Array(144))).toThrow(KvmClosedError);
  });
});
