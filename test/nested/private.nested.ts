// SPDX-License-Identifier: Apache-2.0
// Private memory: KVM_SET_MEMORY_ATTRIBUTES and the pages of a guest_memfd that only the guest sees. Every body needs a
// kernel with CONFIG_KVM_SW_PROTECTED_VM, which Debian's are not; docs/lab.md says how to build one. No L2 here:
// private_l2.nested.ts has one.
import assert from 'node:assert/strict';
import { type TestContext, test } from 'node:test';
import { Kvm, KvmClosedError, KvmUnsupportedError, VM_TYPE, type Vm } from '../../lib/kvm/index.ts';
import { whyNotPrivate } from './machine.ts';
import { CODE, expectOut, hlt, load, loadAl, out, run, store, vmcall } from './real_mode.ts';

const DATA = 0x8000;
const PAGE = 0x1000;
const LIMIT_MS = 15_000;
const ATTRIBUTE_PRIVATE = 8;
const EINVAL = { code: 'EINVAL', errno: -22, syscall: 'ioctl' };
const REFUSED = { ...EINVAL, request: 'KVM_SET_MEMORY_ATTRIBUTES' };

/** A byte of guest memory, shown on a port. */
const show = (port: number, address = DATA) => [...loadAl(address), ...out(port)];
const byteAt = (vm: Vm, gpa: number) => vm.memory.read(gpa, 1)[0];
/** The exit of an access to the private page `gpa` that is not there. */
const fault = (gpa: number) => ({
  type: 'memory-fault' as const,
  flags: 8n,
  isPrivate: true,
  gpa,
  size: PAGE,
  errno: -14,
});

function attributes(address: bigint, size: bigint, attributes: bigint, flags = 0n): Uint8Array {
  return new Uint8Array(BigUint64Array.of(address, size, attributes, flags).buffer);
}

function onPrivateVm(name: string, body: (vm: Vm, kvm: Kvm, context: TestContext) => unknown): void {
  test(name, async (context) => {
    using kvm = Kvm.open();
    const reason = whyNotPrivate(kvm);
    if (reason !== undefined) return context.skip(reason);
    using vm = kvm.createVm({ type: VM_TYPE['sw-protected'] });
    await body(vm, kvm, context);
    return undefined;
  });
}

onPrivateVm('a VM with private memory says so, one of the default type does not', (vm, kvm) => {
  using plain = kvm.createVm();
  const answers = [kvm, vm, plain].map((handle) => handle.checkExtension('KVM_CAP_MEMORY_ATTRIBUTES'));
  assert.deepEqual(answers, [ATTRIBUTE_PRIVATE, ATTRIBUTE_PRIVATE, 0]);
  assert.deepEqual(kvm.vmTypes(), ['default', 'sw-protected']);
  assert.deepEqual([vm.type, plain.type], [1, 0]);
  const refused = { capability: 'KVM_CAP_MEMORY_ATTRIBUTES', request: 'KVM_SET_MEMORY_ATTRIBUTES' };
  for (const isPrivate of [true, false]) {
    const set = () => plain.setMemoryPrivate(DATA, PAGE, isPrivate);
    assert.throws(set, KvmUnsupportedError);
    assert.throws(set, refused);
    assert.throws(set, /createVm\(\{ type: VM_TYPE\['sw-protected'\] \}\)/);
  }
  const raw = (bits: bigint) => plain.ioctl('KVM_SET_MEMORY_ATTRIBUTES', attributes(0x8000n, 0x1000n, bits));
  assert.throws(() => raw(8n), REFUSED);
  assert.equal(raw(0n), 0);
});

