// SPDX-License-Identifier: Apache-2.0
import { describe, expect } from 'vitest';
import { KvmClosedError, type Vcpu, VcpuBusyError, type Vm } from '../../lib/kvm/index.ts';
import { hlt, inAl, load, movAl, outAl, spin, start, storeAl, test, thrown } from './machine.ts';

/** All of XMM0 to XMM15, through XSAVE: KVM_SET_FPU does not tell the CPU that they are in use. */
function setXmm(vcpu: Vcpu, value: number): void {
  const area = vcpu.getXsave().fill(value, 160, 416);
  area[512]! |= 3;
  vcpu.setXsave(area);
}

/** Values that no vCPU has by itself. */
function disturb(vcpu: Vcpu): void {
  vcpu.setRegs({ rbx: 0x1111n, r15: 0x2222n });
  vcpu.setSregs({ gs: { base: 0x33000n }, cr2: 0x4444n });
  vcpu.setMsrs([
    [0x174, 0x55n],
    [0x176, 0x66n],
  ]);
  setXmm(vcpu, 7);
  vcpu.setDebugRegs({ db: [1n, 2n, 3n, 4n] });
}

/** Everything readable, for comparison. The TSC goes on. */
function all(vcpu: Vcpu) {
  return {
    regs: vcpu.getRegs(),
    sregs: vcpu.getSregs(),
    fpu: vcpu.getFpu(),
    xcrs: vcpu.getXcrs(),
    xsave: vcpu.getXsave(),
    debug: vcpu.getDebugRegs(),
    events: vcpu.getEvents(),
    mp: vcpu.getMpState(),
    cpuid: vcpu.getCpuid(),
    msrs: vcpu.getMsrs([0x174, 0x175, 0x176, 0xc000_0080, 0x277]),
  };
}

const byteAt = (vm: Vm, gpa: number) => vm.memory.read(gpa, 1)[0];

