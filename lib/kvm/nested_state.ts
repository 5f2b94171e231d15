// SPDX-License-Identifier: Apache-2.0
import { checkBytes, checkInteger } from './check.ts';
import { KvmClosedError, KvmUnsupportedError } from './errors.ts';
import { native } from './loader.ts';
import type { Vcpu } from './vcpu.ts';

/** Bytes of struct kvm_nested_state without its data. */
export const NESTED_HEADER_SIZE = 128;

export function getNestedState(vcpu: Vcpu, size?: number): Uint8Array {
  const room =
    size === undefined
      ? requireNestedState(vcpu, 'KVM_GET_NESTED_STATE')
      : checkInteger('size', size, NESTED_HEADER_SIZE);
  const bytes = new Uint8Array(room);
  return bytes.slice(0, native().vcpuGetNestedState(vcpu.handle, bytes));
}

export function setNestedState(vcpu: Vcpu, bytes: Uint8Array): void {
  if (checkBytes('bytes', bytes).length < NESTED_HEADER_SIZE) {
    throw new RangeError(`nested state has a header of ${NESTED_HEADER_SIZE} bytes, not ${bytes.length}`);
  }
  requireNestedState(vcpu, 'KVM_SET_NESTED_STATE');
  native().vcpuSetNestedState(vcpu.handle, bytes);
}

/** The most bytes that the kernel has of it. */
function requireNestedState(vcpu: Vcpu, request: string): number {
  if (vcpu.state === 'closed') throw new KvmClosedError('Vcpu');
  const size = vcpu.checkExtension('KVM_CAP_NESTED_STATE');
  if (size === 0) throw new KvmUnsupportedError('KVM_CAP_NESTED_STATE', request);
  return size;
}
