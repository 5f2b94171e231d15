// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { EVMCS_CLEAN, foldChecksum, VP_ASSIST } from '../../lib/guest/index.ts';
import { exitOf, nestedRuns, progressOf, syncOf, withL1 } from './machine.ts';

const EVMCS_FLAG = 4;

test('an L2 runs on an enlightened VMCS, and nested state says so', () =>
  withL1({ evmcs: true }, async (l1) => {
    const page = l1.allocate();
    const l2 = await l1.createL2({ evmcs: true, vpid: 3, msrBitmap: true }, (program) =>
      program.write32(page, 7).read32(page).sync(1).vmcall(0xabc).vmcall(0xdef),
    );
    syncOf(await l2.enter());
    const flags = new DataView(l1.vcpu(0).getNestedState().buffer).getUint16(0, true);
    assert.equal(flags & EVMCS_FLAG, EVMCS_FLAG);
    const exit = exitOf(await l2.continue(), 'vmcall');
    assert.equal(exit.registers.rax, 0xabcn);
    assert.equal(exit.instructionLength, 3);
    assert.equal(exitOf(await l2.enter(), 'vmcall').registers.rax, 0xdefn);
    progressOf(l2, { executed: 4, checksum: foldChecksum([7]) });
    assert.equal(nestedRuns(l1), 2);
    const { vpAssistPage } = l1.cpu(0);
    assert.equal(vpAssistPage.getBigUint64(VP_ASSIST.currentNestedVmcs, true), BigInt(l2.vmcs));
    assert.equal(await l2.fields.read('VIRTUAL_PROCESSOR_ID'), 3n);
    assert.equal(await l2.fields.read('VM_EXIT_REASON'), 18n);
    await assert.rejects(l2.fields.read('APIC_ACCESS_ADDR'), /an enlightened VMCS has no field 0x2014/);
  }));

test('L2s with eVMCS and VMCS take turns on two vCPUs', () =>
  withL1({ evmcs: true, vcpus: 2 }, async (l1) => {
    const make = (evmcs: boolean, id: number) =>
      l1.createL2({ evmcs, msrBitmap: true, vpid: id + 1 }, (program) => {
        for (let turn = 0; turn < 6; turn += 1) program.vmcallRegs(id * 100 + turn);
      });
    const l2s = [await make(true, 0), await make(false, 1), await make(true, 2)];
    for (let turn = 0; turn < 6; turn += 1) {
      for (const [id, l2] of l2s.entries()) {
        const exit = exitOf(await l2.enter({ on: (turn >> 1) % 2 }), 'vmcall');
        assert.equal(exit.registers.r15, BigInt(id * 100 + turn + 15), `turn ${turn} of L2 ${id}`);
      }
    }
    assert.equal(nestedRuns(l1, 0) + nestedRuns(l1, 1), 18);
  }));

test('KVM believes clean fields: a group that says "unchanged" is not read again', () =>
  withL1({ evmcs: true }, async (l1) => {
    const l2 = await l1.createL2({ evmcs: true }, (program) => program.rdmsr(0x175).rdmsr(0x175).vmcall());
    const evmcs = l2.evmcs!;
    exitOf(await l2.enter({ policy: { rdmsr: 'advance' } }), 'rdmsr');
    const controls = await l2.fields.read('CPU_BASED_VM_EXEC_CONTROL');
    evmcs.cleanFields = EVMCS_CLEAN.all;
    // hlt-exiting is not in force as long as the group counts as clean
    await l2.fields.write('CPU_BASED_VM_EXEC_CONTROL', controls | 0x80n);
    assert.equal(evmcs.cleanFields, EVMCS_CLEAN.all & ~EVMCS_CLEAN.controlProcessor);
    exitOf(await l2.enter({ policy: { rdmsr: 'advance' } }), 'rdmsr');
    exitOf(await l2.enter(), 'vmcall');
  }));

test('without the option, an L1 has no eVMCS', () =>
  withL1({}, async (l1) => {
    assert.throws(() => l1.cpu(0).vpAssistPage, /L1 vCPU 0 has no VP assist page: boot L1 with evmcs/);
    await assert.rejects(
      l1.createL2({ evmcs: true }, (program) => program.vmcall()),
      /booted with \{ evmcs: true \}/,
    );
  }));
