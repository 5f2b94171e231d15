// SPDX-License-Identifier: Apache-2.0
// The options of an L2, each by what L1 and L2 then see.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { foldChecksum, type GuestFault, INVEPT, type L2Program } from '../../lib/guest/index.ts';
import { exitOf, nestedRuns, progressOf, syncOf, withL1 } from './machine.ts';

const SYSENTER_ESP = 0x175;
const KERNEL_GS_BASE = 0xc000_0102;
const NOTIFICATION = 0xf2;
const X2APIC_EOI = 0x80b;

test('I/O bitmap: exactly the intercepted ports exit, decoded', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({ ioBitmap: true }, (program) =>
      program.out8(0x8001, 7).in16(0x60).out32(0x1234, 5),
    );
    for (const port of [0x8001, 0x60, 0x1234]) l2.ioBitmap!.intercept(port);
    const policy = { 'io-instruction': 'advance' } as const;
    const seen = [];
    for (let i = 0; i < 3; i += 1) seen.push(exitOf(await l2.enter({ policy }), 'io-instruction').detail);
    const common = { reason: 'io-instruction', string: false, rep: false, portOperand: 'dx' };
    assert.deepEqual(seen, [
      { ...common, port: 0x8001, size: 1, direction: 'out' },
      { ...common, port: 0x60, size: 2, direction: 'in' },
      { ...common, port: 0x1234, size: 4, direction: 'out' },
    ]);
    exitOf(await l2.enter(), 'vmcall');
    l2.ioBitmap!.intercept(0x1234, 1, false);
    l2.control.setU32('pc', 2);
    const stop = await l2.enter();
    assert(stop.kind === 'kvm-exit' && stop.exit.type === 'io');
    assert.equal(stop.exit.port, 0x1234);
    exitOf(await l2.continue(), 'vmcall');
  }));

test('an event injected at entry reaches L2: interrupt, NMI, exception', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({}, (program) => program.vmcall(1).vmcall(2).vmcall(3));
    await l2.inject({ type: 'external-interrupt', vector: 0x41 });
    exitOf(await l2.enter(), 'vmcall');
    assert.equal(l2.interruptCount(0x41), 1);
    assert.equal((await l2.vmread('VM_ENTRY_INTR_INFO_FIELD')) >> 31n, 0n, 'the exit clears the valid bit');
    await l2.inject({ type: 'nmi', vector: 2 });
    exitOf(await l2.enter(), 'vmcall');
    assert.deepEqual([l2.interruptCount(0x41), l2.interruptCount(2)], [1, 1]);
    await l2.inject({ type: 'hardware-exception', vector: 13, errorCode: 0x58 });
    await assert.rejects(l2.enter(), (error: unknown) => {
      const { level, vector, errorCode } = error as GuestFault;
      assert.deepEqual({ level, vector, errorCode }, { level: 'L2', vector: 13, errorCode: 0x58n });
      return true;
    });
  }));

test('an exception that the bitmap names exits with vector and error code', () =>
  withL1({}, async (l1) => {
    const { address } = l1.images.l2.symbol('fault_pf');
    const l2 = await l1.createL2({ exceptionBitmap: 1 << 14 }, (program) => program.call(address));
    const { detail } = exitOf(await l2.enter(), 'exception-or-nmi');
    assert.deepEqual(detail, {
      reason: 'exception-or-nmi',
      event: { type: 'hardware-exception', vector: 14, errorCode: 2, nmiUnblocking: false },
      qualification: 0x40_0000_0000n,
    });
  }));

test('TPR threshold: lowering CR8 below it exits', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({ tprThreshold: 4 }, (program) => program.writeCr8(3).vmcall());
    l2.vapic!.tpr = 0x80;
    exitOf(await l2.enter(), 'tpr-below-threshold');
    assert.equal(l2.vapic!.tpr, 0x30);
    await l2.vmwrite('TPR_THRESHOLD', 3);
    exitOf(await l2.enter(), 'vmcall');
  }));

test('preemption timer: an L2 that never stops exits', () =>
  withL1({}, async (l1) => {
    const page = l1.allocate();
    const l2 = await l1.createL2({ preemptionTimer: 1000 }, (program) => program.spin(page, 4, 1).vmcall());
    exitOf(await l2.enter(), 'vmx-preemption-timer');
    assert.equal(l2.progress.executed, 0);
    l1.bytes(page, 1)[0] = 1;
    await l2.vmwrite('VMX_PREEMPTION_TIMER_VALUE', 0xffff_ffff);
    exitOf(await l2.enter(), 'vmcall');
  }));