onPrivateVm('private pages are those of the guest_memfd, shared ones this process’s; both stay', (vm) => {
  vm.memory.add({ gpa: DATA, size: PAGE, backing: 'guest-memfd' });
  vm.memory.write(DATA, Uint8Array.of(0x5a));
  const vcpu = load(vm, [
    ...[...show(1), ...show(2), ...store(DATA, 0x77), ...show(3)],
    ...[...show(4), ...store(DATA, 0x3c), ...show(5), ...show(6), hlt],
  ]);
  expectOut(run(vcpu), 1, 0x5a);
  vm.setMemoryPrivate(DATA, PAGE, true);
  expectOut(run(vcpu), 2, 0);
  expectOut(run(vcpu), 3, 0x77);
  assert.equal(byteAt(vm, DATA), 0x5a);
  vm.memory.write(DATA, Uint8Array.of(0xa5));
  vm.setMemoryPrivate(DATA, PAGE, false);
  expectOut(run(vcpu), 4, 0xa5);
  expectOut(run(vcpu), 5, 0x3c);
  assert.equal(byteAt(vm, DATA), 0x3c);
  vm.setMemoryPrivate(DATA, PAGE, true);
  vm.setMemoryPrivate(DATA, PAGE, true);
  expectOut(run(vcpu), 6, 0x77);
  assert.deepEqual(run(vcpu), { type: 'hlt' });
  assert.equal(byteAt(vm, DATA), 0x3c);
});

onPrivateVm('the range is what was asked for, across slots', (vm) => {
  const pages = [0, 1, 2, 3].map((page) => DATA + page * PAGE);
  for (const gpa of [DATA, DATA + 2 * PAGE]) vm.memory.add({ gpa, size: 2 * PAGE, backing: 'guest-memfd' });
  for (const [index, gpa] of pages.entries()) vm.memory.write(gpa, Uint8Array.of(0x10 + index));
  const vcpu = load(vm, [
    ...pages.flatMap((gpa, index) => show(index, gpa)),
    ...pages.flatMap((gpa) => store(gpa + PAGE - 1, 0xee)),
    hlt,
  ]);
  vm.setMemoryPrivate(DATA + PAGE, 2 * PAGE, true);
  for (const [port, value] of [0x10, 0, 0, 0x13].entries()) expectOut(run(vcpu), port, value);
  assert.deepEqual(run(vcpu), { type: 'hlt' });
  const last = pages.map((gpa) => byteAt(vm, gpa + PAGE - 1));
  assert.deepEqual(last, [0xee, 0, 0, 0xee]);
});

onPrivateVm('code that the guest put into private memory runs there', (vm) => {
  vm.memory.add({ gpa: DATA, size: PAGE, backing: 'guest-memfd' });
  vm.setMemoryPrivate(DATA, PAGE, true);
  const inside = [0xb0, 0x33, ...out(1), hlt];
  const copy = [0xf3, 0xa4];
  const jump = [0xe9, ...new Uint8Array(Uint16Array.of(DATA - (CODE + copy.length + 3)).buffer)];
  const vcpu = load(vm, [...copy, ...jump, ...inside]);
  vcpu.setRegs({
    rsi: BigInt(CODE + copy.length + jump.length),
    rdi: BigInt(DATA),
    rcx: BigInt(inside.length),
  });
  expectOut(run(vcpu), 1, 0x33);
  assert.deepEqual(run(vcpu), { type: 'hlt' });
  assert.equal(vcpu.getRegs().rip, BigInt(DATA + inside.length));
  assert.deepEqual([...vm.memory.read(DATA, PAGE)], Array(PAGE).fill(0));
});

onPrivateVm('a hole takes the private page, or both; madvise takes the shared one', (vm) => {
  const region = vm.memory.add({ gpa: DATA, size: 2 * PAGE, backing: 'guest-memfd' });
  const fill = [...store(DATA, 0x77), ...store(DATA + PAGE, 0x78)];
  const look = [...show(1), ...show(2, DATA + PAGE)];
  const vcpu = load(vm, [...fill, ...look, ...look, ...look, ...look, ...fill, ...look, ...look, hlt]);
  const expectBytes = (first: number, second: number) => {
    expectOut(run(vcpu), 1, first);
    expectOut(run(vcpu), 2, second);
  };
  const host = () => [byteAt(vm, DATA), byteAt(vm, DATA + PAGE)];
  const write = () => {
    vm.memory.write(DATA, Uint8Array.of(0x51));
    vm.memory.write(DATA + PAGE, Uint8Array.of(0x52));
  };
  write();
  vm.setMemoryPrivate(DATA, 2 * PAGE, true);
  expectBytes(0x77, 0x78);
  region.discard(PAGE, PAGE, 'private');
  expectBytes(0x77, 0);
  assert.deepEqual(host(), [0x51, 0x52]);
  region.unmapPages(0, PAGE);
  expectBytes(0x77, 0);
  assert.deepEqual(host(), [0, 0x52]);
  vm.setMemoryPrivate(DATA, 2 * PAGE, false);
  expectBytes(0, 0x52);
  write();
  vm.setMemoryPrivate(DATA, 2 * PAGE, true);
  expectBytes(0x77, 0x78);
  region.discard(0, PAGE);
  expectBytes(0, 0x78);
  assert.deepEqual(host(), [0, 0x52]);
  assert.throws(() => region.discard(0x800, PAGE, 'private'), RangeError);
});

