// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { foldChecksum, GuestFault, vmcallRegsValues } from '../../lib/guest/index.ts';
import { exitOf, nestedRuns, progressOf, syncOf, withL1 } from './machine.ts';

test('L2 executes its program: operations, checksum, VMCALL, one nested_run', () =>
  withL1({}, async (l1) => {
    const page = l1.allocate();
    const l2 = await l1.createL2({}, (program) =>
      program
        .write64(page, 0x1122_3344_5566_7788n)
        .read64(page)
        .read32(page)
        .loop(3, (body) => body.read8(page + 1).loop(2, (inner) => inner.fold(9)))
        .checksum(page, 2)
        .vmcall(0xabcd),
    );
    const before = nestedRuns(l1);
    const exit = exitOf(await l2.enter(), 'vmcall');
    assert.equal(exit.registers.rax, 0xabcdn);
    assert.equal(exit.instructionLength, 3);
    assert.equal(exit.rflags & 0x200n, 0x200n, 'IF must be on in L2');
    const values = [0x1122_3344_5566_7788n, 0x5566_7788, 0x77, 9, 9, 0x77, 9, 9, 0x77, 9, 9];
    values.push(0x1122_3344_5566_7788n, 0);
    // 3 accesses; 3 x (read, 2 x (fold, loop), loop); checksum
    progressOf(l2, {
      executed: 3 + 3 * 6 + 1,
      folds: values.length,
      checksum: foldChecksum(values),
      done: false,
    });
    assert.equal(nestedRuns(l1) - before, 1);
    exitOf(await l2.enter(), 'vmcall');
    progressOf(l2, { executed: 3 + 3 * 6 + 2, done: true });
    assert.equal(nestedRuns(l1) - before, 2);
    assert.equal(l2.timing.entries, 2);
  }));

test('L2 stops at a sync, sees what the host wrote meanwhile, and goes on', () =>
  withL1({}, async (l1) => {
    const page = l1.allocate();
    const l2 = await l1.createL2({}, (program) => program.sync(7).read32(page).sync(0xffff_fffe).vmcall());
    assert.equal(syncOf(await l2.enter()), 7);
    assert.equal(l2.entered, true);
    new DataView(l1.memory.buffer).setUint32(page, 0xcafe, true);
    assert.equal(syncOf(await l2.continue()), 0xffff_fffe);
    exitOf(await l2.continue(), 'vmcall');
    progressOf(l2, { executed: 3, checksum: foldChecksum([0xcafe]) });
    assert.equal(nestedRuns(l1), 1, 'a sync is not a VM exit to L1');
  }));

test('policy: skip, resume, return, advance and a limit count exactly', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({}, (program) =>
      program
        .loop(5, (body) => body.cpuid(0).vmcall(1))
        .sync(1)
        .cpuid(0)
        .vmcall(2),
    );
    const stop = await l2.enter({ policy: { cpuid: 'skip', vmcall: 'skip' }, limit: 4 });
    exitOf(stop, 'vmcall');
    assert(stop.kind === 'exit');
    assert.equal(stop.entries, 4);
    assert.deepEqual(
      [...stop.counts],
      [
        ['cpuid', 2],
        ['vmcall', 2],
      ],
    );
    assert.equal(syncOf(await l2.enter({ policy: { cpuid: 'skip', vmcall: 'skip' }, limit: 8 })), 1);
    assert.equal(l2.exitCount('cpuid'), 5);
    // 3 rounds of 2 exits before the sync, one CPUID after it: the eighth is the last VMCALL
    assert.equal(exitOf(await l2.continue(), 'vmcall').registers.rax, 2n);
    assert.deepEqual(
      [...l2.exitCounts()],
      [
        ['cpuid', 6],
        ['vmcall', 6],
      ],
    );
    progressOf(l2, { executed: 5 * 3 + 2, done: false });
    // RIP was moved before the limit took effect; `return` leaves it where it is
    const first = exitOf(await l2.enter({ policy: { vmcall: 'return' } }), 'vmcall');
    progressOf(l2, { executed: 5 * 3 + 3, done: true });
    const second = exitOf(await l2.enter({ policy: { vmcall: 'advance' } }), 'vmcall');
    assert.equal(second.rip, first.rip);
    assert.equal(l2.timing.entries, 14);
    assert.equal(nestedRuns(l1), 14);
  }));

test('without an advance the same instruction exits again; resume counts the same exit up to the limit', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({}, (program) => program.cpuid(0).vmcall());
    const first = exitOf(await l2.enter(), 'cpuid');
    const stop = await l2.enter({ policy: { cpuid: 'resume' }, limit: 10 });
    assert.equal(exitOf(stop, 'cpuid').rip, first.rip);
    assert.equal(l2.exitCount('cpuid'), 11);
    assert.equal(nestedRuns(l1), 11);
    progressOf(l2, { executed: 0 });
  }));

test('an exception in L2 is reported with its place, and L2 can be continued', () =>
  withL1({}, async (l1) => {
    const { address } = l1.images.l2.symbol('fault_pf');
    const l2 = await l1.createL2({}, (program) => program.fold(1).call(address).vmcall());
    await assert.rejects(l2.enter(), (error: unknown) => {
      assert(error instanceof GuestFault);
      const { level, vector, errorCode, cr2, symbol } = error;
      assert.deepEqual(
        { level, vector, errorCode, cr2, symbol: symbol?.split('+')[0] },
        { level: 'L2', vector: 14, errorCode: 2n, cr2: 0x40_0000_0000n, symbol: 'fault_pf' },
      );
      return true;
    });
    progressOf(l2, { executed: 1, pc: 1 });
    assert.equal(exitOf(await l2.continue(), 'vmcall').registers.rax, 0xffff_ffff_ffff_ffffn);
  }));

test('an exception that L1 intercepts is a VM exit', () =>
  withL1({}, async (l1) => {
    const { address } = l1.images.l2.symbol('fault_ud');
    const l2 = await l1.createL2({ exceptionBitmap: 1 << 6 }, (program) => program.call(address).vmcall());
    const exit = exitOf(await l2.enter(), 'exception-or-nmi');
    assert.equal(exit.interruptionInfo >>> 0, 0x8000_0306);
    assert.equal(exit.rip, BigInt(address));
  }));

test('the registers of L2 survive an exit to L1', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({}, (program) => program.vmcallRegs(0x1000).vmcall());
    const { registers } = exitOf(await l2.enter(), 'vmcall');
    const { rsp: _, ...rest } = registers;
    assert.deepEqual(Object.values(rest), vmcallRegsValues(0x1000));
    exitOf(await l2.enter(), 'vmcall');
    progressOf(l2, { checksum: foldChecksum(vmcallRegsValues(0x1000)) });
  }));
