// SPDX-License-Identifier: Apache-2.0
import { cpuidBuffer } from './abi/cpuid.ts';
import { DEBUGREGS_SIZE } from './abi/debug.ts';
import { EVENTS_SIZE } from './abi/events.ts';
import { XCRS_SIZE } from './abi/fpu.ts';
import { REGS_SIZE, SREGS_SIZE, SREGS2_SIZE } from './abi/regs.ts';
import { checkObject } from './check.ts';
import { KvmError, KvmMsrError, KvmPendingExitError } from './errors.ts';
import type { Vcpu } from './vcpu.ts';

/**
 * Everything KVM keeps of a vCPU, as the kernel's own structures: what goes in is what came out. It survives
 * structuredClone; nothing in it is an address of this process.
 */
export interface VcpuSnapshot {
  version: 1;
  /** The vCPU it was taken from. */
  id: number;
  /** struct kvm_cpuid2 with its entries. */
  cpuid: Uint8Array;
  tscKhz: number;
  mpState: Uint8Array;
  regs: Uint8Array;
  sregs: { request: 'KVM_SET_SREGS' | 'KVM_SET_SREGS2'; bytes: Uint8Array };
  /** struct kvm_msrs, IA32_FEATURE_CONTROL first; at most 255 entries each. */
  msrs: Uint8Array[];
  xcrs: Uint8Array | undefined;
  xsave: Uint8Array;
  debugRegs: Uint8Array;
  events: Uint8Array;
  /** Absent without an in-kernel LAPIC. */
  lapic: Uint8Array | undefined;
  /** IA32_TSC_DEADLINE, as struct kvm_msrs: it only counts once the LAPIC's timer is in that mode. */
  tscDeadline: Uint8Array | undefined;
  /** struct kvm_nested_state; absent without KVM_CAP_NESTED_STATE. */
  nested: Uint8Array | undefined;
}

const MSR_FEATURE_CONTROL = 0x3a;
const MSR_TSC_DEADLINE = 0x6e0;
/** Hyper-V's reference counter only counts; it cannot be set. */
const MSR_HV_TIME_REF_COUNT = 0x4000_0020;
const BATCH = 255;
const HEADER = 8;
const ENTRY = 16;
const CR8_AT = 256;
const NESTED_HEADER = 128;