onPrivateVm(
  'private memory without a guest_memfd is a memory fault until there is one, or it is shared',
  (vm) => {
    const [plain, nowhere] = [DATA, 0xc000];
    vm.memory.add({ gpa: plain, size: PAGE });
    vm.memory.write(plain + 0x123, Uint8Array.of(0x5a));
    const vcpu = load(vm, [
      ...show(1, plain + 0x123),
      ...store(plain + 0xfff, 0x66),
      ...store(nowhere + 8, 0x67),
      ...show(2, nowhere + 8),
      hlt,
    ]);
    vm.setMemoryPrivate(plain, PAGE, true);
    vm.setMemoryPrivate(nowhere, PAGE, true);
    assert.deepEqual(run(vcpu), fault(plain));
    assert.deepEqual(run(vcpu), fault(plain));
    assert.equal(vcpu.getRegs().rip, BigInt(CODE));
    vm.setMemoryPrivate(plain, PAGE, false);
    expectOut(run(vcpu), 1, 0x5a);
    vm.setMemoryPrivate(plain, PAGE, true);
    assert.deepEqual(run(vcpu), fault(plain));
    assert.equal(byteAt(vm, plain + 0xfff), 0);
    vm.setMemoryPrivate(plain, PAGE, false);
    // No slot at all: not MMIO
    assert.deepEqual(run(vcpu), fault(nowhere));
    assert.equal(byteAt(vm, plain + 0xfff), 0x66);
    vm.memory.add({ gpa: nowhere, size: PAGE, backing: 'guest-memfd' });
    expectOut(run(vcpu), 2, 0x67);
    assert.equal(byteAt(vm, nowhere + 8), 0);
  },
);

onPrivateVm('a page where MMIO was is private once it was shared memory', (vm) => {
  const vcpu = load(vm, [...show(1), ...store(DATA, 0x77), ...out(2), ...store(DATA, 0x78), ...show(3), hlt]);
  const read = run(vcpu);
  assert(read.type === 'mmio' && !read.isWrite, read.type);
  assert.equal(read.address, DATA);
  read.data.set([0x44]);
  expectOut(run(vcpu), 1, 0x44);
  vm.memory.add({ gpa: DATA, size: PAGE, backing: 'guest-memfd' });
  vm.setMemoryPrivate(DATA, PAGE, true);
  const exit = run(vcpu);
  // A change of attributes leaves mappings of MMIO, and by such a one the access is a shared one (Linux 7.3)
  const isLeft = exit.type === 'memory-fault';
  if (isLeft) {
    assert.deepEqual(exit, { ...fault(DATA), flags: 0n, isPrivate: false });
    vm.setMemoryPrivate(DATA, PAGE, false);
    expectOut(run(vcpu), 2);
    vm.setMemoryPrivate(DATA, PAGE, true);
  } else {
    expectOut(exit, 2);
  }
  expectOut(run(vcpu), 3, 0x78);
  assert.equal(byteAt(vm, DATA), isLeft ? 0x77 : 0);
});

onPrivateVm('this process’s protection is for shared pages: EFAULT, and nothing to private ones', (vm) => {
  const bare = DATA + 2 * PAGE;
  const region = vm.memory.add({ gpa: DATA, size: 2 * PAGE, backing: 'guest-memfd' });
  vm.memory.add({ gpa: bare, size: PAGE });
  vm.memory.write(DATA, Uint8Array.of(0x5a));
  const vcpu = load(vm, [...show(1), ...show(2, bare), ...show(3, DATA + PAGE), hlt]);
  const refused = { code: 'EFAULT', errno: -14, request: 'KVM_RUN' };
  region.protect('none', 0, 2 * PAGE);
  assert.throws(() => run(vcpu), refused);
  vm.setMemoryPrivate(DATA, 3 * PAGE, true);
  expectOut(run(vcpu), 1, 0);
  assert.deepEqual(run(vcpu), fault(bare));
  vm.setMemoryPrivate(DATA + PAGE, 2 * PAGE, false);
  expectOut(run(vcpu), 2, 0);
  // Not the memory fault of before, which is still in struct kvm_run
  assert.throws(() => run(vcpu), refused);
  region.protect('read-write');
  expectOut(run(vcpu), 3, 0);
  assert.equal(byteAt(vm, DATA), 0x5a);
});

