// SPDX-License-Identifier: Apache-2.0
import { describe, expect } from 'vitest';
import { EventFd, KvmClosedError, type Vm } from '../../lib/kvm/index.ts';
import { hlt, inAl, load, movAl, outAl, spin, storeAl, test, thrown } from './machine.ts';

const later = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
/** Bits set in the LAPIC's IRR, as vectors. */
function pendingVectors(lapic: Uint8Array): number[] {
  return Array.from({ length: 256 }, (_, vector) => vector).filter((vector) => {
    const at = 0x200 + (vector >> 5) * 16 + ((vector & 31) >> 3);
    return (lapic[at]! >> (vector & 7)) & 1;
  });
}
/** Bytes of struct kvm_irqchip before the IOAPIC's redirection table. */
const REDIRECTION = 8 + 24;
/** Unmasks inputs of the IOAPIC: [pin, low word: the vector, and bit 15 for a level interrupt]. */
function setIoapic(vm: Vm, entries: readonly (readonly [pin: number, low: number])[]): void {
  const state = vm.getIrqchip('ioapic');
  const words = new DataView(state.buffer);
  for (const [pin, low] of entries) words.setBigUint64(REDIRECTION + pin * 8, BigInt(low), true);
  vm.setIrqchip(state);
}
/** Switches the LAPIC on by its spurious-vector register. */
function enableLapic(vm: Vm) {
  const vcpu = vm.createVcpu(0);
  const lapic = vcpu.getLapic();
  lapic.set([0xff, 0x01], 0xf0);
  vcpu.setLapic(lapic);
  return vcpu;
}

describe('EventFd', () => {
  test('counts, sums, and is empty after take()', () => {
    using event = new EventFd();
    expect(event.take()).toBeUndefined();
    event.signal();
    event.signal(41n);
    expect(event.take()).toBe(42n);
    expect(event.take()).toBeUndefined();
    event.signal(0xffff_ffff_ffff_fffen);
    expect(thrown(() => event.signal())).toMatchObject({ code: 'EAGAIN', syscall: 'write' });
    expect(thrown(() => event.signal(0xffff_ffff_ffff_ffffn))).toMatchObject({ code: 'EINVAL' });
  });

  test('as a semaphore gives one at a time', () => {
    using event = new EventFd({ semaphore: true });
    event.signal(2n);
    expect([event.take(), event.take(), event.take()]).toEqual([1n, 1n, undefined]);
  });

  test('read() waits, also twice, and ends by close() or by its signal', async () => {
    const event = new EventFd();
    const reads = Promise.all([event.read(), event.read()]);
    event.signal(3n);
    await later(20);
    event.signal(4n);
    expect((await reads).sort()).toEqual([3n, 4n]);
    const abort = new AbortController();
    const aborted = event.read({ signal: abort.signal });
    abort.abort(new Error('enough'));
    await expect(aborted).rejects.toThrow('enough');
    const pending = event.read();
    event.close();
    event.close();
    await expect(pending).rejects.toThrow(KvmClosedError);
    for (const use of [() => event.fd, () => event.take(), () => event.signal()])
      expect(use).toThrow(KvmClosedError);
  });
});

describe('ioeventfd', () => {
  test('a write signals instead of exiting; another one exits', async ({ vm }) => {
    using port = new EventFd();
    using word = new EventFd();
    vm.addIoeventfd(port, { port: 0x20, length: 1, match: 7n });
    vm.addIoeventfd(word, { address: 0x9000, length: 1 });
    const body = [...movAl(7), ...outAl(0x20), ...outAl(0x20), ...storeAl(0x9000)];
    const vcpu = load(vm, [...body, ...movAl(8), ...outAl(0x20), ...hlt]);
    expect(await vcpu.run()).toMatchObject({ type: 'io', port: 0x20, data: Uint8Array.of(8) });
    expect([await port.read(), await word.read()]).toEqual([2n, 1n]);
    vm.removeIoeventfd(port, { port: 0x20, length: 1, match: 7n });
    vcpu.setRegs({ rip: 0x1000n });
    expect(await vcpu.run()).toMatchObject({ type: 'io', data: Uint8Array.of(7) });
    using wide = new EventFd();
    vm.addIoeventfd(wide, { port: 0x30, length: 2 });
    vm.memory.write(0x1000, Uint8Array.of(0xe7, 0x30, ...outAl(0x30), ...hlt));
    vcpu.setRegs({ rip: 0x1000n });
    expect(await vcpu.run()).toMatchObject({ type: 'io', port: 0x30, size: 1 });
    expect(wide.take()).toBe(1n);
    expect(() => vm.addIoeventfd(port, {})).toThrow(/either a port or an address/);
    expect(() => vm.addIoeventfd({ fd: 1 } as never, { port: 1 })).toThrow(TypeError);
    expect(thrown(() => vm.removeIoeventfd(port, { port: 0x99 }))).toMatchObject({
      code: 'ENOENT',
      request: 'KVM_IOEVENTFD',
    });
  });
});

