// SPDX-License-Identifier: Apache-2.0
import { closeSync, mkdtempSync, openSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect } from 'vitest';
import { type Backing, KvmError, KvmUnsupportedError, type Vm } from '../../lib/kvm/index.ts';
import { hlt, load, loadAl, movAl, outAl, storeAl, test, thrown } from './machine.ts';

const byteAt = (vm: Vm, gpa: number) => vm.memory.read(gpa, 1)[0];

/** A temporary file of `size` bytes 0, 1, 2 … of each page's number. */
function withFile(size: number, body: (path: string) => void | Promise<void>): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'nvmx-'));
  const path = join(folder, 'memory');
  writeFileSync(
    path,
    Uint8Array.from({ length: size }, (_, at) => at >> 12),
  );
  return Promise.resolve(body(path)).finally(() => rmSync(folder, { recursive: true }));
}

/** What is mapped at an address of this process; empty for memory without a file. */
function mappedFile(address: bigint): string | undefined {
  for (const line of readFileSync('/proc/self/maps', 'utf8').split('\n')) {
    const [, from, to, file] = /^(\w+)-(\w+) \S+ \w+ \S+ \d+ *(.*)$/.exec(line) ?? [];
    if (from && BigInt(`0x${from}`) <= address && address < BigInt(`0x${to}`)) return file;
  }
  return undefined;
}

