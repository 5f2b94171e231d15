// SPDX-License-Identifier: Apache-2.0
import { describe, expect } from 'vitest';
import { KvmClosedError, SYNC, VcpuBusyError } from '../../lib/kvm/index.ts';
import { hlt, inAl, load, movAl, outAl, spin, storeAl, test, thrown } from './machine.ts';

const nop = [0x90];

describe('vCPU state', () => {
  test('special registers, second form', ({ vm, skip }) => {
    const vcpu = load(vm, hlt);
    if (vm.checkExtension('KVM_CAP_SREGS2') === 0) skip('no KVM_CAP_SREGS2');
    const before = vcpu.getSregs2();
    const { interruptBitmap, ...common } = vcpu.getSregs();
    expect(interruptBitmap).toEqual([0n, 0n, 0n, 0n]);
    expect(before).toEqual({ ...common, flags: 0n, pdptrs: [0n, 0n, 0n, 0n] });
    vcpu.setSregs2({ fs: { base: 0x777000n }, cr2: 0x1234n });
    expect(vcpu.getSregs2()).toEqual({ ...before, fs: { ...before.fs, base: 0x777000n }, cr2: 0x1234n });
    expect(() => vcpu.setSregs2({ interruptBitmap: [] } as never)).toThrow(TypeError);
    expect(() => vcpu.setSregs2({ pdptrs: [1n] })).toThrow(RangeError);
  });

  test('FPU: each field stands alone', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const before = vcpu.getFpu();
    const register = (seed: number) => Uint8Array.from({ length: 16 }, (_, at) => seed + at);
    const st = before.st.map((_, index) => register(index + 1).fill(0, 10));
    const xmm = before.xmm.map((_, index) => register(index + 100));
    const changed = { ...before, st, xmm, fcw: 0x27f, fsw: 0x3800, ftw: 0x81 };
    vcpu.setFpu({ st, xmm, fcw: 0x27f, fsw: 0x3800, ftw: 0x81 });
    expect(vcpu.getFpu()).toEqual(changed);
    expect(() => vcpu.setFpu({ xmm: [] })).toThrow(RangeError);
    expect(() => vcpu.setFpu({ st: st.map(() => new Uint8Array(4)) })).toThrow(RangeError);
    expect(() => vcpu.setFpu({ fcw: 0x10000 })).toThrow(RangeError);
  });

  test('XSAVE has the FPU’s registers where the SDM says', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const area = vcpu.getXsave();
    expect(area.length).toBeGreaterThanOrEqual(4096);
    // The legacy region: XMM0 at 160; XSTATE_BV at 512.
    for (let index = 0; index < 16; index++) area.fill(index + 1, 160 + index * 16, 176 + index * 16);
    area[512]! |= 3;
    vcpu.setXsave(area);
    expect(vcpu.getXsave()).toEqual(area);
    expect(vcpu.getFpu().xmm).toEqual(
      Array.from({ length: 16 }, (_, index) => new Uint8Array(16).fill(index + 1)),
    );
    expect(() => vcpu.setXsave(new Uint8Array(4095))).toThrow(RangeError);
  });

  test('XCR0', ({ kvm, vm }) => {
    const vcpu = vm.createVcpu(0);
    vcpu.setCpuid(kvm.supportedCpuid());
    expect(vcpu.getXcrs()).toEqual(new Map([[0, 1n]]));
    vcpu.setXcrs([[0, 3n]]);
    expect(vcpu.getXcrs()).toEqual(new Map([[0, 3n]]));
    expect(thrown(() => vcpu.setXcrs([[0, 2n]]))).toMatchObject({ code: 'EINVAL', request: 'KVM_SET_XCRS' });
    expect(() => vcpu.setXcrs([5] as never)).toThrow(TypeError);
  });

  test('debug registers', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const db = [0x1000n, 0x2000n, 0x3000n, 0x4000n];
    vcpu.setDebugRegs({ db });
    expect(vcpu.getDebugRegs().db).toEqual(db);
    vcpu.setDebugRegs({ dr7: 0x402n });
    expect(vcpu.getDebugRegs()).toMatchObject({ db, dr7: 0x402n });
    expect(() => vcpu.setDebugRegs({ db: [1n] })).toThrow(RangeError);
  });

  test('TSC frequency, translation without paging, raw requests', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const khz = vcpu.getTscKhz();
    expect(khz).toBeGreaterThan(100_000);
    vcpu.setTscKhz(khz);
    expect(vcpu.translate(0x1000n)).toMatchObject({ valid: true, physical: 0x1000n });
    const regs = new Uint8Array(144);
    expect(vcpu.ioctl('KVM_GET_REGS', regs)).toBe(0);
    expect(new BigUint64Array(regs.buffer)[16]).toBe(0x1000n);
    expect(() => vcpu.ioctl('KVM_MAKE_TEA')).toThrow(TypeError);
    expect(() => vcpu.ioctl('KVM_GET_REGS')).toThrow(TypeError);
    expect(() => vm.ioctl('KVM_GET_REGS', regs)).toThrow(TypeError);
    expect(() => vcpu.enableCap('KVM_CAP_HYPERV_ENLIGHTENED_VMCS', { args: [0x1000n] })).toThrow(
      /use enableEnlightenedVmcs\(\)/,
    );
  });

  test('an SMI, where KVM has SMM', ({ vm }) => {
    const vcpu = load(vm, hlt);
    if (vm.checkExtension('KVM_CAP_X86_SMM') > 0) {
      vcpu.injectSmi();
      expect(vcpu.getEvents().smi.pending).toBe(1);
    } else {
      expect(() => vcpu.injectSmi()).toThrow(/KVM_SMI/);
    }
  });
});