describe('interrupts', () => {
  test('irqfd through an MSI route raises its vector', async ({ vm }) => {
    vm.createIrqchip();
    const vcpu = enableLapic(vm);
    vm.setGsiRouting([{ type: 'msi', gsi: 5, address: 0xfee0_0000n, data: 0x41 }]);
    using event = new EventFd();
    vm.addIrqfd(event, 5);
    event.signal();
    for (let i = 0; i < 100 && pendingVectors(vcpu.getLapic()).length === 0; i++) await later(1);
    expect(pendingVectors(vcpu.getLapic())).toEqual([0x41]);
    vm.removeIrqfd(event, 5);
    event.signal();
    expect(vm.signalMsi({ address: 0xfee0_0000n, data: 0x55 })).toBe(1);
    expect(pendingVectors(vcpu.getLapic())).toEqual([0x41, 0x55]);
  });

  test('each route goes to its own pin or message', async ({ vm }) => {
    vm.createIrqchip();
    const vcpu = enableLapic(vm);
    setIoapic(vm, [
      [4, 0x64],
      [8, 0x68],
      [9, 0x69],
    ]);
    vm.setGsiRouting([
      { type: 'msi', gsi: 3, address: 0xfee0_0000n, data: 0x43 },
      { type: 'irqchip', gsi: 5, chip: 'ioapic', pin: 9 },
      { type: 'irqchip', gsi: 6, chip: 'ioapic', pin: 4 },
    ]);
    const pending = () => pendingVectors(vcpu.getLapic());
    vm.setIrqLine(5, 1);
    expect(pending()).toEqual([0x69]);
    vm.setIrqLine(5, 0);
    using event = new EventFd();
    vm.addIrqfd(event, 3);
    event.signal();
    for (let i = 0; i < 100 && pending().length < 2; i++) await later(1);
    expect(pending()).toEqual([0x43, 0x69]);
    vm.setIrqLine(6, 1);
    expect(pending()).toEqual([0x43, 0x64, 0x69]);
  });

  test('the end of a level interrupt signals the resampler', async ({ vm }) => {
    vm.createIrqchip();
    // Real mode: vector 0x20 is at 0x80. The handler writes the LAPIC's EOI register through EBX.
    vm.memory.add({ gpa: 0, size: 0x1000 });
    vm.memory.write(0x80, Uint8Array.of(0x00, 0x11, 0, 0));
    vm.memory.add({ gpa: 0x1000, size: 0x1000 });
    vm.memory.write(0x1000, Uint8Array.of(0xfb, ...hlt, 0xfa, ...outAl(0x10)));
    vm.memory.write(0x1100, Uint8Array.of(0x67, 0x66, 0xc7, 0x03, 0, 0, 0, 0, 0xcf));
    const vcpu = enableLapic(vm);
    vcpu.setSregs({ cs: { base: 0n, selector: 0 }, ds: { base: 0n, limit: 0xffffffff, g: 1 } });
    vcpu.setRegs({ rip: 0x1000n, rflags: 2n, rsp: 0x1ff0n, rbx: 0xfee0_00b0n });
    setIoapic(vm, [[11, 0x20 | (1 << 15)]]);
    using event = new EventFd();
    using resample = new EventFd();
    vm.addIrqfd(event, 11, { resample });
    event.signal();
    expect(await vcpu.run()).toMatchObject({ type: 'io', port: 0x10 });
    expect(await resample.read({ signal: AbortSignal.timeout(5000) })).toBe(1n);
    expect(pendingVectors(vcpu.getLapic())).toEqual([]);
  });

  test('a split irqchip has LAPICs and no IOAPIC', ({ vm }) => {
    expect(vm.irqchip).toBe('none');
    vm.createSplitIrqchip();
    expect(vm.irqchip).toBe('split');
    const vcpu = enableLapic(vm);
    vm.signalMsi({ address: 0xfee0_0000n, data: 0x77 });
    expect(pendingVectors(vcpu.getLapic())).toEqual([0x77]);
    expect(thrown(() => vm.getIrqchip('ioapic'))).toMatchObject({ request: 'KVM_GET_IRQCHIP' });
  });

  test('a split irqchip has no more pins than the kernel allows', ({ vm }) => {
    expect(thrown(() => vm.createSplitIrqchip(100_000))).toMatchObject({ code: 'EINVAL' });
    expect(vm.irqchip).toBe('none');
  });

  test('the speaker port is the kernel’s only when it was asked for', async ({ kvm }) => {
    for (const speakerDummy of [false, true]) {
      using vm = kvm.createVm();
      vm.createIrqchip();
      vm.createPit({ speakerDummy });
      const vcpu = load(vm, [...inAl(0x61), ...outAl(0x10)]);
      expect(await vcpu.run()).toMatchObject({ type: 'io', port: speakerDummy ? 0x10 : 0x61 });
    }
  });

  test('the irqchip’s and the PIT’s state can be read and written', ({ vm }) => {
    vm.createIrqchip();
    vm.createPit();
    const ioapic = vm.getIrqchip('ioapic');
    expect([ioapic.length, new Uint32Array(ioapic.buffer)[0]]).toEqual([520, 2]);
    const pic = vm.getIrqchip('pic-master');
    pic[8 + 2] = 0xa5;
    vm.setIrqchip(pic);
    expect(vm.getIrqchip('pic-master')[8 + 2]).toBe(0xa5);
    // Channel 2's counter.
    const pit = vm.getPit();
    pit.set([0x34, 0x12], 48);
    vm.setPit(pit);
    expect(pit.length).toBe(112);
    expect([...vm.getPit().subarray(48, 50)]).toEqual([0x34, 0x12]);
    expect(() => vm.getIrqchip('lapic' as never)).toThrow(TypeError);
    expect(() => vm.setGsiRouting([{ type: 'smoke', gsi: 1 } as never])).toThrow(TypeError);
    expect(() => vm.setGsiRouting(5 as never)).toThrow(TypeError);
  });
});