onPrivateVm('the guest asks for a conversion by hypercall, and gets it', (vm) => {
  const [MAP_GPA_RANGE, ENCRYPTED] = [12, 0x10n];
  vm.enableCap('KVM_CAP_EXIT_HYPERCALL', { args: [1n << BigInt(MAP_GPA_RANGE)] });
  vm.memory.add({ gpa: DATA, size: 2 * PAGE, backing: 'guest-memfd' });
  vm.memory.write(DATA, Uint8Array.of(0x5a));
  const call = (attribute: number) => [
    ...[0xb8, MAP_GPA_RANGE, 0, 0xbb, DATA & 0xff, DATA >> 8, 0xb9, 2, 0, 0xba, attribute, 0],
    ...vmcall,
    ...out(0x10),
  ];
  const vcpu = load(vm, [...show(1), ...call(0x10), ...show(2), ...call(0), ...show(3), hlt]);
  const convert = (isPrivate: boolean) => {
    const exit = run(vcpu);
    assert(exit.type === 'hypercall', exit.type);
    assert.deepEqual(
      [exit.nr, ...exit.args.slice(0, 3)],
      [12n, BigInt(DATA), 2n, isPrivate ? ENCRYPTED : 0n],
    );
    const [gpa, pages, attributes] = exit.args.map(Number) as [number, number, number];
    vm.setMemoryPrivate(gpa, pages * PAGE, (attributes & Number(ENCRYPTED)) !== 0);
    vcpu.kvmRun.answerHypercall(0n);
    expectOut(run(vcpu), 0x10, 0);
  };
  expectOut(run(vcpu), 1, 0x5a);
  convert(true);
  expectOut(run(vcpu), 2, 0);
  convert(false);
  expectOut(run(vcpu), 3, 0x5a);
});

onPrivateVm('memory becomes private beneath a guest that runs', async (vm) => {
  vm.memory.add({ gpa: DATA, size: PAGE, backing: 'guest-memfd' });
  vm.memory.write(DATA, Uint8Array.of(1));
  // Until the byte is 0: MOV AL, [DATA]; TEST AL, AL; JNZ
  const wait = [...loadAl(DATA), 0x84, 0xc0, 0x75, 0xf9];
  const vcpu = load(vm, [...out(1), ...wait, ...out(2), hlt]);
  expectOut(run(vcpu), 1);
  const running = vcpu.run({ signal: AbortSignal.timeout(LIMIT_MS) });
  await new Promise((resolve) => setTimeout(resolve, 20));
  assert.equal(vcpu.state, 'running');
  vm.setMemoryPrivate(DATA, PAGE, true);
  expectOut(await running, 2, 0);
  assert.equal(byteAt(vm, DATA), 1);
});

onPrivateVm('a slot that is swapped or made again stays private and is empty', (vm) => {
  const region = vm.memory.add({ gpa: DATA, size: PAGE, backing: 'guest-memfd' });
  vm.memory.write(DATA, Uint8Array.of(0x5a));
  vm.setMemoryPrivate(DATA, PAGE, true);
  const vcpu = load(vm, [...store(DATA, 0x77), ...show(1), ...show(2), ...show(3), ...show(4), hlt]);
  expectOut(run(vcpu), 1, 0x77);
  region.swap({ copy: true });
  assert.equal(byteAt(vm, DATA), 0x5a);
  expectOut(run(vcpu), 2, 0);
  region.delete();
  assert.deepEqual(run(vcpu), fault(DATA));
  vm.memory.add({ gpa: DATA, size: PAGE, backing: 'guest-memfd' });
  expectOut(run(vcpu), 3, 0);
  vm.setMemoryPrivate(DATA, PAGE, false);
  vm.memory.write(DATA, Uint8Array.of(0x21));
  expectOut(run(vcpu), 4, 0x21);
});