describe('backings', () => {
  test('a file, from an offset, shared with the guest both ways', ({ vm }) =>
    withFile(0x4000, async (path) => {
      const region = vm.memory.add({
        gpa: 0x8000,
        size: 0x2000,
        backing: { type: 'file', path, offset: 0x1000 },
      });
      expect([region.backing, byteAt(vm, 0x8000), byteAt(vm, 0x9000)]).toEqual(['file', 1, 2]);
      const vcpu = load(vm, [...loadAl(0x9000), ...outAl(1), ...movAl(0x77), ...storeAl(0x9001), ...hlt]);
      expect(await vcpu.run()).toMatchObject({ type: 'io', data: Uint8Array.of(2) });
      expect(await vcpu.run()).toEqual({ type: 'hlt' });
      expect(readFileSync(path)[0x2001]).toBe(0x77);
      region.discard();
      expect(byteAt(vm, 0x9001)).toBe(0x77);
    }));

  test('a file copied on write, from a descriptor, stays as it was', ({ vm }) =>
    withFile(0x1000, (path) => {
      const fd = openSync(path, 'r');
      vm.memory.add({ gpa: 0x8000, size: 0x1000, backing: { type: 'file', fd, copyOnWrite: true } });
      closeSync(fd);
      vm.memory.write(0x8000, Uint8Array.of(9));
      expect([byteAt(vm, 0x8000), readFileSync(path)[0]]).toEqual([9, 0]);
    }));

  test('a descriptor’s file, from an offset; a path’s is closed again', ({ vm }) =>
    withFile(0x3000, (path) => {
      const fd = openSync(path, 'r+');
      const open = () => readdirSync('/proc/self/fd').length;
      const before = open();
      vm.memory.add({ gpa: 0x8000, size: 0x1000, backing: { type: 'file', fd, offset: 0x2000 } });
      vm.memory.add({ gpa: 0x9000, size: 0x1000, backing: { type: 'file', path, offset: 0x1000 } });
      expect([byteAt(vm, 0x8000), byteAt(vm, 0x9000)]).toEqual([2, 1]);
      expect(open()).toBe(before);
      closeSync(fd);
    }));

  test('a file mapped read-only is for the guest only', ({ vm }) =>
    withFile(0x2000, async (path) => {
      const backing: Backing = { type: 'file', path, readOnly: true, offset: 0x1000 };
      const region = vm.memory.add({ gpa: 0x8000, size: 0x1000, backing, readOnly: true });
      expect(() => region.buffer).toThrow(/protected, read-only or under userfaultfd/);
      const vcpu = load(vm, [...loadAl(0x8123), ...outAl(1), ...storeAl(0x8000), ...hlt]);
      expect(await vcpu.run()).toMatchObject({ type: 'io', data: Uint8Array.of(1) });
      expect(await vcpu.run()).toMatchObject({ type: 'mmio', address: 0x8000, isWrite: true });
    }));

  test('a file that is too short, or not there, is refused before the guest sees it', ({ vm }) =>
    withFile(0x2000, (path) => {
      const add = (backing: Backing) => () => vm.memory.add({ gpa: 0, size: 0x2000, backing });
      expect(add({ type: 'file', path, offset: 0x1000 })).toThrow(/the file has 0x2000 bytes, offset 0x1000/);
      expect(add({ type: 'file', path, offset: 12 })).toThrow(/file offset 0xc is not a multiple/);
      expect(add({ type: 'file', path: `${path}.not` })).toThrow(/ENOENT/);
      expect(thrown(add({ type: 'file', fd: 9999 }))).toMatchObject({ code: 'EBADF', syscall: 'fstat' });
      expect(add({ type: 'file' } as never)).toThrow(/needs a path or an fd/);
      expect(vm.memory.regions).toEqual([]);
    }));

  test('/dev/zero as a device that can be mapped', ({ vm }) => {
    vm.memory.add({ gpa: 0, size: 0x1000, backing: { type: 'file', path: '/dev/zero' } });
    vm.memory.write(0x10, Uint8Array.of(5));
    expect([byteAt(vm, 0x10), byteAt(vm, 0x11)]).toEqual([5, 0]);
  });

  test('hugetlb: memory, or ENOMEM that says what to reserve', ({ vm }) => {
    const free = Number(/HugePages_Free:\s+(\d+)/.exec(readFileSync('/proc/meminfo', 'utf8'))?.[1] ?? 0);
    const add = () => vm.memory.add({ gpa: 0, size: 2 ** 21, backing: 'hugetlb' });
    expect(() => vm.memory.add({ gpa: 0, size: 0x1000, backing: 'hugetlb' })).toThrow(
      /size 0x1000 is not a multiple of the page size \(0x200000\)/,
    );
    const giant: Backing = { type: 'hugetlb', pageSize: '1G' };
    expect(() => vm.memory.add({ gpa: 0, size: 2 ** 21, backing: giant })).toThrow(/\(0x40000000\)/);
    if (free === 0) {
      expect(thrown(add)).toMatchObject({ code: 'ENOMEM', syscall: 'mmap' });
      expect(add).toThrow(/no free hugetlb 2 MiB pages.*nr_hugepages/);
      return;
    }
    const region = add();
    vm.memory.write(0x1ffff0, Uint8Array.of(1));
    region.discard();
    expect(byteAt(vm, 0x1ffff0)).toBe(0);
  });

  test('huge pages on and off are in the kernel’s flags of the mapping', ({ vm }) => {
    const flags = (hva: bigint) => {
      const maps = readFileSync('/proc/self/smaps', 'utf8').split(/\n(?=[0-9a-f]+-[0-9a-f]+ )/);
      const map = maps.find((text) => {
        const [from, to] = text
          .split(' ', 1)[0]!
          .split('-')
          .map((part) => BigInt(`0x${part}`));
        return from! <= hva && hva < to!;
      });
      return /VmFlags: (.*)/.exec(map!)![1]!.trim().split(' ');
    };
    const add = (gpa: number, hugePages: boolean) =>
      vm.memory.add({ gpa, size: 2 ** 22, backing: { type: 'anonymous', hugePages } });
    const region = add(0, true);
    expect(flags(region.hva)).toContain('hg');
    expect(flags(add(2 ** 22, false).hva)).toContain('nh');
    region.setHugePages(false);
    expect(flags(region.hva)).toContain('nh');
  });

  test('guest_memfd mapped here: one memory, and a punched hole is zero for both', async ({ vm, skip }) => {
    if ((vm.checkExtension('KVM_CAP_GUEST_MEMFD_FLAGS') & 3) !== 3)
      skip('no KVM_CAP_GUEST_MEMFD_FLAGS with mmap');
    const region = vm.memory.add({ gpa: 0x8000, size: 0x2000, backing: { type: 'guest-memfd', mmap: true } });
    expect(mappedFile(region.hva)).toMatch(/gmem|guest_memfd/);
    vm.memory.write(0x8000, Uint8Array.of(0x11));
    vm.memory.write(0x9000, Uint8Array.of(0x22));
    const look = [...loadAl(0x8000), ...outAl(1), ...loadAl(0x9000), ...outAl(2)];
    const vcpu = load(vm, [...look, ...look, ...hlt]);
    expect(await vcpu.run()).toMatchObject({ port: 1, data: Uint8Array.of(0x11) });
    expect(await vcpu.run()).toMatchObject({ port: 2, data: Uint8Array.of(0x22) });
    region.discard(0, 0x1000);
    expect(await vcpu.run()).toMatchObject({ port: 1, data: Uint8Array.of(0) });
    expect(await vcpu.run()).toMatchObject({ port: 2, data: Uint8Array.of(0x22) });
    expect([byteAt(vm, 0x8000), byteAt(vm, 0x9000)]).toEqual([0, 0x22]);
    expect(thrown(() => region.move(0xc000))).toMatchObject({ code: 'EINVAL' });
    region.delete();
  });

  test('guest_memfd out of our reach can be bound and punched', ({ vm, skip }) => {
    if (vm.checkExtension('KVM_CAP_GUEST_MEMFD') === 0) skip('no KVM_CAP_GUEST_MEMFD');
    const region = vm.memory.add({ gpa: 0x8000, size: 0x2000, backing: 'guest-memfd' });
    // What we see are the shared pages, which are plain memory.
    expect(mappedFile(region.hva)).toBe('');
    vm.memory.write(0x8000, Uint8Array.of(0x11));
    vm.memory.write(0x9000, Uint8Array.of(0x22));
    region.discard(0, 0x2000, 'private');
    expect([byteAt(vm, 0x8000), byteAt(vm, 0x9000)]).toEqual([0x11, 0x22]);
    region.discard(0x1000, 0x1000);
    expect([byteAt(vm, 0x8000), byteAt(vm, 0x9000)]).toEqual([0x11, 0]);
    expect(() => region.discard(0x800, 0x1000)).toThrow(RangeError);
    expect(() => region.discard(0, 0x1000, 'shared' as never)).toThrow(TypeError);
    const plain = vm.memory.add({ gpa: 0, size: 0x1000 });
    expect(() => plain.discard(0, 0x1000, 'private')).toThrow(/only a guest-memfd has private pages/);
  });

  test('setMemoryPrivate names the capability that a VM does not have', ({ vm }) => {
    expect(() => vm.setMemoryPrivate(-1, 0x1000, true)).toThrow(RangeError);
    expect(() => vm.setMemoryPrivate(0, 0x1000, 1 as never)).toThrow(TypeError);
    for (const isPrivate of [true, false]) {
      const refused = thrown(() => vm.setMemoryPrivate(0, 0x1000, isPrivate));
      expect(refused).toBeInstanceOf(KvmUnsupportedError);
      expect(refused).toMatchObject({
        capability: 'KVM_CAP_MEMORY_ATTRIBUTES',
        request: 'KVM_SET_MEMORY_ATTRIBUTES',
        code: 'EOPNOTSUPP',
        message: expect.stringMatching(/offer: make the VM with createVm.*CONFIG_KVM_SW_PROTECTED_VM$/),
      });
    }
  });

  test('what is no backing is a TypeError', ({ vm }) => {
    for (const backing of [
      'tape',
      'file',
      7,
      {},
      { type: 'anonymous', hugePages: 1 },
      [],
      { type: 'hugetlb', pageSize: 3 },
    ]) {
      expect(() => vm.memory.add({ gpa: 0, size: 0x1000, backing: backing as never })).toThrow(TypeError);
    }
  });
});

