// SPDX-License-Identifier: Apache-2.0
// A guest_memfd of a VM without private memory (Linux 6.18): which pages KVM takes, this process's or the file's. No L2.
// What a VM with private memory does is in private.nested.ts.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { type TestContext, test } from 'node:test';
import { Kvm, type MemoryRegion, type Vm } from '../../lib/kvm/index.ts';
import { expectOut, hlt, load, loadAl, out, run, store } from './real_mode.ts';

const DATA = 0x8000;
const PAGE = 0x1000;
const SLOT = { code: 'EINVAL', request: 'KVM_SET_USER_MEMORY_REGION2' };
const MAPPED = { type: 'guest-memfd', mmap: true } as const;

const show = (port: number, address = DATA) => [...loadAl(address), ...out(port)];
const byteAt = (vm: Vm, gpa: number) => vm.memory.read(gpa, 1)[0];

function mappedFile({ hva }: MemoryRegion): string {
  for (const line of readFileSync('/proc/self/maps', 'utf8').split('\n')) {
    const [, from, to, file] = /^(\w+)-(\w+) \S+ \w+ \S+ \d+ *(.*)$/.exec(line) ?? [];
    if (from && BigInt(`0x${from}`) <= hva && hva < BigInt(`0x${to}`)) return file!;
  }
  throw new Error('nothing is mapped there');
}

function onVm(name: string, body: (vm: Vm, context: TestContext) => unknown): void {
  test(name, (context) => {
    using kvm = Kvm.open();
    using vm = kvm.createVm();
    if ((vm.checkExtension('KVM_CAP_GUEST_MEMFD_FLAGS') & 3) !== 3)
      return context.skip('no KVM_CAP_GUEST_MEMFD_FLAGS with mmap: the kernel must be Linux 6.18 or later');
    body(vm, context);
    return undefined;
  });
}

onVm('a mapped guest_memfd is one memory, and KVM takes it from the file', (vm) => {
  const region = vm.memory.add({ gpa: DATA, size: 2 * PAGE, backing: MAPPED });
  assert.match(mappedFile(region), /gmem|guest_memfd/);
  vm.memory.write(DATA, Uint8Array.of(0x11));
  const vcpu = load(vm, [
    ...[...show(1), ...store(DATA + PAGE, 0x22), ...show(2, DATA + PAGE)],
    ...[...show(3), ...show(4), ...show(5), ...show(6, DATA + PAGE), hlt],
  ]);
  expectOut(run(vcpu), 1, 0x11);
  expectOut(run(vcpu), 2, 0x22);
  assert.equal(byteAt(vm, DATA + PAGE), 0x22);
  region.unmapPages();
  expectOut(run(vcpu), 3, 0x11);
  // Not by this process's address: its protection is nothing to the guest
  region.protect('none');
  expectOut(run(vcpu), 4, 0x11);
  region.protect('read-write');
  assert.equal(byteAt(vm, DATA), 0x11);
  region.discard(0, PAGE, 'private');
  expectOut(run(vcpu), 5, 0);
  assert.equal(byteAt(vm, DATA), 0);
  expectOut(run(vcpu), 6, 0x22);
  assert.deepEqual(run(vcpu), { type: 'hlt' });
});

onVm('an unmapped guest_memfd is not seen: all of its pages are shared, and this process’s', (vm) => {
  const region = vm.memory.add({ gpa: DATA, size: PAGE, backing: 'guest-memfd' });
  assert.equal(mappedFile(region), '');
  vm.memory.write(DATA, Uint8Array.of(0x11));
  const vcpu = load(vm, [...show(1), ...show(2), ...show(3), ...show(4), hlt]);
  expectOut(run(vcpu), 1, 0x11);
  region.discard(0, PAGE, 'private');
  expectOut(run(vcpu), 2, 0x11);
  region.protect('none');
  assert.throws(() => run(vcpu), { code: 'EFAULT', errno: -14, request: 'KVM_RUN' });
  region.protect('read-write');
  expectOut(run(vcpu), 3, 0x11);
  region.discard();
  expectOut(run(vcpu), 4, 0);
});

onVm('a slot of a guest_memfd cannot be changed, but swapped and cloned', (vm) => {
  const gpa = DATA;
  const region = vm.memory.add({ gpa, size: PAGE, backing: MAPPED });
  for (const change of [
    () => region.move(gpa + PAGE),
    () => region.setFlags({ logDirtyPages: true }),
    () => region.setFlags({ readOnly: true }),
    () => region.setFlags({}),
    () => vm.memory.add({ gpa: gpa + PAGE, size: PAGE, backing: MAPPED, logDirtyPages: true }),
    () => vm.memory.add({ gpa: gpa + PAGE, size: PAGE, backing: MAPPED, readOnly: true }),
  ])
    assert.throws(change, SLOT);
  vm.memory.write(gpa, Uint8Array.of(0x11));
  const vcpu = load(vm, [...show(1), ...show(2), ...show(3), hlt]);
  using clone = vm.clone();
  clone.memory.write(gpa, Uint8Array.of(0x33));
  expectOut(run(vcpu), 1, 0x11);
  expectOut(run(clone.vcpus[0]!), 1, 0x33);
  region.swap({ copy: true, backing: 'memfd' });
  expectOut(run(vcpu), 2, 0x11);
  region.setFlags({ logDirtyPages: true });
  region.setFlags({ logDirtyPages: false });
  region.swap({ backing: MAPPED });
  assert.match(mappedFile(region), /gmem|guest_memfd/);
  expectOut(run(vcpu), 3, 0);
});
