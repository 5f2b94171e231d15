// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { foldChecksum, INVEPT, offeredControls, VMX_CAPABILITY_MSRS } from '../../lib/guest/index.ts';
import { Kvm } from '../../lib/kvm/index.ts';
import { exitOf, nestedRuns, progressOf, withL1 } from './machine.ts';

const SYSENTER_ESP = 0x175;
const KERNEL_GS_BASE = 0xc000_0102;

test('MSR bitmap: exactly the intercepted accesses exit', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({ msrBitmap: true }, (program) =>
      program.loop(4, (body) =>
        body
          .wrmsr(SYSENTER_ESP, 0x5000)
          .rdmsr(SYSENTER_ESP)
          .wrmsr(KERNEL_GS_BASE, 0x6000)
          .rdmsr(KERNEL_GS_BASE),
      ),
    );
    const policy = { rdmsr: 'skip', wrmsr: 'skip' } as const;
    const counts = () => [l2.exitCount('rdmsr'), l2.exitCount('wrmsr')];
    exitOf(await l2.enter({ policy }), 'vmcall');
    assert.deepEqual(counts(), [0, 0]);
    progressOf(l2, {
      checksum: foldChecksum([0x5000, 0x6000, 0x5000, 0x6000, 0x5000, 0x6000, 0x5000, 0x6000]),
    });

    l2.msrBitmap!.interceptRead(SYSENTER_ESP);
    l2.msrBitmap!.interceptWrite(KERNEL_GS_BASE);
    l2.control.setU32('pc', 0);
    exitOf(await l2.enter({ policy }), 'vmcall');
    assert.deepEqual(counts(), [4, 4]);

    l2.msrBitmap!.interceptRead(SYSENTER_ESP, false);
    l2.control.setU32('pc', 0);
    exitOf(await l2.enter({ policy }), 'vmcall');
    assert.deepEqual(counts(), [4, 8]);
    assert.equal(nestedRuns(l1), 3 + 8 + 4);
  }));

test('without an MSR bitmap every access exits', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({}, (program) =>
      program.rdmsr(SYSENTER_ESP).wrmsr(SYSENTER_ESP, 1).vmcall(),
    );
    exitOf(await l2.enter({ policy: { rdmsr: 'skip', wrmsr: 'skip' } }), 'vmcall');
    assert.deepEqual(
      [...l2.exitCounts()],
      [
        ['vmcall', 1],
        ['rdmsr', 1],
        ['wrmsr', 1],
      ],
    );
  }));

test('APIC-access page: every access exits, with its offset and kind', () =>
  withL1({}, async (l1) => {
    const gpa = 0xc000_0000;
    const page = l1.vm.memory.add({ gpa, size: 4096 });
    const l2 = await l1.createL2({ apicAccess: gpa, vpid: 1, msrBitmap: true }, (program) =>
      program
        .write32(gpa + 0x80, 0x55)
        .read32(gpa + 0x300)
        .write32(gpa + 0x80, 0x66)
        .vmcall(),
    );
    const write = exitOf(await l2.enter({ policy: { 'apic-access': 'advance' } }), 'apic-access');
    assert.equal(write.qualification, 0x1080n);
    const read = exitOf(await l2.enter({ policy: { 'apic-access': 'advance' } }), 'apic-access');
    assert.equal(read.qualification, 0x300n);
    exitOf(await l2.enter({ policy: { 'apic-access': 'skip' } }), 'vmcall');
    assert.equal(l2.exitCount('apic-access'), 3);
    assert.equal(nestedRuns(l1), 4);
    assert.equal(await l2.vmread('APIC_ACCESS_ADDR'), BigInt(gpa));
    assert.deepEqual(Buffer.from(page.buffer), Buffer.alloc(4096), 'no access reached the page');
  }));

test('without the APIC-access control the same page is plain memory', () =>
  withL1({}, async (l1) => {
    const gpa = 0xc000_0000;
    const page = l1.vm.memory.add({ gpa, size: 4096 });
    const l2 = await l1.createL2({}, (program) => program.write32(gpa + 0x80, 0x55).vmcall());
    exitOf(await l2.enter(), 'vmcall');
    assert.equal(new DataView(page.buffer).getUint32(0x80, true), 0x55);
  }));

test('VPID is on in the controls and in the VMCS', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({ vpid: 0x1234 }, (program) => program.vmcall());
    exitOf(await l2.enter(), 'vmcall');
    assert.equal(await l2.vmread('VIRTUAL_PROCESSOR_ID'), 0x1234n);
    assert.equal((await l2.vmread('SECONDARY_VM_EXEC_CONTROL')) & 0x22n, 0x22n);
    const without = await l1.createL2({}, (program) => program.vmcall());
    assert.equal((await without.vmread('SECONDARY_VM_EXEC_CONTROL')) & 0x22n, 0x02n);
  }));

test('EPT violation: address and kind, and L2 goes on once the page is there', () =>
  withL1({}, async (l1) => {
    const page = l1.allocate();
    l1.ept.unmap(page);
    const l2 = await l1.createL2({}, (program) =>
      program
        .write32(page + 0x123 * 4, 77)
        .read32(page + 0x123 * 4)
        .vmcall(),
    );
    const exit = exitOf(await l2.enter(), 'ept-violation');
    assert.equal(exit.guestPhysicalAddress, page + 0x48c);
    assert.equal(exit.guestLinearAddress, BigInt(page + 0x48c));
    assert.equal(exit.qualification & 0x3fn, 0b10n, 'a write to a page without permissions');
    l1.ept.map(page);
    await l2.cpu.invept(INVEPT.singleContext, l1.ept.pointer);
    exitOf(await l2.enter(), 'vmcall');
    progressOf(l2, { checksum: foldChecksum([77]) });
  }));

test('TPR shadow: CR8 of L2 lives in the virtual-APIC page', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({ virtualApic: true }, (program) => program.writeCr8(5).readCr8().vmcall());
    exitOf(await l2.enter(), 'vmcall');
    progressOf(l2, { checksum: foldChecksum([5]) });
    assert.equal(l1.bytes(l2.virtualApic! + 0x80, 1)[0], 0x50);
  }));

test("L1's own view of the VMX controls is the one /dev/kvm reports", () =>
  withL1({}, async (l1) => {
    using kvm = Kvm.open();
    const known = new Set(kvm.featureMsrIndices());
    const system = offeredControls(
      kvm.readFeatureMsrs(VMX_CAPABILITY_MSRS.filter((index) => known.has(index))),
    );
    const seen = await l1.controls();
    const names = Object.keys(system) as (keyof typeof system)[];
    assert.deepEqual(Object.fromEntries(names.map((name) => [name, seen.allows(name)])), system);
    assert.equal(system['secondary.enable-vpid'], true);
  }));