describe('page operations', () => {
  test('populate() makes pages, discard() takes them away', ({ vm }) => {
    const region = vm.memory.add({ gpa: 0, size: 0x4000, backing: { type: 'anonymous', hugePages: false } });
    const present = () => [...region.nodes()].map((node) => node >= 0);
    expect(present()).toEqual([false, false, false, false]);
    region.populate(0x1000, 0x2000);
    expect(present()).toEqual([false, true, true, false]);
    region.discard(0x1000, 0x1000);
    expect(present()).toEqual([false, false, true, false]);
    expect([...region.migrate(0, 0x2000, 0x1000)]).toEqual([0]);
    region.pageout();
    region.unmapPages();
    expect(present()).toEqual([false, false, false, false]);
    region.populate(0, 0x1000, 'read');
    expect(() => region.populate(0, 0x1000, 'dance' as never)).toThrow(TypeError);
    expect(() => region.migrate(-1)).toThrow(RangeError);
  });

  test('pageout() keeps the contents', ({ vm }) => {
    const region = vm.memory.add({ gpa: 0, size: 0x2000, backing: 'memfd' });
    vm.memory.write(0x1000, Uint8Array.of(0x5a));
    region.pageout();
    expect(byteAt(vm, 0x1000)).toBe(0x5a);
  });

  test('a protected range has no view, and the guest’s access fails', async ({ vm }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x3000 });
    vm.memory.write(0x9000, Uint8Array.of(0x5a));
    const before = region.window(0, 0x1000);
    const over = region.window(0x1800, 0x100);
    const whole = region.buffer;
    region.protect('none', 0x1000, 0x1000);
    expect([before.byteLength, over.byteLength, whole.byteLength]).toEqual([0x1000, 0, 0]);
    for (const use of [() => region.buffer, () => byteAt(vm, 0x9000), () => region.window(0x1fff, 1)]) {
      expect(use).toThrow(/^this range is protected/);
    }
    expect([byteAt(vm, 0x8fff), byteAt(vm, 0xa000)]).toEqual([0, 0]);
    const vcpu = load(vm, [...loadAl(0x9000), ...hlt]);
    const exit = await vcpu.run().catch((error) => error);
    if (exit instanceof KvmError) expect(exit).toMatchObject({ code: 'EFAULT', request: 'KVM_RUN' });
    else expect(['memory-fault', 'mmio']).toContain(exit.type);
    region.protect('read', 0x1000, 0x1000);
    expect(() => region.buffer).toThrow(RangeError);
    region.protect('read-write');
    expect(byteAt(vm, 0x9000)).toBe(0x5a);
    expect(region.buffer.byteLength).toBe(0x3000);
    expect(() => region.protect('x' as never)).toThrow(TypeError);
  });

  test('swap(): same slot and guest address, other memory', async ({ vm }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x1000, slot: 9 });
    vm.memory.write(0x8000, Uint8Array.of(0x5a));
    const { buffer, hva } = region;
    const vcpu = load(vm, [...loadAl(0x8000), ...outAl(1), ...loadAl(0x8000), ...outAl(2), ...hlt]);
    expect(region.backingSpec).toBe('anonymous');
    region.swap({ copy: true, backing: { type: 'memfd', hugePages: false } });
    expect(region.backingSpec).toEqual({ type: 'memfd', hugePages: false });
    expect(region.hva).not.toBe(hva);
    expect([region.slot, region.gpa, region.backing, buffer.byteLength]).toEqual([9, 0x8000, 'memfd', 0]);
    expect(await vcpu.run()).toMatchObject({ port: 1, data: Uint8Array.of(0x5a) });
    region.swap();
    expect(await vcpu.run()).toMatchObject({ port: 2, data: Uint8Array.of(0) });
    expect([region.backing, byteAt(vm, 0x8000)]).toEqual(['memfd', 0]);
    expect(vm.memory.regionAt(0x8fff)).toBe(region);
  });

  test('a swap that the kernel refuses leaves the region as it was', ({ vm }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x1000, logDirtyPages: true });
    vm.memory.write(0x8000, Uint8Array.of(0x5a));
    expect(thrown(() => region.swap({ backing: { type: 'file', fd: 9999 } }))).toMatchObject({
      code: 'EBADF',
    });
    expect([region.backing, byteAt(vm, 0x8000)]).toEqual(['anonymous', 0x5a]);
    if (vm.checkExtension('KVM_CAP_GUEST_MEMFD') === 0) return;
    // No dirty logging with guest_memfd.
    expect(thrown(() => region.swap({ backing: 'guest-memfd' }))).toMatchObject({ code: 'EINVAL' });
    expect([region.backing, byteAt(vm, 0x8000)]).toEqual(['anonymous', 0x5a]);
  });
});

