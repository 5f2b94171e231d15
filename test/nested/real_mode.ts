// SPDX-License-Identifier: Apache-2.0
// A vCPU in real mode and the machine code for it: for what KVM does without an L2.
import assert from 'node:assert/strict';
import type { Exit, Vcpu, Vm } from '../../lib/kvm/index.ts';

export const CODE = 0x1000;
/** A port of its own for each handler, so that the exit says which one ran. */
export const HANDLER_PORT = 0x70;
const LIMIT_MS = 15_000;

// 16-bit machine code
export const out = (port: number) => [0xe6, port];
export const loadAl = (address: number) => [0xa0, address & 0xff, address >> 8];
/** Stores a byte, by way of AL. */
export const store = (address: number, value: number) => [0xb0, value, 0xa2, address & 0xff, address >> 8];
export const cli = 0xfa;
export const sti = 0xfb;
export const nop = 0x90;
export const hlt = 0xf4;
const iret = 0xcf;
export const rdmsr = [0x0f, 0x32];
export const wrmsr = [0x0f, 0x30];
export const vmcall = [0x0f, 0x01, 0xc1];
export const spin = [0xeb, 0xfe];

/** A vCPU in real mode with a stack, and a handler for each of `vectors`: OUT to its port, IRET. */
export function load(vm: Vm, code: readonly number[], vectors: readonly number[] = []): Vcpu {
  vm.memory.add({ gpa: 0, size: 0x2000 });
  vm.memory.write(CODE, Uint8Array.from(code));
  for (const [index, vector] of vectors.entries()) {
    const handler = CODE + 0x100 + index * 0x10;
    vm.memory.write(vector * 4, Uint8Array.of(handler & 0xff, handler >> 8, 0, 0));
    vm.memory.write(handler, Uint8Array.of(...out(HANDLER_PORT + index), iret));
  }
  const vcpu = vm.createVcpu(0);
  vcpu.setSregs({ cs: { base: 0n, selector: 0 }, ss: { base: 0n, selector: 0 } });
  vcpu.setRegs({ rip: BigInt(CODE), rflags: 2n, rsp: 0x800n });
  return vcpu;
}

export function run(vcpu: Vcpu): Exit {
  return vcpu.runSync({ timeoutMs: LIMIT_MS });
}

export function expectOut(exit: Exit, port: number, ...data: number[]): void {
  assert(exit.type === 'io' && exit.direction === 'out', `expected OUT, got ${exit.type}`);
  assert.equal(exit.port, port);
  if (data.length > 0) assert.deepEqual([...exit.data], data);
}
