// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { GuestFault, VmxError } from '../../lib/guest/index.ts';
import { exitOf, nestedRuns, progressOf, withL1 } from './machine.ts';

async function vmfail(
  promise: Promise<unknown>,
  instruction: string,
  error: number | undefined,
): Promise<void> {
  await assert.rejects(promise, (reason: unknown) => {
    assert(reason instanceof VmxError, String(reason));
    assert.deepEqual(
      { instruction: reason.instruction, error: reason.error },
      { instruction, error },
      reason.message,
    );
    return true;
  });
}

test('VMX instructions outside VMX operation are #UD', () =>
  withL1({}, async (l1) => {
    for (const run of [() => l1.cpu(0).vmptrst(), () => l1.cpu(0).vmclear(l1.allocate())]) {
      await assert.rejects(run(), (error: unknown) => error instanceof GuestFault && error.vector === 6);
    }
  }));

test('VMRESUME of a clear VMCS fails with 5, VMLAUNCH of a launched one with 4', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({}, (program) => program.vmcall(1).vmcall(2));
    await vmfail(l2.enter({ mode: 'resume' }), 'VMRESUME', 5);
    assert.equal(l2.launched, false);
    exitOf(await l2.enter({ mode: 'launch' }), 'vmcall');
    assert.equal(l2.launched, true);
    await vmfail(l2.enter({ mode: 'launch' }), 'VMLAUNCH', 4);
    exitOf(await l2.enter({ mode: 'resume' }), 'vmcall');
    await l2.vmclear();
    assert.equal(l2.launched, false);
    await vmfail(l2.enter({ mode: 'resume' }), 'VMRESUME', 5);
    exitOf(await l2.enter(), 'vmcall');
    progressOf(l2, { executed: 2, done: true });
    assert.equal(nestedRuns(l1), 3, 'failed entries do not count');
  }));

test('VMfail of the other instructions', () =>
  withL1({}, async (l1) => {
    const cpu = l1.cpu(0);
    await l1.vmxon();
    assert.equal(await cpu.vmptrst(), 0xffff_ffff_ffff_ffffn);
    await vmfail(cpu.vmread('GUEST_RIP'), 'VMREAD', undefined);
    const vmcs = l1.allocate();
    new DataView(l1.memory.buffer).setUint32(vmcs, (await l1.controls()).revision, true);
    await cpu.vmclear(vmcs);
    await cpu.vmptrld(vmcs);
    assert.equal(await cpu.vmptrst(), BigInt(vmcs));
    await vmfail(cpu.vmxon(), 'VMXON', 15);
    await vmfail(cpu.vmclear(vmcs + 8), 'VMCLEAR', 2);
    await vmfail(cpu.vmclear(cpu.vmxonRegion), 'VMCLEAR', 3);
    await vmfail(cpu.vmptrld(vmcs + 8), 'VMPTRLD', 9);
    await vmfail(cpu.vmptrld(cpu.vmxonRegion), 'VMPTRLD', 10);
    const other = l1.allocate();
    await vmfail(cpu.vmptrld(other), 'VMPTRLD', 11);
    await vmfail(cpu.vmread(0x7ffe), 'VMREAD', 12);
    await vmfail(cpu.invept(7, 0n), 'INVEPT', 28);
    await cpu.vmwrite('TSC_OFFSET', 0x1234_5678_9abcn);
    assert.equal(await cpu.vmread('TSC_OFFSET'), 0x1234_5678_9abcn);
    await cpu.vmxoff();
    await l1.vmxon();
  }));

test('an entry with bad fields: controls 7, host state 8, guest state is a failed entry', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({}, (program) => program.vmcall());
    await l2.vmwrite('CR3_TARGET_COUNT', 5);
    await vmfail(l2.enter(), 'VMLAUNCH', 7);
    await l2.vmwrite('CR3_TARGET_COUNT', 0);
    const tr = await l2.vmread('HOST_TR_SELECTOR');
    await l2.vmwrite('HOST_TR_SELECTOR', 0);
    await vmfail(l2.enter(), 'VMLAUNCH', 8);
    await l2.vmwrite('HOST_TR_SELECTOR', tr);
    await l2.vmwrite('VMCS_LINK_POINTER', 1);
    const exit = exitOf(await l2.enter(), 'invalid-guest-state');
    assert.equal(exit.entryFailure, true);
    assert.equal(l2.launched, false);
    assert.equal(l2.timing.entries, 0);
    await l2.vmwrite('VMCS_LINK_POINTER', 0xffff_ffff_ffff_ffffn);
    assert.equal(exitOf(await l2.enter(), 'vmcall').entryFailure, false);
    assert.equal(l2.timing.entries, 1);
  }));
