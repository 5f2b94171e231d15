// SPDX-License-Identifier: Apache-2.0
// KVM_SET_GUEST_DEBUG on a CPU that has breakpoint registers: a software backend of /dev/kvm emulates none. No L2.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { type GuestDebug, Kvm, type Vcpu } from '../../lib/kvm/index.ts';
import { CODE, expectOut, hlt, load, loadAl, nop, out, run, store } from './real_mode.ts';

const DATA = 0x1803;
const [DB, BP] = [1, 3];
const DR6_STEP = 0x4000n;
const int3 = 0xcc;

function onVcpu(name: string, code: readonly number[], body: (vcpu: Vcpu) => void): void {
  test(name, () => {
    using kvm = Kvm.open();
    using vm = kvm.createVm();
    body(load(vm, code));
  });
}

/** Stops with `debug` on; the offset in the code, and which of DR6's causes are set. */
function stop(vcpu: Vcpu, debug?: GuestDebug): [exception: number, at: number, causes: bigint] {
  if (debug) vcpu.setGuestDebug(debug);
  const exit = run(vcpu);
  assert(exit.type === 'debug', `expected a debug exit, got ${exit.type}`);
  return [exit.exception, Number(exit.pc) - CODE, exit.dr6 & (DR6_STEP | 0xfn)];
}

// Offsets: 0 NOP, 1 MOV AL, 3 MOV [DATA], 6 MOV AL, 9 NOP, 10 OUT, 12 HLT
const walk = [nop, ...store(DATA, 1), ...loadAl(DATA), nop, ...out(1), hlt];

onVcpu('a breakpoint stops before its instruction, a watchpoint after the access', walk, (vcpu) => {
  const second = { address: 0x9000n };
  assert.deepEqual(stop(vcpu, { breakpoints: [{ address: BigInt(CODE + 3) }] }), [DB, 3, 1n]);
  assert.deepEqual(stop(vcpu), [DB, 3, 1n]);
  const written = { address: BigInt(DATA), on: 'write', length: 1 } as const;
  assert.deepEqual(stop(vcpu, { breakpoints: [second, written] }), [DB, 6, 2n]);
  const touched = { address: BigInt(DATA & ~3), on: 'access', length: 4 } as const;
  assert.deepEqual(stop(vcpu, { breakpoints: [second, second, second, touched] }), [DB, 9, 8n]);
  assert.equal(vcpu.getRegs().rax & 0xffn, 1n);
  vcpu.setGuestDebug({});
  expectOut(run(vcpu), 1, 1);
  assert.deepEqual(run(vcpu), { type: 'hlt' });
});

onVcpu('a write watchpoint lets a read pass, and one of four bytes sees the last of them', walk, (vcpu) => {
  const base = BigInt(DATA & ~3);
  assert.deepEqual(stop(vcpu, { breakpoints: [{ address: base, on: 'write', length: 4 }] }), [DB, 6, 1n]);
  expectOut(run(vcpu), 1, 1);
  vcpu.setRegs({ rip: BigInt(CODE) });
  const beside = { address: BigInt(DATA + 1), on: 'write', length: 1 } as const;
  vcpu.setGuestDebug({ breakpoints: [beside] });
  expectOut(run(vcpu), 1, 1);
});

onVcpu('single steps stop after each instruction', walk, (vcpu) => {
  const steps = [0, 0, 0, 0, 0].map(() => stop(vcpu, { singleStep: true }));
  assert.deepEqual(
    steps,
    [1, 3, 6, 9, 10].map((at) => [DB, at, DR6_STEP]),
  );
});

onVcpu(
  'INT3 is for userspace when it asked, else for the guest',
  [nop, int3, nop, ...out(1), hlt],
  (vcpu) => {
    const [exception, at] = stop(vcpu, { softwareBreakpoints: true });
    assert.deepEqual([exception, at], [BP, 1]);
    assert.equal(vcpu.getRegs().rip, BigInt(CODE + 1));
    vcpu.setRegs({ rip: BigInt(CODE + 2) });
    expectOut(run(vcpu), 1);
  },
);