describe('clock', () => {
  test('goes on from what was set', ({ vm }) => {
    vm.createVcpu(0);
    vm.setClock({ clock: 5_000_000_000_000n });
    const { clock } = vm.getClock();
    expect(clock >= 5_000_000_000_000n && clock < 5_001_000_000_000n).toBe(true);
    expect(() => vm.setClock({ clock: 5 as never })).toThrow(TypeError);
  });
});

describe('dirty pages', () => {
  test('the manual log keeps pages until they are cleared', async ({ vm, skip }) => {
    if (vm.checkExtension('KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2') === 0) skip('no manual dirty log');
    vm.enableManualDirtyLog();
    const region = vm.memory.add({ gpa: 0x8000, size: 0x4000, logDirtyPages: true });
    const vcpu = load(vm, [...storeAl(0x9000), ...storeAl(0xb000), ...hlt]);
    await vcpu.run();
    expect([region.dirtyPages(), region.dirtyPages()]).toEqual([
      [1, 3],
      [1, 3],
    ]);
    region.clearDirtyLog(Uint8Array.of(0b10, 0, 0, 0, 0, 0, 0, 0));
    expect(region.dirtyPages()).toEqual([3]);
    expect(() => region.clearDirtyLog(new Uint8Array(7))).toThrow(/needs 8 bytes/);
    expect(() => region.clearDirtyLog(new Uint8Array(8), 5)).toThrow(RangeError);
    expect(thrown(() => region.clearDirtyLog(new Uint8Array(8), 1, 1))).toMatchObject({ code: 'EINVAL' });
  });

  test('an initially set log begins with every page', ({ vm, skip }) => {
    if ((vm.checkExtension('KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2') & 2) === 0) skip('no initially set log');
    vm.enableManualDirtyLog({ initiallySet: true });
    const region = vm.memory.add({ gpa: 0x8000, size: 0x3000, logDirtyPages: true });
    expect(region.dirtyPages()).toEqual([0, 1, 2]);
  });

  test('a harvest takes all of a large ring, of every slot', async ({ vm, skip }) => {
    if (vm.checkExtension('KVM_CAP_DIRTY_LOG_RING_ACQ_REL') === 0) skip('no dirty ring');
    vm.enableDirtyRing(8192);
    const [low, high] = [1500, 300];
    vm.memory.add({ gpa: 0x100000, size: low * 0x1000, slot: 3, logDirtyPages: true });
    vm.memory.add({ gpa: 0x100000 + low * 0x1000, size: high * 0x1000, slot: 9, logDirtyPages: true });
    // MOV [EBX], AL; ADD EBX, 0x1000; DEC CX; JNZ; HLT.
    const vcpu = load(vm, [0x67, 0x88, 0x03, 0x66, 0x81, 0xc3, 0, 0x10, 0, 0, 0x49, 0x75, 0xf3, ...hlt]);
    vcpu.setSregs({ ds: { base: 0n, limit: 0xffffffff, g: 1 } });
    vcpu.setRegs({ rbx: 0x100000n, rcx: BigInt(low + high), rip: 0x1000n, rflags: 2n });
    expect(await vcpu.run()).toEqual({ type: 'hlt' });
    const pages = vcpu.harvestDirtyRing();
    const of = (slot: number) => new Set(pages.filter((one) => one.slot === slot).map(({ page }) => page));
    expect([...of(3)].sort((a, b) => a - b)).toEqual(Array.from({ length: low }, (_, page) => page));
    expect([...of(9)].sort((a, b) => a - b)).toEqual(Array.from({ length: high }, (_, page) => page));
  });

  test('the ring has exactly the pages written, and again after a reset', async ({ vm, skip }) => {
    if (vm.checkExtension('KVM_CAP_DIRTY_LOG_RING_ACQ_REL') === 0) skip('no dirty ring');
    vm.enableDirtyRing(1024);
    const region = vm.memory.add({ gpa: 0x8000, size: 0x4000, slot: 6, logDirtyPages: true });
    const vcpu = load(vm, [...storeAl(0xb000), ...storeAl(0x8000), ...storeAl(0xb008), ...hlt]);
    expect(vcpu.harvestDirtyRing()).toEqual([]);
    await vcpu.run();
    expect(thrown(() => region.dirtyLog())).toMatchObject({ request: 'KVM_GET_DIRTY_LOG' });
    const first = vcpu.harvestDirtyRing();
    // A page may be there more than once.
    expect(new Set(first.map(({ slot, page }) => `${slot}:${page}`))).toEqual(new Set(['6:3', '6:0']));
    expect(vcpu.harvestDirtyRing()).toEqual([]);
    expect(vm.resetDirtyRings()).toBe(first.length);
    expect(vm.resetDirtyRings()).toBe(0);
    vcpu.setRegs({ rip: 0x1000n });
    await vcpu.run();
    expect(new Set(vcpu.harvestDirtyRing().map(({ page }) => page))).toEqual(new Set([0, 3]));
    vm.close();
    expect(() => vcpu.harvestDirtyRing()).toThrow(KvmClosedError);
  });

  test('a full ring is an exit', async ({ vm, skip }) => {
    if (vm.checkExtension('KVM_CAP_DIRTY_LOG_RING_ACQ_REL') === 0) skip('no dirty ring');
    vm.enableDirtyRing(1024);
    vm.memory.add({ gpa: 0x100000, size: 0x800000, logDirtyPages: true });
    // MOV [EBX], AL; ADD EBX, 0x1000; JMP: with a 4 GiB DS limit.
    const vcpu = load(vm, [0x67, 0x88, 0x03, 0x66, 0x81, 0xc3, 0x00, 0x10, 0, 0, 0xeb, 0xf4]);
    vcpu.setSregs({ ds: { base: 0n, limit: 0xffffffff, g: 1 } });
    vcpu.setRegs({ rbx: 0x100000n, rip: 0x1000n, rflags: 2n });
    expect(await vcpu.run()).toEqual({ type: 'dirty-ring-full' });
    const pages = vcpu.harvestDirtyRing();
    // When the kernel looks is its own business: some backends run on past the ring's end.
    expect(pages.length).toBeGreaterThan(512);
    expect(pages.length).toBeLessThanOrEqual(1024);
    expect(vm.resetDirtyRings()).toBe(pages.length);
  });
});

describe('statistics', () => {
  test('have descriptors with types, units and buckets', ({ vm, skip }) => {
    const vcpu = load(vm, spin);
    if (vm.checkExtension('KVM_CAP_BINARY_STATS_FD') === 0) skip('no KVM_CAP_BINARY_STATS_FD');
    const schema = vcpu.statsSchema();
    const find = (name: string) => schema.find((stat) => stat.name === name);
    expect(find('halt_exits')).toMatchObject({
      type: 'cumulative',
      unit: 'none',
      base: 10,
      exponent: 0,
      count: 1,
    });
    expect(find('halt_wait_hist')).toMatchObject({
      type: 'log-histogram',
      unit: 'seconds',
      exponent: -9,
      count: 32,
    });
    expect([...vcpu.stats().keys()]).toEqual(schema.map(({ name }) => name));
    expect(vm.statsSchema().map(({ name }) => name)).toContain('remote_tlb_flush');
  });
});