onPrivateVm('a VM with private memory is not cloned or rewound, with shared memory it is', (vm) => {
  vm.memory.add({ gpa: DATA, size: 4 * PAGE, backing: 'guest-memfd' });
  vm.memory.write(DATA, Uint8Array.of(0x5a));
  const vcpu = load(vm, [...show(1), ...show(2), hlt]);
  expectOut(run(vcpu), 1, 0x5a);
  using clone = vm.clone();
  assert.equal(clone.type, VM_TYPE['sw-protected']);
  expectOut(run(clone.vcpus[0]!), 2, 0x5a);
  const refused = /private memory, whose contents only its guest can read/;
  vm.setMemoryPrivate(DATA, 4 * PAGE, true);
  assert.throws(() => vm.clone(), RangeError);
  for (const call of [() => vm.clone(), () => vm.rewind(clone), () => clone.rewind(vm)])
    assert.throws(call, refused);
  vm.setMemoryPrivate(DATA + PAGE, PAGE, false);
  vm.setMemoryPrivate(DATA, PAGE, false);
  assert.throws(() => vm.clone(), refused);
  // From where nothing is private to where nothing is; also by the request itself
  vm.ioctl('KVM_SET_MEMORY_ATTRIBUTES', attributes(0x9000n, 0x4000n, 0n));
  vm.rewind(clone);
  assert.deepEqual(run(vcpu), { type: 'hlt' });
});

onPrivateVm('what KVM refuses of private memory, and how', (vm) => {
  const gpa = 0x2_0000;
  for (const [from, size] of [
    [gpa, 0],
    [gpa, 0x800],
    [gpa + 0x800, PAGE],
    [gpa + 1, PAGE - 1],
  ] as const) {
    assert.throws(() => vm.setMemoryPrivate(from, size, true), REFUSED);
    assert.throws(() => vm.setMemoryPrivate(from, size, false), REFUSED);
  }
  const raw = (...words: [bigint, bigint, bigint, bigint?]) =>
    vm.ioctl('KVM_SET_MEMORY_ATTRIBUTES', attributes(...words));
  for (const bits of [1n, 2n, 4n, 9n, 16n]) assert.throws(() => raw(0x2_0000n, 0x1000n, bits), REFUSED);
  assert.throws(() => raw(0x2_0000n, 0x1000n, 8n, 1n), REFUSED);
  assert.throws(() => raw(0xffff_ffff_ffff_f000n, 0x2000n, 8n), REFUSED);
  assert.throws(() => vm.setMemoryPrivate(gpa, -PAGE, true), RangeError);
  assert.throws(() => vm.setMemoryPrivate(gpa, PAGE, 'yes' as never), TypeError);
  const add = (options: object) => () =>
    vm.memory.add({ gpa, size: 2 * PAGE, backing: 'guest-memfd', ...options });
  const SLOT = { ...EINVAL, request: 'KVM_SET_USER_MEMORY_REGION2' };
  assert.throws(add({ readOnly: true }), SLOT);
  assert.throws(add({ logDirtyPages: true }), SLOT);
  const mapped = add({ backing: { type: 'guest-memfd', mmap: true } });
  assert.throws(mapped, { ...EINVAL, request: 'KVM_CREATE_GUEST_MEMFD' });
  const region = add({})();
  for (const change of [
    () => region.setFlags({ logDirtyPages: true }),
    () => region.setFlags({ readOnly: true }),
    () => region.move(gpa + 2 * PAGE),
  ])
    assert.throws(change, SLOT);
  assert.deepEqual([region.gpa, region.logDirtyPages, region.readOnly], [gpa, false, false]);
  const plain = vm.memory.add({ gpa: DATA, size: PAGE });
  assert.throws(() => plain.discard(0, PAGE, 'private'), /only a guest-memfd has private pages.*anonymous/);
  assert.throws(() => region.discard(0, PAGE, 'shared' as never), TypeError);
  vm.close();
  assert.throws(() => vm.setMemoryPrivate(gpa, PAGE, true), KvmClosedError);
});
