// SPDX-License-Identifier: Apache-2.0
import { KvmMsrError } from './errors.ts';
import type { Vcpu } from './vcpu.ts';

const MSR_FEATURE_CONTROL = 0x3a;
export const MSR_TSC_DEADLINE = 0x6e0;
/** Hyper-V's reference counter only counts; it cannot be set. */
const MSR_HV_TIME_REF_COUNT = 0x4000_0020;
const BATCH = 255;
const HEADER = 8;
const ENTRY = 16;

/** struct kvm_msrs without values. */
export function msrsOf(indices: readonly number[]): Uint8Array {
  const view = new DataView(new ArrayBuffer(HEADER + indices.length * ENTRY));
  view.setUint32(0, indices.length, true);
  for (const [position, index] of indices.entries()) view.setUint32(HEADER + position * ENTRY, index, true);
  return new Uint8Array(view.buffer);
}

function entryAt(bytes: Uint8Array, position: number): { index: number; value: bigint } {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const at = HEADER + position * ENTRY;
  return { index: view.getUint32(at, true), value: view.getBigUint64(at + 8, true) };
}

/** The MSRs of KVM_GET_MSR_INDEX_LIST that this vCPU can read, which depends on its CPUID: found out once. */
export class VcpuMsrs {
  readonly #vcpu: Pick<Vcpu, 'ioctl'>;
  readonly #all: () => readonly number[];
  readonly #fixed = new Set<number>();
  #templates: readonly Uint8Array[] | undefined;

  constructor(vcpu: Pick<Vcpu, 'ioctl'>, all: () => readonly number[]) {
    this.#vcpu = vcpu;
    this.#all = all;
  }

  forget(): void {
    this.#templates = undefined;
  }

  /** The kernel does not let anybody write this one: there is nothing to save. */
  leaveOut(index: number): void {
    this.#fixed.add(index);
    this.forget();
  }

  /** struct kvm_msrs without values, one for each KVM_GET_MSRS. The same array until they are others. */
  templates(): readonly Uint8Array[] {
    this.#templates ??= this.#probe();
    return this.#templates;
  }

  #probe(): Uint8Array[] {
    const skipped = new Set([MSR_FEATURE_CONTROL, MSR_TSC_DEADLINE, MSR_HV_TIME_REF_COUNT, ...this.#fixed]);
    let rest = [MSR_FEATURE_CONTROL, ...this.#all().filter((index) => !skipped.has(index))];
    const readable: number[] = [];
    while (rest.length > 0) {
      const batch = rest.slice(0, BATCH);
      const count = this.#vcpu.ioctl('KVM_GET_MSRS', msrsOf(batch));
      readable.push(...batch.slice(0, count));
      rest = rest.slice(count < batch.length ? count + 1 : count);
    }
    const batches: Uint8Array[] = [];
    for (let at = 0; at < readable.length; at += BATCH) batches.push(msrsOf(readable.slice(at, at + BATCH)));
    return batches;
  }
}

/** KVM_SET_MSRS of a whole struct kvm_msrs, past those that are refused and have their value already. */
export function setMsrs(vcpu: Vcpu, batch: Uint8Array): void {
  const total = (batch.length - HEADER) / ENTRY;
  let done = vcpu.ioctl('KVM_SET_MSRS', batch);
  while (done < total) {
    // Some can be read and not be written (host-only, locked): no harm when the value is there already.
    const refused = entryAt(batch, done);
    const now = msrsOf([refused.index]);
    const seen = vcpu.ioctl('KVM_GET_MSRS', now) === 1 ? entryAt(now, 0).value : undefined;
    if (seen !== refused.value) throw new KvmMsrError('KVM_SET_MSRS', refused.index, done);
    vcpu.msrs.leaveOut(refused.index);
    done++;
    if (done === total) return;
    const rest = new Uint8Array(HEADER + (total - done) * ENTRY);
    new DataView(rest.buffer).setUint32(0, total - done, true);
    rest.set(batch.subarray(HEADER + done * ENTRY), HEADER);
    done += vcpu.ioctl('KVM_SET_MSRS', rest);
  }
}
