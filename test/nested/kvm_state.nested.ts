// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { foldChecksum, type L1, type L2 } from '../../lib/guest/index.ts';
import { Kvm, type Vcpu, type VcpuSnapshot } from '../../lib/kvm/index.ts';
import { exitOf, progressOf, syncOf, withL1 } from './machine.ts';

const GUEST_MODE = 1;

const inGuestMode = (vcpu: Vcpu) => {
  const bytes = vcpu.getNestedState();
  return (new DataView(bytes.buffer, bytes.byteOffset).getUint16(0, true) & GUEST_MODE) !== 0;
};

/** L2 in a loop that ends when the word at `page` is 1; the vCPU is idle and L2 active. */
async function spinningL2(l1: L1): Promise<{ l2: L2; page: number; vcpu: Vcpu }> {
  const page = l1.allocate();
  const l2 = await l1.createL2({ vpid: 5, msrBitmap: true }, (program) =>
    program.fold(1).sync(1).spin(page, 4, 1).fold(2).vmcall(),
  );
  syncOf(await l2.enter());
  const abort = new AbortController();
  setTimeout(() => abort.abort(new Error('kicked')), 10);
  await assert.rejects(l2.continue({ signal: abort.signal }), /kicked/);
  const { vcpu } = l1.cpu(0);
  assert(inGuestMode(vcpu));
  return { l2, page, vcpu };
}

// Where struct vmcs12 has the guest-linear address: what the CPU last wrote on an exit, which no restore can redo.
const GUEST_LINEAR_ADDRESS = 128 + 416;

/** Parts that differ, with the offsets of their first different bytes. The LAPIC's timer and the TSC go on. */
function differences(a: VcpuSnapshot, b: VcpuSnapshot): string[] {
  const parts = ['nested', 'regs', 'events', 'xsave', 'debugRegs', 'mpState', 'cpuid'] as const;
  const pairs = parts.map((name) => [name, a[name]!, b[name]!] as const);
  return [...pairs, ['sregs', a.sregs.bytes, b.sregs.bytes] as const].flatMap(([name, left, right]) => {
    const isNoise = (index: number) =>
      name === 'nested' && index >= GUEST_LINEAR_ADDRESS && index < GUEST_LINEAR_ADDRESS + 8;
    const at = [...left.keys()].filter((index) => left[index] !== right[index] && !isNoise(index));
    if (left.length === right.length && at.length === 0) return [];
    const bytes = at.slice(0, 8).map((index) => `${index}: ${left[index]} for ${right[index]}`);
    return [`${name} (${left.length}, ${right.length} bytes) at ${bytes.join(', ')}`];
  });
}

test('a vCPU with an active L2 is saved, thrown out of VMX operation and restored', () =>
  withL1({}, async (l1) => {
    const { l2, page, vcpu } = await spinningL2(l1);
    const snapshot = vcpu.save();
    const clean = new Uint8Array(128);
    clean[4] = 128;
    clean.fill(0xff, 8, 24);
    vcpu.setNestedState(clean);
    vcpu.setRegs({ rip: 0n, rsp: 0n, rax: 0xdeadn });
    assert(!inGuestMode(vcpu));
    vcpu.restore(structuredClone(snapshot));
    assert(inGuestMode(vcpu));
    assert.deepEqual(differences(vcpu.save(), snapshot), []);
    new DataView(l1.memory.buffer).setUint32(page, 1, true);
    exitOf(await l2.continue(), 'vmcall');
    progressOf(l2, { executed: 4, checksum: foldChecksum([1, 2]) });
  }));

test('a VM with an active L2 is cloned: the clone’s L2 ends, the source’s goes on', () =>
  withL1({}, async (l1) => {
    const { l2, page, vcpu } = await spinningL2(l1);
    using kvm = Kvm.open();
    using clone = kvm.cloneVm(l1.vm);
    const twin = clone.vcpus[vcpu.id]!;
    assert(inGuestMode(twin) && inGuestMode(vcpu));
    clone.memory.write(page, Uint8Array.of(1, 0, 0, 0));
    // L2 leaves its loop and exits to L1, which reports on its port.
    const exit = await twin.run();
    assert.equal(exit.type, 'io');
    assert(!inGuestMode(twin));
    assert(inGuestMode(vcpu));
    progressOf(l2, { executed: 2, pc: 2 });
    new DataView(l1.memory.buffer).setUint32(page, 1, true);
    exitOf(await l2.continue(), 'vmcall');
    progressOf(l2, { executed: 4, checksum: foldChecksum([1, 2]) });
  }));

test('a guest that spins with interrupts off is kicked', async () => {
  using kvm = Kvm.open();
  using vm = kvm.createVm();
  vm.memory.add({ gpa: 0x1000, size: 0x1000 });
  vm.memory.write(0x1000, Uint8Array.from([0xeb, 0xfe]));
  const vcpu = vm.createVcpu(0);
  vcpu.setSregs({ cs: { base: 0n, selector: 0 } });
  vcpu.setRegs({ rip: 0x1000n, rflags: 2n });
  const run = vcpu.run();
  setTimeout(() => vcpu.kick(), 5);
  assert.deepEqual(await run, { type: 'interrupted' });
  assert.equal(vcpu.getRegs().rip, 0x1000n);
});