describe('save and restore', () => {
  test('everything comes back', ({ kvm, vm }) => {
    const vcpu = load(vm, hlt);
    vcpu.setCpuid(kvm.supportedCpuid());
    disturb(vcpu);
    const before = all(vcpu);
    const snapshot = structuredClone(vcpu.save());
    expect(all(vcpu)).toEqual(before);
    vcpu.setRegs({ rbx: 0n, r15: 0n });
    vcpu.setSregs({ gs: { base: 0n }, cr2: 0n });
    vcpu.setMsrs([
      [0x174, 0n],
      [0x176, 0n],
    ]);
    setXmm(vcpu, 0);
    vcpu.setDebugRegs({ db: [0n, 0n, 0n, 0n] });
    expect(all(vcpu)).not.toEqual(before);
    vcpu.restore(snapshot);
    expect(all(vcpu)).toEqual(before);
    expect(() => vcpu.restore({} as never)).toThrow(/no snapshot/);
    expect(() => vcpu.restore(null as never)).toThrow(TypeError);
  });

  test('an access that is under way is completed first', ({ vm }) => {
    const vcpu = load(vm, [...inAl(2), ...outAl(3), ...hlt]);
    const exit = vcpu.runSync();
    if (exit.type === 'io') exit.data[0] = 0x5c;
    const snapshot = vcpu.save();
    expect(vcpu.runSync()).toMatchObject({ port: 3, data: Uint8Array.of(0x5c) });
    vcpu.runSync();
    vcpu.restore(snapshot);
    expect(vcpu.getRegs().rip).toBe(0x1002n);
    expect(vcpu.runSync()).toMatchObject({ port: 3, data: Uint8Array.of(0x5c) });
  });

  test('each part is what its request gives', ({ kvm, vm }) => {
    const vcpu = load(vm, hlt);
    vcpu.setCpuid(kvm.supportedCpuid());
    disturb(vcpu);
    const snapshot = vcpu.save();
    const raw = (request: string, size: number, fill = (_: DataView) => {}) => {
      const bytes = new Uint8Array(size);
      fill(new DataView(bytes.buffer));
      vcpu.ioctl(request, bytes);
      return bytes;
    };
    const entries = vcpu.getCpuid().length;
    expect(entries).toBeGreaterThan(10);
    expect(snapshot.cpuid).toEqual(
      raw('KVM_GET_CPUID2', 8 + entries * 40, (view) => view.setUint32(0, entries, true)),
    );
    expect(snapshot.tscKhz).toBe(vcpu.getTscKhz());
    expect(snapshot.mpState).toEqual(raw('KVM_GET_MP_STATE', 4));
    expect(snapshot.regs).toEqual(raw('KVM_GET_REGS', 144));
    expect(snapshot.sregs).toEqual({ request: 'KVM_SET_SREGS2', bytes: raw('KVM_GET_SREGS2', 320) });
    expect(snapshot.xcrs).toEqual(raw('KVM_GET_XCRS', 392));
    expect(snapshot.xsave).toEqual(vcpu.getXsave());
    expect(snapshot.debugRegs).toEqual(raw('KVM_GET_DEBUGREGS', 128));
    expect(snapshot.events).toEqual(raw('KVM_GET_VCPU_EVENTS', 64));
    const msrs = new Map<number, bigint>();
    for (const batch of snapshot.msrs) {
      const view = new DataView(batch.buffer, batch.byteOffset, batch.length);
      for (let at = 8; at < batch.length; at += 16)
        msrs.set(view.getUint32(at, true), view.getBigUint64(at + 8, true));
    }
    expect([msrs.get(0x174), msrs.get(0x176)]).toEqual([0x55n, 0x66n]);
  });

  test('an MSR that cannot be written has its value already, or is an error', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const snapshot = vcpu.save();
    // IA32_PLATFORM_ID: KVM gives 0 and takes nothing.
    const withId = (value: bigint) => {
      const view = new DataView(new ArrayBuffer(8 + 3 * 16));
      view.setUint32(0, 3, true);
      for (const [at, index, bits] of [
        [8, 0x174, 0x77n],
        [24, 0x17, value],
        [40, 0x176, 0x88n],
      ] as const) {
        view.setUint32(at, index, true);
        view.setBigUint64(at + 8, bits, true);
      }
      return { ...snapshot, msrs: [new Uint8Array(view.buffer)] };
    };
    const refused = thrown(() => vcpu.restore(withId(5n)));
    expect(refused).toMatchObject({
      name: 'KvmMsrError',
      request: 'KVM_SET_MSRS',
      index: 0x17,
      processed: 1,
    });
    expect([...vcpu.getMsrs([0x174, 0x176]).values()]).toEqual([0x77n, 0n]);
    vcpu.setRegs({ rbx: 9n });
    vcpu.restore(withId(0n));
    expect([...vcpu.getMsrs([0x174, 0x176]).values()]).toEqual([0x77n, 0x88n]);
    expect(vcpu.getRegs().rbx).toBe(0n);
  });

  test('an error names its request, and the next restore is not disturbed', ({ vm }) => {
    const vcpu = load(vm, hlt);
    const snapshot = vcpu.save();
    const restore = (part: object) => thrown(() => vcpu.restore({ ...snapshot, ...part }));
    expect(restore({ regs: new Uint8Array(143) })).toMatchObject({
      name: 'RangeError',
      message: expect.stringContaining('KVM_SET_REGS needs 144 bytes'),
    });
    expect(restore({ events: 'none' })).toMatchObject({
      name: 'TypeError',
      message: expect.stringContaining('KVM_SET_VCPU_EVENTS'),
    });
    expect(restore({ lapic: new Uint8Array(1024) })).toMatchObject({ request: 'KVM_SET_LAPIC', errno: -22 });
    vcpu.setRegs({ rbx: 9n });
    vcpu.restore(snapshot);
    expect(vcpu.getRegs().rbx).toBe(0n);
  });

  test('the TSC is put back where it was', ({ kvm, vm }) => {
    const vcpu = load(vm, hlt);
    vcpu.setCpuid(kvm.supportedCpuid());
    const TSC = 0x10;
    const snapshot = vcpu.save();
    const then = vcpu.getMsrs([TSC]).get(TSC)!;
    vcpu.setMsrs([[TSC, then + (1n << 50n)]]);
    vcpu.restore(snapshot);
    const now = vcpu.getMsrs([TSC]).get(TSC)!;
    expect(now < then + (1n << 40n)).toBe(true);
  });

  test('with a LAPIC and a pending interrupt', ({ vm }) => {
    vm.createIrqchip();
    const vcpu = vm.createVcpu(0);
    const lapic = vcpu.getLapic();
    lapic.set([0xff, 0x01], 0xf0);
    vcpu.setLapic(lapic);
    vm.signalMsi({ address: 0xfee0_0000n, data: 0x41 });
    const snapshot = vcpu.save();
    const full = vcpu.getLapic();
    vcpu.setLapic(lapic);
    expect(vcpu.getLapic()).not.toEqual(full);
    vcpu.restore(snapshot);
    expect(vcpu.getLapic()).toEqual(full);
    expect(snapshot.lapic).toEqual(full);
  });
});

