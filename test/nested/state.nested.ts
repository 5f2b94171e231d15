// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { foldChecksum } from '../../lib/guest/index.ts';
import { exitOf, nestedRuns, progressOf, syncOf, withL1 } from './machine.ts';

const GUEST_MODE = 1;
const FORMAT_VMX = 0;
const HEADER = 128;
const NONE = 0xffff_ffff_ffff_ffffn;

/** The header of struct kvm_nested_state. */
function header(bytes: Uint8Array) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return {
    flags: view.getUint16(0, true),
    format: view.getUint16(2, true),
    size: view.getUint32(4, true),
    vmxon: view.getBigUint64(8, true),
    vmcs12: view.getBigUint64(16, true),
  };
}

test('nested state follows L1: outside VMX, VMXON, a current VMCS, L2 active', () =>
  withL1({}, async (l1) => {
    const cpu = l1.cpu(0);
    const state = () => header(cpu.vcpu.getNestedState());
    assert.deepEqual(state(), { flags: 0, format: FORMAT_VMX, size: HEADER, vmxon: NONE, vmcs12: NONE });
    await l1.vmxon();
    const vmxon = BigInt(cpu.vmxonRegion);
    assert.deepEqual(state(), { flags: 0, format: FORMAT_VMX, size: HEADER, vmxon, vmcs12: NONE });
    const l2 = await l1.createL2({}, (program) => program.sync(1).vmcall());
    const loaded = state();
    assert.deepEqual([loaded.flags & GUEST_MODE, loaded.vmxon, loaded.vmcs12], [0, vmxon, BigInt(l2.vmcs)]);
    syncOf(await l2.enter());
    const active = state();
    assert.deepEqual([active.flags & GUEST_MODE, active.vmxon, active.vmcs12], [1, vmxon, BigInt(l2.vmcs)]);
    assert(active.size > HEADER);
    exitOf(await l2.continue(), 'vmcall');
    assert.equal(state().flags & GUEST_MODE, 0);
  }));

test('get and set while L2 is active: L2 goes on where it was', () =>
  withL1({}, async (l1) => {
    const { vcpu } = l1.cpu(0);
    const page = l1.allocate();
    const l2 = await l1.createL2({ vpid: 5, msrBitmap: true }, (program) =>
      program.fold(1).sync(1).spin(page, 4, 1).fold(2).vmcall(),
    );
    syncOf(await l2.enter());
    // A port exit is complete only after the next KVM_RUN: interrupt L2 in its loop, where nothing is pending
    const abort = new AbortController();
    setTimeout(() => abort.abort(new Error('kicked')), 10);
    await assert.rejects(l2.continue({ signal: abort.signal }), /kicked/);
    progressOf(l2, { executed: 2, pc: 2 });
    const before = vcpu.getNestedState();
    const { flags, vmcs12 } = header(before);
    assert.deepEqual([flags & GUEST_MODE, vmcs12], [GUEST_MODE, BigInt(l2.vmcs)]);
    vcpu.setNestedState(before);
    assert.deepEqual(header(vcpu.getNestedState()), header(before));
    new DataView(l1.memory.buffer).setUint32(page, 1, true);
    exitOf(await l2.continue(), 'vmcall');
    progressOf(l2, { executed: 4, checksum: foldChecksum([1, 2]) });
    assert.equal(l2.timing.entries, 1);
    assert.equal(nestedRuns(l1), 1);
  }));

test('a header alone puts a vCPU into VMX operation', () =>
  withL1({}, async (l1) => {
    const cpu = l1.cpu(0);
    await l1.vmxon();
    const state = cpu.vcpu.getNestedState();
    assert.equal(state.length, HEADER);
    await cpu.vmxoff();
    cpu.vcpu.setNestedState(state);
    assert.equal(await cpu.vmptrst(), NONE);
    cpu.vcpu.setNestedState(
      new Uint8Array([...state.subarray(0, 8), ...new Uint8Array(16).fill(0xff), ...new Uint8Array(104)]),
    );
    await assert.rejects(cpu.vmptrst(), /#UD in L1 during VMPTRST/);
  }));