test('MSR lists: loaded at entry, stored and loaded at exit', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2(
      {
        msrBitmap: true,
        entryLoadMsrs: [[KERNEL_GS_BASE, 0x1111n]],
        exitStoreMsrs: [KERNEL_GS_BASE, SYSENTER_ESP],
        exitLoadMsrs: [[KERNEL_GS_BASE, 0x3333n]],
      },
      (program) =>
        program.rdmsr(KERNEL_GS_BASE).wrmsr(KERNEL_GS_BASE, 0x2222).wrmsr(SYSENTER_ESP, 0x4444).vmcall(),
    );
    exitOf(await l2.enter(), 'vmcall');
    progressOf(l2, { checksum: foldChecksum([0x1111]) });
    assert.equal(l2.structures.exitStoreMsrs!.get(KERNEL_GS_BASE), 0x2222n);
    assert.equal(l2.structures.exitStoreMsrs!.get(SYSENTER_ESP), 0x4444n);
    assert.equal(await l1.cpu(0).rdmsr(KERNEL_GS_BASE), 0x3333n);
  }));

test('an EPT of its own: other memory, permissions, misconfiguration, the other L2 unmoved', () =>
  withL1({}, async (l1) => {
    const [page, other] = [l1.allocate(), l1.allocate()];
    new DataView(l1.memory.buffer).setUint32(page, 11, true);
    new DataView(l1.memory.buffer).setUint32(other, 22, true);
    const ept = l1.createEpt();
    ept.map(page, other);
    const build = (program: L2Program) => program.read32(page).write32(page, 33).vmcall();
    const own = await l1.createL2({ ept }, build);
    const common = await l1.createL2({}, build);
    ept.protect(page, { write: false });
    const violation = exitOf(await own.enter(), 'ept-violation');
    assert.deepEqual(violation.detail, {
      reason: 'ept-violation',
      guestPhysicalAddress: page,
      guestLinearAddress: BigInt(page),
      read: false,
      write: true,
      execute: false,
      allowed: { read: true, write: false, execute: true },
      translated: true,
      nmiUnblocking: false,
    });
    ept.misconfigure(page);
    await own.cpu.invept(INVEPT.singleContext, ept.pointer);
    const broken = exitOf(await own.enter(), 'ept-misconfiguration');
    assert.deepEqual(broken.detail, { reason: 'ept-misconfiguration', guestPhysicalAddress: page });
    ept.map(page, other);
    await own.cpu.invept(INVEPT.singleContext, ept.pointer);
    exitOf(await own.enter(), 'vmcall');
    exitOf(await common.enter(), 'vmcall');
    progressOf(own, { checksum: foldChecksum([22]) });
    progressOf(common, { checksum: foldChecksum([11]) });
    const words = [page, other].map((at) => new DataView(l1.memory.buffer).getUint32(at, true));
    assert.deepEqual(words, [33, 33]);
  }));

for (const pageSize of ['4K', '2M', '1G'] as const) {
  test(`an EPT of ${pageSize} pages with accessed and dirty flags`, () =>
    withL1({ memory: 32 * 1024 * 1024 }, async (l1) => {
      const [read, written, untouched] = [0xc000_0000, 0xc020_0000, 0xc040_0000];
      l1.vm.memory.add({ gpa: read, size: 0x60_0000 });
      // the identity of 4 GiB in 4 KiB pages would take 2048 tables
      const ept = l1.createEpt({ accessedDirty: true, ...(pageSize === '4K' ? {} : { pageSize }) });
      if (pageSize === '4K') for (const gpa of [read, written, untouched]) ept.split(gpa);
      const l2 = await l1.createL2({ ept }, (program) => program.read32(read).write32(written, 1).vmcall());
      assert.deepEqual(
        [ept.entry(read).level, ept.flags(read)],
        [{ '4K': 1, '2M': 2, '1G': 3 }[pageSize], { accessed: false, dirty: false }],
      );
      exitOf(await l2.enter(), 'vmcall');
      const flags = [read, written, untouched].map((gpa) => ept.flags(gpa));
      const dirty = { accessed: true, dirty: true };
      const clean = { accessed: false, dirty: false };
      if (pageSize === '1G') assert.deepEqual(flags, [dirty, dirty, dirty]);
      else assert.deepEqual(flags, [{ accessed: true, dirty: false }, dirty, clean]);
    }));
}

test('without EPT, L2 runs on its own page tables', () =>
  withL1({}, async (l1) => {
    const [linear, physical] = [0x4_0000_0000, l1.allocate()];
    const pageTables = l1.createPageTables();
    pageTables.map(linear, physical);
    const l2 = await l1.createL2({ ept: false, pageTables, exceptionBitmap: 1 << 14 }, (program) =>
      program
        .write32(linear, 44)
        .read32(physical)
        .read32(linear + 4096)
        .vmcall(),
    );
    assert.equal((await l2.vmread('SECONDARY_VM_EXEC_CONTROL')) & 2n, 0n);
    const { detail } = exitOf(await l2.enter(), 'exception-or-nmi');
    assert(detail.reason === 'exception-or-nmi');
    assert.deepEqual([detail.event?.vector, detail.qualification], [14, BigInt(linear + 4096)]);
    progressOf(l2, { checksum: foldChecksum([44]), executed: 2 });
    assert.deepEqual(pageTables.flags(linear), { accessed: true, dirty: true });
  }));