describe('cloneVm', () => {
  test('goes on where the source stands, and neither sees the other', ({ kvm, vm }) => {
    const data = vm.memory.add({ gpa: 0x8000, size: 0x2000, backing: 'memfd', slot: 5 });
    vm.memory.add({ gpa: 0x20000, size: 0x1000, readOnly: true });
    const vcpu = load(vm, [
      ...movAl(0x31),
      ...storeAl(0x8001),
      ...inAl(1),
      ...storeAl(0x8002),
      ...outAl(2),
      ...hlt,
    ]);
    vcpu.setCpuid(kvm.supportedCpuid());
    disturb(vcpu);
    const exit = vcpu.runSync();
    if (exit.type === 'io') exit.data[0] = 0x32;
    const clone = kvm.cloneVm(vm);
    const twin = clone.vcpus[0]!;
    expect(all(twin)).toEqual(all(vcpu));
    const shape = (one: Vm) =>
      one.memory.regions.map(({ gpa, size, slot, backing, readOnly }) => ({
        gpa,
        size,
        slot,
        backing,
        readOnly,
      }));
    expect(shape(clone)).toEqual(shape(vm));
    expect([byteAt(clone, 0x8001), byteAt(clone, 0x8002)]).toEqual([0x31, 0]);
    expect(twin.runSync()).toMatchObject({ port: 2, data: Uint8Array.of(0x32) });
    expect([byteAt(clone, 0x8002), byteAt(vm, 0x8002)]).toEqual([0x32, 0]);
    data.discard();
    expect(byteAt(clone, 0x8001)).toBe(0x31);
    clone.close();
    expect(vcpu.runSync()).toMatchObject({ port: 2, data: Uint8Array.of(0x32) });
  });

  test('with interrupt controllers, timer, several vCPUs and their states', ({ kvm, vm }) => {
    vm.setTssAddr(0xfffb_d000);
    vm.createIrqchip();
    vm.createPit();
    vm.setGsiRouting([{ type: 'irqchip', gsi: 3, chip: 'ioapic', pin: 3 }]);
    const pic = vm.getIrqchip('pic-slave');
    pic[8 + 2] = 0x99;
    vm.setIrqchip(pic);
    vm.setClock({ clock: 77_000_000_000_000n });
    load(vm, hlt, 0);
    start(vm, 1).setMpState(3);
    vm.vcpus[1]!.setRegs({ rbx: 0x77n });
    const clone = kvm.cloneVm(vm);
    expect(clone.getIrqchip('pic-slave')).toEqual(pic);
    expect(clone.vcpus.map((vcpu) => [vcpu.id, vcpu.getMpState(), vcpu.getRegs().rbx])).toEqual([
      [0, 0, 0n],
      [1, 3, 0x77n],
    ]);
    expect(clone.getClock().clock >= 77_000_000_000_000n).toBe(true);
    expect(clone.getClock().clock < 78_000_000_000_000n).toBe(true);
    expect(clone.irqchip).toBe('kernel');
  });

  test('refuses a running source, and leaves nothing behind', async ({ kvm, vm }) => {
    const vcpu = load(vm, spin);
    const run = vcpu.run();
    expect(() => kvm.cloneVm(vm)).toThrow(VcpuBusyError);
    expect(() => vcpu.save()).toThrow(VcpuBusyError);
    vcpu.kick();
    await run;
    expect(() => kvm.cloneVm({} as never)).toThrow(TypeError);
  });
});

