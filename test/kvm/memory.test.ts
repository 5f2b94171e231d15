// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { describe, expect } from 'vitest';
import { KvmClosedError, KvmError, type Vm } from '../../lib/kvm/index.ts';
import { hlt, load, loadAl, movAl, outAl, storeAl, test, thrown } from './machine.ts';

const backings = ['anonymous', 'memfd'] as const;
const byteAt = (vm: Vm, gpa: number) => vm.memory.read(gpa, 1)[0];

describe('memslots', () => {
  test('get the lowest free number', ({ vm }) => {
    const regions = [0, 1, 2].map((page) => vm.memory.add({ gpa: page * 0x1000, size: 0x1000 }));
    expect(regions.map((region) => region.slot)).toEqual([0, 1, 2]);
    expect(vm.memory.add({ gpa: 0x8000, size: 0x1000, slot: 7 }).slot).toBe(7);
    regions[1]!.delete();
    expect(vm.memory.add({ gpa: 0x1000, size: 0x1000 }).slot).toBe(1);
    expect(vm.memory.add({ gpa: 0x9000, size: 0x1000 }).slot).toBe(3);
    expect(vm.memory.regions.map((region) => region.slot)).toEqual([0, 2, 7, 1, 3]);
  });

  test('refuse what no kernel would take, before asking it', ({ vm }) => {
    const add = (gpa: number, size: number, slot?: number) => () =>
      vm.memory.add({ gpa, size, ...(slot === undefined ? {} : { slot }) });
    expect(add(0x1001, 0x1000)).toThrow(/^guest address 0x1001 is not a multiple of the page size/);
    expect(add(0x1000, 0x1234)).toThrow(/^size 0x1234 is not a multiple of the page size/);
    expect(add(0x1000, 0)).toThrow(/at least one page/);
    expect(add(-0x1000, 0x1000)).toThrow(RangeError);
    expect(add(0.5, 0x1000)).toThrow(RangeError);
    expect(add(2 ** 53, 0x1000)).toThrow(RangeError);
    expect(add(Number.NaN, 0x1000)).toThrow(RangeError);
    expect(add('0x1000' as never, 0x1000)).toThrow(TypeError);
    add(0x1000, 0x1000, 3)();
    expect(add(0x4000, 0x1000, 3)).toThrow(/^slot 3 is in use/);
    expect(() => vm.memory.add({ gpa: 0x5000, size: 0x1000, backing: 'tape' as never })).toThrow(TypeError);
    expect(vm.memory.regions).toHaveLength(1);
  });

  test('the kernel refuses an overlap and a slot beyond its limit', ({ vm }) => {
    const region = vm.memory.add({ gpa: 0x1000, size: 0x2000 });
    const other = vm.memory.add({ gpa: 0x8000, size: 0x1000 });
    const two = vm.checkExtension('KVM_CAP_USER_MEMORY2') ? '2' : '';
    const request = `KVM_SET_USER_MEMORY_REGION${two}`;
    const overlap = { code: 'EEXIST', errno: -17, syscall: 'ioctl', request };
    expect(thrown(() => vm.memory.add({ gpa: 0x2000, size: 0x1000 }))).toMatchObject(overlap);
    expect(thrown(() => other.move(0x2000))).toMatchObject(overlap);
    expect(other.gpa).toBe(0x8000);
    expect(thrown(() => region.setFlags({ readOnly: true }))).toMatchObject({ code: 'EINVAL', request });
    expect(region.readOnly).toBe(false);
    const limit = vm.checkExtension('KVM_CAP_NR_MEMSLOTS');
    const beyond = thrown(() => vm.memory.add({ gpa: 0x100000, size: 0x1000, slot: limit }));
    expect(beyond).toBeInstanceOf(KvmError);
    expect(beyond).toMatchObject({ code: 'EINVAL', request });
    expect(vm.memory.regions).toEqual([region, other]);
  });

  for (const backing of backings) {
    test(`${backing}: host and guest see the same bytes`, async ({ vm }) => {
      const region = vm.memory.add({ gpa: 0x8000, size: 0x2000, backing });
      const bytes = new Uint8Array(region.buffer);
      expect(bytes.every((byte) => byte === 0)).toBe(true);
      bytes[0x1234] = 0x3c;
      const vcpu = load(vm, [...loadAl(0x9234), ...storeAl(0x8001), ...hlt]);
      expect(await vcpu.run()).toEqual({ type: 'hlt' });
      expect([bytes[1], byteAt(vm, 0x8001)]).toEqual([0x3c, 0x3c]);
    });

    test(`${backing}: the guest reads zero after discard()`, async ({ vm }) => {
      const region = vm.memory.add({ gpa: 0x8000, size: 0x2000, backing });
      vm.memory.write(0x8010, Uint8Array.of(0x5a));
      vm.memory.write(0x9010, Uint8Array.of(0x6b));
      const look = [...loadAl(0x8010), ...outAl(0x10), ...loadAl(0x9010), ...outAl(0x11)];
      const vcpu = load(vm, [...look, ...look, ...hlt]);
      expect(await vcpu.run()).toMatchObject({ port: 0x10, data: Uint8Array.of(0x5a) });
      expect(await vcpu.run()).toMatchObject({ port: 0x11, data: Uint8Array.of(0x6b) });
      region.discard(0, 0x1000);
      expect(await vcpu.run()).toMatchObject({ port: 0x10, data: Uint8Array.of(0) });
      expect(await vcpu.run()).toMatchObject({ port: 0x11, data: Uint8Array.of(0x6b) });
      expect([byteAt(vm, 0x8010), byteAt(vm, 0x9010)]).toEqual([0, 0x6b]);
      region.discard();
      expect(byteAt(vm, 0x9010)).toBe(0);
    });

    test(`${backing}: unmapPages() ${backing === 'memfd' ? 'keeps' : 'drops'} the contents`, ({ vm }) => {
      const region = vm.memory.add({ gpa: 0x8000, size: 0x1000, backing });
      vm.memory.write(0x8010, Uint8Array.of(0x5a));
      region.unmapPages();
      expect(byteAt(vm, 0x8010)).toBe(backing === 'memfd' ? 0x5a : 0);
    });
  }

  test('discard() wants whole pages inside the region', ({ vm }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x2000 });
    expect(() => region.discard(0x10, 0x1000)).toThrow(/^offset 0x10 is not a multiple/);
    expect(() => region.discard(0, 0x1001)).toThrow(/^length 0x1001 is not a multiple/);
    expect(() => region.discard(0x1000, 0x2000)).toThrow(RangeError);
    expect(() => region.discard(0x3000)).toThrow(RangeError);
  });

  test('the guest sees a moved slot at its new address only', async ({ vm }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x1000 });
    vm.memory.write(0x8000, Uint8Array.of(0x5a));
    const at = (address: number) => [...loadAl(address), ...outAl(0x10)];
    const vcpu = load(vm, [...at(0x8000), ...at(0xa000), ...loadAl(0x8000), ...hlt]);
    expect(await vcpu.run()).toMatchObject({ type: 'io', data: Uint8Array.of(0x5a) });
    region.move(0xa000);
    expect(region.gpa).toBe(0xa000);
    expect(await vcpu.run()).toMatchObject({ type: 'io', data: Uint8Array.of(0x5a) });
    expect(await vcpu.run()).toMatchObject({ type: 'mmio', address: 0x8000, isWrite: false });
    expect(() => vm.memory.read(0x8000, 1)).toThrow(/^no memory region at guest address 0x8000$/);
  });

  test('a deleted slot is gone for the guest, its buffer is detached', async ({ vm }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x1000 });
    const { buffer } = region;
    const window = region.window(0x10, 0x20);
    const vcpu = load(vm, [...loadAl(0x8000), ...hlt]);
    region.delete();
    region.delete();
    expect([buffer.byteLength, window.byteLength]).toEqual([0, 0]);
    expect(await vcpu.run()).toMatchObject({ type: 'mmio', address: 0x8000 });
    for (const use of [
      () => region.buffer,
      () => region.discard(),
      () => region.move(0),
      () => region.setFlags({}),
      () => region.dirtyLog(),
      () => region.window(0, 1),
    ]) {
      expect(use).toThrow(KvmClosedError);
    }
  });

  test('a deleted region stays closed when another takes its place, and leaves nothing mapped', ({ vm }) => {
    // Virtual memory of the process: only what is unmapped at once goes back.
    const virtualGiB = () => Number(readFileSync('/proc/self/statm', 'utf8').split(' ')[0]) / 2 ** 18;
    const before = virtualGiB();
    const old = vm.memory.add({ gpa: 0x10000, size: 2 ** 33, slot: 1 });
    expect(Math.round(virtualGiB() - before)).toBe(8);
    old.delete();
    expect(Math.round(virtualGiB() - before)).toBe(0);
    const young = vm.memory.add({ gpa: 0x10000, size: 0x1000, slot: 1 });
    expect([...vm.memory.read(0x10000, 4)]).toEqual([0, 0, 0, 0]);
    vm.memory.write(0x10000, Uint8Array.of(7));
    for (const call of [
      () => old.hva,
      () => old.buffer,
      () => old.discard(),
      () => old.move(0x20000),
      () => old.setFlags({ logDirtyPages: true }),
      () => old.swap(),
      () => old.dirtyLog(),
      () => old.nodes(),
    ]) {
      expect(call).toThrow(KvmClosedError);
    }
    // What a getter of the options does must not reach the region that came after.
    const options = {
      get logDirtyPages() {
        young.delete();
        vm.memory.add({ gpa: 0x10000, size: 0x1000, slot: 1 });
        return true;
      },
    };
    expect(() => young.setFlags(options)).toThrow(KvmClosedError);
    old.delete();
    expect(vm.memory.regions.map((region) => [region.slot, region.logDirtyPages])).toEqual([[1, false]]);
    expect([...vm.memory.read(0x10000, 1)]).toEqual([0]);
  });

  test('the dirty log has exactly the pages the guest wrote, once', async ({ vm }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x4000, logDirtyPages: true });
    const vcpu = load(vm, [...movAl(1), ...storeAl(0x9000), ...loadAl(0xa000), ...storeAl(0xbfff), ...hlt]);
    await vcpu.run();
    expect(region.dirtyLog()).toEqual(Uint8Array.of(0b1010, 0, 0, 0, 0, 0, 0, 0));
    expect(region.dirtyPages()).toEqual([]);
    vcpu.setRegs({ rip: 0x1000n });
    await vcpu.run();
    expect(region.dirtyPages()).toEqual([1, 3]);
  });

  test('dirty logging is off until setFlags() turns it on', async ({ vm }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x1000 });
    expect(thrown(() => region.dirtyLog())).toMatchObject({ code: 'ENOENT', request: 'KVM_GET_DIRTY_LOG' });
    region.setFlags({ logDirtyPages: true });
    expect([region.logDirtyPages, region.readOnly]).toEqual([true, false]);
    const vcpu = load(vm, [...storeAl(0x8000), ...hlt]);
    await vcpu.run();
    expect(region.dirtyPages()).toEqual([0]);
    region.setFlags({ logDirtyPages: false });
    expect(thrown(() => region.dirtyLog())).toMatchObject({ code: 'ENOENT' });
  });

  test('above 4 GiB there is no buffer, but windows', ({ vm }) => {
    const GiB = 2 ** 30;
    const region = vm.memory.add({ gpa: 4 * GiB, size: 5 * GiB });
    expect(() => region.buffer).toThrow(/at most 4 GiB .* use window\(offset, length\)/);
    expect(() => region.window(0, 4 * GiB + 1)).toThrow(RangeError);
    expect(() => region.window(5 * GiB - 1, 2)).toThrow(RangeError);
    const last = new Uint8Array(region.window(5 * GiB - 16, 16));
    last[15] = 0x42;
    expect(byteAt(vm, 9 * GiB - 1)).toBe(0x42);
    expect(region.window(0, 4 * GiB).byteLength).toBe(4 * GiB);
  });

  test('read() and write() span adjacent regions, and write nothing when a part is missing', ({ vm }) => {
    vm.memory.add({ gpa: 0x1000, size: 0x1000 });
    vm.memory.add({ gpa: 0x2000, size: 0x1000, readOnly: true });
    vm.memory.write(0x1ffe, Uint8Array.of(1, 2, 3, 4));
    expect(vm.memory.read(0x1ffd, 6)).toEqual(Uint8Array.of(0, 1, 2, 3, 4, 0));
    expect(() => vm.memory.write(0x2fff, Uint8Array.of(9, 9))).toThrow(RangeError);
    expect(byteAt(vm, 0x2fff)).toBe(0);
    expect(() => vm.memory.write(0x1000, [1] as never)).toThrow(TypeError);
  });
});