describe('guest debugging', () => {
  test('single steps stop after each instruction', async ({ vm, skip }) => {
    const vcpu = load(vm, [...nop, ...movAl(1), ...nop, ...hlt]);
    if (vm.checkExtension('KVM_CAP_SET_GUEST_DEBUG') === 0) skip('no KVM_CAP_SET_GUEST_DEBUG');
    vcpu.setGuestDebug({ singleStep: true });
    const stops: bigint[] = [];
    for (let step = 0; step < 3; step++) {
      const exit = await vcpu.run();
      expect(exit).toMatchObject({ type: 'debug', exception: 1 });
      if (exit.type === 'debug') stops.push(exit.pc);
    }
    expect(stops).toEqual([0x1001n, 0x1003n, 0x1004n]);
    vcpu.setGuestDebug({});
    expect(await vcpu.run()).toEqual({ type: 'hlt' });
  });

  test('a hardware breakpoint stops before its instruction, a watchpoint after the write', async ({
    vm,
    skip,
  }) => {
    const vcpu = load(vm, [...nop, ...movAl(1), ...storeAl(0x1800), ...nop, ...hlt]);
    if (vm.checkExtension('KVM_CAP_SET_GUEST_DEBUG') === 0) skip('no KVM_CAP_SET_GUEST_DEBUG');
    vcpu.setGuestDebug({ breakpoints: [{ address: 0x1003n }] });
    const exit = await vcpu.run();
    if (exit.type === 'hlt') skip('this backend emulates the guest without hardware breakpoints');
    expect(exit).toMatchObject({ type: 'debug', exception: 1, pc: 0x1003n });
    expect(exit.type === 'debug' && exit.dr6 & 0xfn).toBe(1n);
    vcpu.setGuestDebug({ breakpoints: [{ address: 0x9000n }, { address: 0x1800n, on: 'write', length: 1 }] });
    const watch = await vcpu.run();
    if (watch.type === 'hlt') skip('this backend emulates the guest without watchpoints');
    expect(watch).toMatchObject({ type: 'debug', exception: 1, pc: 0x1006n });
    expect(watch.type === 'debug' && watch.dr6 & 0xfn).toBe(2n);
  });

  test('what no CPU can do is refused', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const address = 0n;
    expect(() => vcpu.setGuestDebug({ breakpoints: Array.from({ length: 5 }, () => ({ address })) })).toThrow(
      RangeError,
    );
    expect(() => vcpu.setGuestDebug({ breakpoints: [{ address, length: 3 as never }] })).toThrow(RangeError);
    expect(() => vcpu.setGuestDebug({ breakpoints: [{ address, on: 'breakfast' as never }] })).toThrow(
      TypeError,
    );
  });
});

describe('kvm_run', () => {
  test('carries registers out and in without a call', async ({ vm, skip }) => {
    const vcpu = load(vm, [...movAl(0x42), ...outAl(1), ...outAl(2), ...hlt]);
    if ((vm.checkExtension('KVM_CAP_SYNC_REGS') & 7) !== 7) skip('no KVM_CAP_SYNC_REGS');
    const { kvmRun } = vcpu;
    kvmRun.validRegs = SYNC.regs | SYNC.sregs | SYNC.events;
    expect(await vcpu.run()).toMatchObject({ port: 1 });
    expect(kvmRun.exitReason).toBe(2);
    expect(kvmRun.syncRegs).toEqual(vcpu.getRegs());
    expect(kvmRun.syncSregs).toEqual(vcpu.getSregs());
    expect(kvmRun.syncEvents).toEqual(vcpu.getEvents());
    kvmRun.setSyncRegs({ rax: 0x99n });
    expect(kvmRun.dirtyRegs).toBe(SYNC.regs);
    expect(await vcpu.run()).toMatchObject({ port: 2, data: Uint8Array.of(0x99) });
    expect(kvmRun.dirtyRegs).toBe(0);
    vcpu.close();
    expect(() => kvmRun.exitReason).toThrow(TypeError);
  });
});