describe('rewind', () => {
  /** IN AL, 1; MOV [0x8001], AL; OUT 2, AL; HLT. */
  const code = [...inAl(1), ...storeAl(0x8001), ...outAl(2), ...hlt];

  test('does the same again from the same point, and the same objects stay good', ({ kvm, vm }) => {
    vm.createIrqchip();
    vm.memory.add({ gpa: 0x8000, size: 0x2000 });
    const vcpu = load(vm, code);
    vcpu.setCpuid(kvm.supportedCpuid());
    const mark = vm.clone();
    for (const value of [0x55, 0x66]) {
      const exit = vcpu.runSync();
      expect(exit).toMatchObject({ type: 'io', direction: 'in', port: 1 });
      if (exit.type === 'io') exit.data[0] = value;
      // Left in the middle of its OUT: what is pending must not happen to the state that comes.
      expect(vcpu.runSync()).toMatchObject({ direction: 'out', port: 2, data: Uint8Array.of(value) });
      expect(byteAt(vm, 0x8001)).toBe(value);
      vm.memory.write(0x9000, Uint8Array.of(1, 2, 3));
      vm.setIrqchip(vm.getIrqchip('pic-slave').fill(0x21, 10, 11));
      vm.rewind(mark);
      expect([byteAt(vm, 0x8001), byteAt(vm, 0x9000)]).toEqual([0, 0]);
      expect(vm.getIrqchip('pic-slave')).toEqual(mark.getIrqchip('pic-slave'));
      expect(all(vcpu)).toEqual(all(mark.vcpus[0]!));
    }
    expect(mark.vcpus[0]!.runSync()).toMatchObject({ direction: 'in', port: 1 });
  });

  test('forgets the access that was under way', ({ vm }) => {
    const vcpu = load(vm, code);
    const mark = vm.clone();
    for (let i = 0; i < 3; i++) {
      // The IN that waits for its answer is the instruction that the mark is about to execute.
      expect(vcpu.runSync()).toMatchObject({ type: 'io', direction: 'in', port: 1 });
      vm.rewind(mark);
      expect(vcpu.getRegs().rip).toBe(0x1000n);
    }
    expect(vcpu.runSync()).toMatchObject({ direction: 'in', port: 1 });
  });

  test('refuses another shape, a running vCPU and what is no VM', async ({ kvm, vm }) => {
    const vcpu = load(vm, spin);
    const mark = kvm.cloneVm(vm);
    const run = vcpu.run();
    expect(() => vm.rewind(mark)).toThrow(VcpuBusyError);
    expect(() => mark.rewind(vm)).toThrow(VcpuBusyError);
    vcpu.kick();
    await run;
    const slot = vm.memory.add({ gpa: 0x8000, size: 0x1000 });
    expect(() => vm.rewind(mark)).toThrow(RangeError);
    slot.delete();
    vm.rewind(mark);
    vm.createVcpu(1);
    expect(() => vm.rewind(mark)).toThrow(RangeError);
    expect(() => vm.rewind({} as never)).toThrow(TypeError);
    mark.close();
    expect(() => vm.rewind(mark)).toThrow(KvmClosedError);
    expect(() => mark.clone()).toThrow(KvmClosedError);
  });
});

describe('system', () => {
  test('capabilities by name, VM types, emulated CPUID', ({ kvm }) => {
    const all = kvm.capabilities();
    expect(all.get('KVM_CAP_USER_MEMORY')).toBe(1);
    expect(all.size).toBeGreaterThan(120);
    expect(kvm.vmTypes()[0]).toBe('default');
    expect(Array.isArray(kvm.emulatedCpuid())).toBe(true);
  });
});
