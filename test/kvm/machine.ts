// SPDX-License-Identifier: Apache-2.0
import { test as base } from 'vitest';
import { Kvm, type Vcpu, type Vm } from '../../lib/kvm/index.ts';

/** Why ordinary KVM cannot be used here, or undefined. */
export function whyNoKvm(): string | undefined {
  try {
    Kvm.open().close();
    return undefined;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

/** A test with an open Kvm and an empty Vm, closed afterwards; skipped with the reason where KVM does not open. */
export const test = base.extend<{ kvm: Kvm; vm: Vm }>({
  kvm: async ({ skip }, use) => {
    const reason = whyNoKvm();
    if (reason !== undefined) skip(reason);
    const kvm = Kvm.open();
    await use(kvm);
    kvm.close();
  },
  vm: async ({ kvm }, use) => {
    await use(kvm.createVm());
  },
});

/** Where {@link load} puts code. */
export const CODE = 0x1000;

/** A vCPU in real mode, about to execute `code` at 0x1000, with flat segments and a page of memory for the code. */
export function load(vm: Vm, code: readonly number[], id = 0): Vcpu {
  vm.memory.add({ gpa: CODE, size: 0x1000 });
  vm.memory.write(CODE, Uint8Array.from(code));
  return start(vm, id);
}

/** A vCPU that executes what is already at 0x1000. */
export function start(vm: Vm, id: number): Vcpu {
  const vcpu = vm.createVcpu(id);
  vcpu.setSregs({ cs: { base: 0n, selector: 0 } });
  vcpu.setRegs({ rip: BigInt(CODE), rflags: 2n });
  return vcpu;
}

/** 16-bit machine code, so that a test reads as a listing. */
export const hlt = [0xf4];
export const spin = [0xeb, 0xfe];
export const movAl = (value: number) => [0xb0, value];
export const outAl = (port: number) => [0xe6, port];
export const inAl = (port: number) => [0xe4, port];
export const loadAl = (address: number) => [0xa0, address & 0xff, address >> 8];
export const storeAl = (address: number) => [0xa2, address & 0xff, address >> 8];
/** 32 bits. */
export const loadEax = (address: number) => [0x66, 0xa1, address & 0xff, address >> 8];
export const storeEax = (address: number) => [0x66, 0xa3, address & 0xff, address >> 8];

/** What `call` throws. */
export function thrown(call: () => unknown): unknown {
  try {
    call();
  } catch (error) {
    return error;
  }
  throw new Error('nothing was thrown');
}