function msrsOf(indices: readonly number[]): Uint8Array {
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
  #templates: Uint8Array[] | undefined;

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

  /** struct kvm_msrs without values, one for each KVM_GET_MSRS. */
  templates(): readonly Uint8Array[] {
    this.#templates ??= this.#probe();
    return this.#templates;
  }

  /** `copy` makes room for the values. */
  save(copy: (template: Uint8Array) => Uint8Array): Uint8Array[] {
    for (let attempt = 0; ; attempt++) {
      const batches = this.templates().map(attempt === 0 ? copy : (template) => template.slice());
      if (
        batches.every((batch) => this.#vcpu.ioctl('KVM_GET_MSRS', batch) === (batch.length - HEADER) / ENTRY)
      ) {
        return batches;
      }
      // What can be read has changed (an MSR of the guest's own doing): look again, once.
      if (attempt > 0) throw new KvmMsrError('KVM_GET_MSRS', 0, 0);
      this.#templates = this.#probe();
    }
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

function setMsrs(vcpu: Vcpu, batch: Uint8Array): void {
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

/** The structures of one snapshot, cut from one buffer: making a buffer costs as much as a small ioctl. */
class Parts {
  readonly #vcpu: Vcpu;
  readonly #buffer: ArrayBuffer;
  #at = 0;

  constructor(vcpu: Vcpu, size: number) {
    this.#vcpu = vcpu;
    this.#buffer = new ArrayBuffer(size);
  }

  take(size: number): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(this.#buffer, this.#at, size);
    this.#at += (size + 63) & ~63;
    return bytes;
  }

  copy(source: Uint8Array): Uint8Array<ArrayBuffer> {
    const bytes = this.take(source.length);
    bytes.set(source);
    return bytes;
  }

  get(request: string, size: number): Uint8Array {
    const bytes = this.take(size);
    this.#vcpu.ioctl(request, bytes);
    return bytes;
  }
}

/** Room for KVM_GET_CPUID2, until the next call: 10 KiB are not worth making each time. */
const cpuidRoom = cpuidBuffer(256);
const cpuidHeader = new DataView(cpuidRoom.buffer);
/** struct kvm_mp_state; on a buffer of its own, or the engine would make one at the first call with it. */
const mpStateRoom = new Uint8Array(new ArrayBuffer(4));

/** struct kvm_cpuid2 as it is now, a view over that room. */
function readCpuid(vcpu: Vcpu): Uint8Array {
  // Linux 6.1 leaves the count as it was: what it did not write must not be an earlier answer.
  cpuidRoom.fill(0);
  cpuidHeader.setUint32(0, 256, true);
  vcpu.ioctl('KVM_GET_CPUID2', cpuidRoom);
  return cpuidRoom.subarray(0, HEADER + cpuidHeader.getUint32(0, true) * 40);
}

/** More than the structures of a fixed size need. */
const FIXED_SIZE = 3072;

export function saveVcpu(vcpu: Vcpu): VcpuSnapshot {
  if (!vcpu.settled) {
    const exit = vcpu.settle();
    if (exit) throw new KvmPendingExitError(exit);
  }
  // MP state first: reading it may deliver a pending INIT or SIPI, which changes registers.
  vcpu.ioctl('KVM_GET_MP_STATE', mpStateRoom);
  const cpuid = readCpuid(vcpu);
  const templates = vcpu.msrs.templates();
  const xsaveSize = vcpu.xsaveSize;
  const sizes = [cpuid, ...templates].reduce((sum, part) => sum + part.length + 64, xsaveSize);
  const parts = new Parts(vcpu, FIXED_SIZE + sizes);
  const hasSregs2 = vcpu.checkExtension('KVM_CAP_SREGS2') > 0;
  const deadline = vcpu.hasLapic ? msrsOf([MSR_TSC_DEADLINE]) : undefined;
  return {
    version: 1,
    id: vcpu.id,
    mpState: parts.copy(mpStateRoom),
    cpuid: parts.copy(cpuid),
    tscKhz: vcpu.ioctl('KVM_GET_TSC_KHZ'),
    regs: parts.get('KVM_GET_REGS', REGS_SIZE),
    sregs: hasSregs2
      ? { request: 'KVM_SET_SREGS2', bytes: parts.get('KVM_GET_SREGS2', SREGS2_SIZE) }
      : { request: 'KVM_SET_SREGS', bytes: parts.get('KVM_GET_SREGS', SREGS_SIZE) },
    msrs: vcpu.msrs.save((template) => parts.copy(template)),
    xcrs: vcpu.checkExtension('KVM_CAP_XCRS') > 0 ? parts.get('KVM_GET_XCRS', XCRS_SIZE) : undefined,
    xsave: vcpu.getXsave(parts.take(xsaveSize)),
    debugRegs: parts.get('KVM_GET_DEBUGREGS', DEBUGREGS_SIZE),
    events: parts.get('KVM_GET_VCPU_EVENTS', EVENTS_SIZE),
    lapic: vcpu.hasLapic ? parts.get('KVM_GET_LAPIC', 1024) : undefined,
    tscDeadline: deadline && vcpu.ioctl('KVM_GET_MSRS', deadline) === 1 ? deadline : undefined,
    nested: vcpu.checkExtension('KVM_CAP_NESTED_STATE') > 0 ? vcpu.getNestedState() : undefined,
  };
}

/** "Never executed VMXON": puts a vCPU that is in VMX operation out of it. */
function leaveNested(vcpu: Vcpu): void {
  const bytes = new Uint8Array(NESTED_HEADER);
  const view = new DataView(bytes.buffer);
  view.setUint32(4, NESTED_HEADER, true);
  view.setBigUint64(8, 0xffff_ffff_ffff_ffffn, true);
  view.setBigUint64(16, 0xffff_ffff_ffff_ffffn, true);
  vcpu.setNestedState(bytes);
}

const sameBytes = (a: Uint8Array, b: Uint8Array) => Buffer.compare(a, b) === 0;

/** What the last exit still has to do would be done to the snapshot's registers. How it ends does not matter now. */
function completeExit(vcpu: Vcpu): void {
  try {
    for (let exits = 0; !vcpu.settled && exits < 16; exits++) vcpu.settle();
  } catch (error) {
    if (!(error instanceof KvmError)) throw error;
  }
}

export function restoreVcpu(vcpu: Vcpu, snapshot: VcpuSnapshot): void {
  checkObject('snapshot', snapshot);
  if (snapshot.version !== 1) {
    throw new TypeError('this is no snapshot of a vCPU: it must come from save() of this version');
  }
  completeExit(vcpu);
  if (!sameBytes(readCpuid(vcpu), snapshot.cpuid)) vcpu.ioctl('KVM_SET_CPUID2', snapshot.cpuid);
  if (vcpu.ioctl('KVM_GET_TSC_KHZ') !== snapshot.tscKhz) vcpu.ioctl('KVM_SET_TSC_KHZ', snapshot.tscKhz);
  // VMX capability MSRs cannot be written in VMX operation, and CR4 and EFER are checked against it.
  if (
    snapshot.nested &&
    new DataView(snapshot.nested.buffer, snapshot.nested.byteOffset).getUint16(2, true) === 0
  ) {
    leaveNested(vcpu);
  }
  vcpu.ioctl(snapshot.sregs.request, snapshot.sregs.bytes);
  const sregs = new DataView(snapshot.sregs.bytes.buffer, snapshot.sregs.bytes.byteOffset);
  vcpu.kvmRun.cr8 = sregs.getBigUint64(CR8_AT, true);
  for (const batch of snapshot.msrs) setMsrs(vcpu, batch);
  if (snapshot.xcrs) vcpu.ioctl('KVM_SET_XCRS', snapshot.xcrs);
  vcpu.setXsave(snapshot.xsave);
  vcpu.ioctl('KVM_SET_DEBUGREGS', snapshot.debugRegs);
  // Registers before events: KVM_SET_REGS forgets a pending exception.
  vcpu.ioctl('KVM_SET_REGS', snapshot.regs);
  if (snapshot.lapic) {
    vcpu.ioctl('KVM_SET_LAPIC', snapshot.lapic);
    if (snapshot.tscDeadline) setMsrs(vcpu, snapshot.tscDeadline);
  }
  // Events before nested state: SMM, which is one of them, decides which nested state is legal.
  vcpu.ioctl('KVM_SET_VCPU_EVENTS', snapshot.events);
  if (snapshot.nested) vcpu.setNestedState(snapshot.nested);
  vcpu.ioctl('KVM_SET_MP_STATE', snapshot.mpState);
}