describe('userfaultfd', () => {
  const whyNot = (error: unknown) =>
    error instanceof KvmError && error.code === 'EPERM' ? error.message : undefined;

  test('a vCPU waits for a missing page until it is filled', async ({ vm, skip }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x3000 });
    const view = region.buffer;
    let userfault: ReturnType<typeof region.watchFaults> | undefined;
    try {
      userfault = region.watchFaults({ offset: 0x1000, length: 0x2000 });
    } catch (error) {
      skip(whyNot(error) ?? '');
      throw error;
    }
    expect(view.byteLength).toBe(0);
    expect(() => byteAt(vm, 0x9000)).toThrow(/under userfaultfd/);
    expect(userfault.take()).toBeUndefined();
    const vcpu = load(vm, [...loadAl(0x9004), ...outAl(1), ...storeAl(0xa000), ...hlt]);
    const first = vcpu.run();
    expect(await userfault.read()).toEqual({ offset: 0x1000, write: false });
    userfault.copy(0x1000, new Uint8Array(0x1000).fill(0x6b));
    expect(await first).toMatchObject({ type: 'io', data: Uint8Array.of(0x6b) });
    const second = vcpu.run();
    const fault = await userfault.read();
    expect(fault.offset).toBe(0x2000);
    userfault.zero(0x2000);
    expect(await second).toEqual({ type: 'hlt' });
    expect(thrown(() => userfault.copy(0x2000, new Uint8Array(0x1000)))).toMatchObject({ code: 'EEXIST' });
    expect(() => userfault.zero(0)).toThrow(/outside the range/);
    expect(() => userfault.zero(0x1000, 10)).toThrow(/whole pages/);
    expect(() => region.watchFaults()).toThrow(/has a userfaultfd already/);
    userfault.close();
    expect([byteAt(vm, 0x9000), byteAt(vm, 0xa000)]).toEqual([0x6b, 0x6b]);
  });

  test('minor mode: the page is in the memfd, continue() maps it', async ({ vm, skip }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x1000, backing: 'memfd' });
    vm.memory.write(0x8000, Uint8Array.of(0x5a));
    region.unmapPages();
    let userfault: ReturnType<typeof region.watchFaults> | undefined;
    try {
      userfault = region.watchFaults({ mode: 'minor' });
    } catch (error) {
      skip(error instanceof Error ? error.message : '');
      throw error;
    }
    const vcpu = load(vm, [...loadAl(0x8000), ...outAl(1), ...hlt]);
    const run = vcpu.run();
    for await (const fault of userfault) {
      expect(fault.offset).toBe(0);
      userfault.continue(0);
      break;
    }
    expect(await run).toMatchObject({ type: 'io', data: Uint8Array.of(0x5a) });
  });

  test('closing the VM frees a vCPU that waits for a page, and who waits for a fault', async ({
    vm,
    skip,
  }) => {
    const region = vm.memory.add({ gpa: 0x8000, size: 0x1000 });
    let userfault: ReturnType<typeof region.watchFaults> | undefined;
    try {
      userfault = region.watchFaults();
    } catch (error) {
      skip(whyNot(error) ?? '');
      throw error;
    }
    const vcpu = load(vm, [...loadAl(0x8000), ...hlt]);
    const run = vcpu.run().catch((error) => error.name);
    await userfault.read();
    const next = userfault.read().catch((error) => error.name);
    vm.close();
    expect([await run, await next, userfault.closed]).toEqual(['KvmClosedError', 'KvmClosedError', true]);
  });
});