describe('exits', () => {
  test('in a loop, until the loop is left', async ({ vm }) => {
    const vcpu = load(vm, [...movAl(1), ...outAl(1), ...inAl(2), ...outAl(3), ...hlt]);
    const seen: unknown[] = [];
    for await (const exit of vcpu.exits()) {
      if (exit.type === 'io' && exit.direction === 'in') exit.data[0] = 0x66;
      seen.push(exit.type === 'io' ? [exit.port, exit.data[0]] : exit.type);
      if (exit.type === 'hlt') break;
    }
    expect(seen).toEqual([[1, 1], [2, 0x66], [3, 0x66], 'hlt']);
    vcpu.setRegs({ rip: 0x1000n });
    vm.memory.write(0x1000, Uint8Array.from(spin));
    const signal = AbortSignal.timeout(20);
    await expect(vcpu.exits({ signal }).next()).rejects.toThrow(/timeout/);
    await expect(vcpu.run({ signal: 5 as never })).rejects.toThrow(TypeError);
  });

  test('runSync with a limit ends a guest that never exits', ({ vm }) => {
    const vcpu = load(vm, [...outAl(1), ...spin]);
    expect(vcpu.runSync({ timeoutMs: 5000 })).toMatchObject({ type: 'io', port: 1 });
    expect(vcpu.runSync({ timeoutMs: 20 })).toEqual({ type: 'interrupted' });
    expect(vcpu.runSync({ timeoutMs: 0 })).toEqual({ type: 'interrupted' });
    expect(vcpu.state).toBe('idle');
    expect(() => vcpu.runSync({ timeoutMs: -1 })).toThrow(RangeError);
  });

  test('settle() completes an access and enters no guest', ({ vm }) => {
    const vcpu = load(vm, [...inAl(2), ...outAl(3), ...hlt]);
    const exit = vcpu.runSync();
    if (exit.type === 'io') exit.data[0] = 0x5c;
    expect(vcpu.getRegs().rip).toBe(0x1000n);
    expect(vcpu.settle()).toBeUndefined();
    expect([vcpu.getRegs().rip, vcpu.getRegs().rax & 0xffn]).toEqual([0x1002n, 0x5cn]);
    expect(vcpu.runSync()).toMatchObject({ port: 3, data: Uint8Array.of(0x5c) });
  });

  test('the filter answers and counts its exits, and gives the others', async ({ vm }) => {
    const mmioRead = [0xa0, 0x00, 0x90];
    const vcpu = load(vm, [
      ...inAl(0x20),
      ...outAl(0x21),
      ...outAl(0x22),
      ...mmioRead,
      ...storeAl(0x9001),
      ...outAl(0x40),
      ...hlt,
    ]);
    vcpu.setExitFilter([
      { type: 'io', direction: 'in', port: 0x20, answer: 0x77n },
      { type: 'io', direction: 'out', port: [0x21, 0x22] },
      { type: 'mmio', isWrite: false, address: 0x9000, answer: 0xabn },
      { type: 'mmio', isWrite: true, address: [0x9000, 0x9fff] },
    ]);
    expect(await vcpu.run()).toMatchObject({ type: 'io', port: 0x40, data: Uint8Array.of(0xab) });
    expect(vcpu.exitCounts()).toEqual([1n, 2n, 1n, 1n]);
    expect(vcpu.runSync()).toEqual({ type: 'hlt' });
    vcpu.setExitFilter([]);
    expect(vcpu.exitCounts()).toEqual([]);
    vcpu.setRegs({ rip: 0x1000n });
    expect(vcpu.runSync()).toMatchObject({ port: 0x20 });
    for (const rule of [{ type: 'tea' }, { type: 'io', direction: 'up', port: 1 }, 5]) {
      expect(() => vcpu.setExitFilter([rule as never])).toThrow(TypeError);
    }
    expect(() => vcpu.setExitFilter([{ type: 'io', direction: 'in', port: [5, 4] }])).toThrow(RangeError);
  });

  test('a guest whose every exit is filtered can be kicked, and is busy meanwhile', async ({ vm }) => {
    const vcpu = load(vm, [...outAl(0x20), 0xeb, 0xfc]);
    vcpu.setExitFilter([{ type: 'io', direction: 'out', port: 0x20 }]);
    const run = vcpu.run();
    for (let i = 0; i < 1000 && vcpu.exitCounts()[0]! < 10n; i++)
      await new Promise((resolve) => setTimeout(resolve, 1));
    expect(vcpu.exitCounts()[0]).toBeGreaterThanOrEqual(10n);
    expect(() => vcpu.setExitFilter([])).toThrow(VcpuBusyError);
    expect(() => vcpu.settle()).toThrow(VcpuBusyError);
    vcpu.kick();
    expect(await run).toEqual({ type: 'interrupted' });
    vm.close();
    expect(() => vcpu.setExitFilter([])).toThrow(KvmClosedError);
  });
});