test('external interrupts of L1 exit, acknowledged with their vector', () =>
  withL1({}, async (l1) => {
    const page = l1.allocate();
    const l2 = await l1.createL2({ externalInterrupts: 'acknowledge' }, (program) =>
      program.sync().spin(page, 4, 1).vmcall(),
    );
    syncOf(await l2.enter());
    assert.equal(l1.signal(0x61), true);
    const { detail } = exitOf(await l2.continue(), 'external-interrupt');
    assert.deepEqual(detail, { reason: 'external-interrupt', vector: 0x61 });
    await l1.cpu(0).eoi();
    assert.equal(l1.cpu(0).interruptCount(0x61), 0, 'L1 took it by the exit, not through its IDT');
    l1.bytes(page, 1)[0] = 1;
    exitOf(await l2.enter(), 'vmcall');
  }));

test('virtual-interrupt delivery: RVI delivers, the EOI exits where its bitmap says', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2(
      {
        virtualInterrupts: true,
        msrBitmap: true,
        eoiExits: [0x72],
        controls: ['secondary.virtualize-x2apic-mode'],
      },
      (program) => program.vmcall(0).vmcall(1).wrmsr(X2APIC_EOI, 0).vmcall(2).wrmsr(X2APIC_EOI, 0).vmcall(3),
    );
    exitOf(await l2.enter(), 'vmcall');
    for (const vector of [0x71, 0x72]) {
      l2.vapic!.request(vector);
      await l2.setInterruptStatus({ requested: vector });
      exitOf(await l2.enter(), 'vmcall');
      assert.equal(l2.interruptCount(vector), 1);
      assert.deepEqual(await l2.interruptStatus(), { requested: 0, inService: vector });
      assert.deepEqual(l2.vapic!.inService, [vector]);
      if (vector === 0x72) {
        const { detail } = exitOf(await l2.enter(), 'virtualized-eoi');
        assert.deepEqual(detail, { reason: 'virtualized-eoi', vector });
      }
    }
    exitOf(await l2.enter(), 'vmcall');
    assert.deepEqual(await l2.interruptStatus(), { requested: 0, inService: 0 });
  }));

test('posted interrupts: a notification delivers what the descriptor holds, without an exit', () =>
  withL1({}, async (l1) => {
    const page = l1.allocate();
    const l2 = await l1.createL2(
      {
        postedInterrupts: { vector: NOTIFICATION },
        msrBitmap: true,
        controls: ['secondary.virtualize-x2apic-mode'],
        autoEoi: 'x2apic',
      },
      (program) => program.sync().spin(page, 4, 1).vmcall(),
    );
    syncOf(await l2.enter());
    const descriptor = l2.postedInterrupts!;
    descriptor.post(0x81);
    descriptor.post(0x93);
    assert.deepEqual([descriptor.pending, descriptor.outstanding], [[0x81, 0x93], true]);
    l1.signal(NOTIFICATION);
    setTimeout(() => {
      l1.bytes(page, 1)[0] = 1;
    }, 20);
    exitOf(await l2.continue(), 'vmcall');
    const taken = Array.from({ length: 256 }, (_, v) => [v, l2.interruptCount(v)]).filter(([, n]) => n);
    assert.deepEqual(taken, [
      [0x81, 1],
      [0x93, 1],
    ]);
    assert.deepEqual([descriptor.pending, descriptor.outstanding], [[], false]);
    assert.equal(nestedRuns(l1), 1);
    assert.deepEqual([...l2.exitCounts()], [['vmcall', 1]]);
  }));

test('the fields of a VMCS: all at once, by name, checked', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({ vpid: 9 }, (program) => program.vmcall());
    await l2.fields.writeAll({ TSC_OFFSET: 5n, EXCEPTION_BITMAP: 1 << 6 });
    assert.deepEqual(await l2.fields.readAll(['TSC_OFFSET', 'EXCEPTION_BITMAP', 'VIRTUAL_PROCESSOR_ID']), {
      TSC_OFFSET: 5n,
      EXCEPTION_BITMAP: 64n,
      VIRTUAL_PROCESSOR_ID: 9n,
    });
    const all = await l2.fields.dump();
    assert.equal(all.get('TSC_OFFSET'), 5n);
    assert.equal(all.get('GUEST_RIP'), BigInt(l1.images.l2.entry));
    assert(all.size > 120, `${all.size} fields`);
    assert.equal(all.has('HLAT_POINTER'), false);
    await assert.rejects(l2.fields.read('HLAT_POINTER'), /VMREAD failed in L1: VMfailValid \(error 12/);
    await assert.rejects(l2.fields.write('VIRTUAL_PROCESSOR_ID', 0x1_0000), /does not fit into the 16 bits/);
  }));
