// SPDX-License-Identifier: Apache-2.0
import { cpuidBuffer } from './abi/cpuid.ts';
import { DEBUGREGS_SIZE } from './abi/debug.ts';
import { EVENTS_SIZE } from './abi/events.ts';
import { XCRS_SIZE } from './abi/fpu.ts';
import { REGS_SIZE, SREGS_SIZE, SREGS2_SIZE } from './abi/regs.ts';
import { checkBytes, checkObject } from './check.ts';
import { KvmError, KvmMsrError, KvmPendingExitError } from './errors.ts';
import { IoctlList, type Part } from './ioctl_list.ts';
import { NESTED_HEADER_SIZE } from './nested_state.ts';
import type { Vcpu } from './vcpu.ts';
import { MSR_TSC_DEADLINE, msrsOf, setMsrs } from './vcpu_msrs.ts';

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

const CPUID_HEADER = 8;
const CPUID_ENTRY = 40;
const CR8_AT = 256;

const viewOf = (bytes: Uint8Array) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** Room for KVM_GET_CPUID2, until the next call: 10 KiB are not worth making each time. */
const MAX_CPUID_ENTRIES = 256;
const cpuidRoom = cpuidBuffer(MAX_CPUID_ENTRIES);
const cpuidHeader = new DataView(cpuidRoom.buffer);

/** struct kvm_cpuid2 as it is now, a view over that room. */
function readCpuid(vcpu: Vcpu): Uint8Array {
  cpuidHeader.setUint32(0, MAX_CPUID_ENTRIES, true);
  vcpu.ioctl('KVM_GET_CPUID2', cpuidRoom);
  if (cpuidHeader.getUint32(0, true) === MAX_CPUID_ENTRIES) {
    // Linux 6.1 leaves the count as it was: what it does not write must not be an earlier answer.
    cpuidRoom.fill(0, CPUID_HEADER);
    vcpu.ioctl('KVM_GET_CPUID2', cpuidRoom);
  }
  return cpuidRoom.subarray(0, CPUID_HEADER + cpuidHeader.getUint32(0, true) * CPUID_ENTRY);
}

/** How a vCPU is read: the same each time until its CPUID or its MSRs are others. */
class SavePlan {
  readonly msrTemplates: readonly Uint8Array[];
  readonly list = new IoctlList();
  /** Everything but nested state, as it is before it is read: with counts and MSR numbers, without values. */
  readonly empty: Uint8Array<ArrayBuffer>;
  readonly setSregs: 'KVM_SET_SREGS' | 'KVM_SET_SREGS2';
  readonly hasNested: boolean;
  readonly mpState: Part;
  readonly cpuid: Part;
  readonly tscKhz: Part;
  readonly regs: Part;
  readonly sregs: Part;
  readonly msrs: readonly Part[];
  readonly xcrs: Part | undefined;
  readonly debugRegs: Part;
  readonly events: Part;
  readonly lapic: Part | undefined;
  readonly tscDeadline: Part | undefined;
  readonly xsave: Part;

  constructor(vcpu: Vcpu) {
    const cpuid = readCpuid(vcpu);
    const deadline = msrsOf([MSR_TSC_DEADLINE]);
    const hasSregs2 = vcpu.checkExtension('KVM_CAP_SREGS2') > 0;
    const { list } = this;
    this.msrTemplates = vcpu.msrs.templates();
    this.setSregs = hasSregs2 ? 'KVM_SET_SREGS2' : 'KVM_SET_SREGS';
    this.hasNested = vcpu.checkExtension('KVM_CAP_NESTED_STATE') > 0;
    // MP state first: reading it may deliver a pending INIT or SIPI, which changes registers.
    this.mpState = list.add('KVM_GET_MP_STATE', 4);
    this.cpuid = list.add('KVM_GET_CPUID2', cpuid.length);
    this.tscKhz = list.add('KVM_GET_TSC_KHZ', 4);
    this.regs = list.add('KVM_GET_REGS', REGS_SIZE);
    this.sregs = hasSregs2 ? list.add('KVM_GET_SREGS2', SREGS2_SIZE) : list.add('KVM_GET_SREGS', SREGS_SIZE);
    this.msrs = this.msrTemplates.map(({ length }) => list.add('KVM_GET_MSRS', length));
    this.xcrs = vcpu.checkExtension('KVM_CAP_XCRS') > 0 ? list.add('KVM_GET_XCRS', XCRS_SIZE) : undefined;
    this.debugRegs = list.add('KVM_GET_DEBUGREGS', DEBUGREGS_SIZE);
    this.events = list.add('KVM_GET_VCPU_EVENTS', EVENTS_SIZE);
    this.lapic = vcpu.hasLapic ? list.add('KVM_GET_LAPIC', 1024) : undefined;
    // Last, because a CPUID without this timer mode is no reason to stop.
    this.tscDeadline = vcpu.hasLapic ? list.add('KVM_GET_MSRS', deadline.length) : undefined;
    this.xsave = { at: list.bytes, size: vcpu.xsaveSize };
    this.empty = new Uint8Array(list.bytes + this.xsave.size);
    this.empty.set(cpuid, this.cpuid.at);
    for (const [batch, { at }] of this.msrs.entries()) this.empty.set(this.msrTemplates[batch]!, at);
    if (this.tscDeadline) this.empty.set(deadline, this.tscDeadline.at);
  }
}

const plans = new WeakMap<Vcpu, SavePlan>();

function planOf(vcpu: Vcpu): SavePlan {
  let plan = plans.get(vcpu);
  if (plan?.msrTemplates !== vcpu.msrs.templates()) {
    plan = new SavePlan(vcpu);
    plans.set(vcpu, plan);
  }
  return plan;
}

export function saveVcpu(vcpu: Vcpu): VcpuSnapshot {
  if (!vcpu.settled) {
    const exit = vcpu.settle();
    if (exit) throw new KvmPendingExitError(exit);
  }
  let plan = planOf(vcpu);
  let bytes = plan.empty.slice();
  let done = vcpu.ioctls(plan.list.words, bytes, 0, plan.list.length);
  const isDone = () => done >= plan.list.length - (plan.tscDeadline ? 1 : 0);
  if (!isDone()) {
    // What can be read has changed (an MSR of the guest's own doing): look again, once.
    vcpu.msrs.forget();
    plan = planOf(vcpu);
    bytes = plan.empty.slice();
    done = vcpu.ioctls(plan.list.words, bytes, 0, plan.list.length);
    if (!isDone()) throw new KvmMsrError('KVM_GET_MSRS', 0, 0);
  }
  const part = ({ at, size }: Part) => new Uint8Array(bytes.buffer, at, size);
  return {
    version: 1,
    id: vcpu.id,
    mpState: part(plan.mpState),
    cpuid: part(plan.cpuid),
    tscKhz: viewOf(bytes).getUint32(plan.tscKhz.at, true),
    regs: part(plan.regs),
    sregs: { request: plan.setSregs, bytes: part(plan.sregs) },
    msrs: plan.msrs.map(part),
    xcrs: plan.xcrs && part(plan.xcrs),
    xsave: vcpu.getXsave(part(plan.xsave)),
    debugRegs: part(plan.debugRegs),
    events: part(plan.events),
    lapic: plan.lapic && part(plan.lapic),
    tscDeadline: plan.tscDeadline && done === plan.list.length ? part(plan.tscDeadline) : undefined,
    nested: plan.hasNested ? vcpu.getNestedState() : undefined,
  };
}

/** Structures on their way into a vCPU: copied to one buffer, then written in one call. */
class Writes {
  readonly #list = new IoctlList();
  #parts: Uint8Array[] = [];
  #bytes = new Uint8Array(16 * 1024);

  clear(): void {
    this.#list.clear();
    this.#parts = [];
  }

  add(request: string, part: Uint8Array): void {
    const { at } = this.#list.add(request, checkBytes(`what ${request} takes`, part).length);
    if (this.#list.bytes > this.#bytes.length) {
      const larger = new Uint8Array(2 * this.#list.bytes);
      larger.set(this.#bytes);
      this.#bytes = larger;
    }
    this.#bytes.set(part, at);
    this.#parts.push(part);
  }

  /** Makes them all, and forgets them. */
  run(vcpu: Vcpu): void {
    const { words, length } = this.#list;
    for (let done = 0; ; done++) {
      done = vcpu.ioctls(words, this.#bytes, done, length);
      if (done === length) break;
      setMsrs(vcpu, this.#parts[done]!);
    }
    this.clear();
  }
}

const writes = new Writes();

/** "Never executed VMXON": puts a vCPU that is in VMX operation out of it. */
function leaveNested(vcpu: Vcpu): void {
  const bytes = new Uint8Array(NESTED_HEADER_SIZE);
  const view = new DataView(bytes.buffer);
  view.setUint32(4, NESTED_HEADER_SIZE, true);
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
  const { nested, sregs } = snapshot;
  completeExit(vcpu);
  if (!sameBytes(readCpuid(vcpu), snapshot.cpuid)) vcpu.ioctl('KVM_SET_CPUID2', snapshot.cpuid);
  if (vcpu.ioctl('KVM_GET_TSC_KHZ') !== snapshot.tscKhz) vcpu.ioctl('KVM_SET_TSC_KHZ', snapshot.tscKhz);
  // VMX capability MSRs cannot be written in VMX operation, and CR4 and EFER are checked against it.
  if (nested && viewOf(nested).getUint16(2, true) === 0) leaveNested(vcpu);
  writes.clear();
  writes.add(sregs.request, sregs.bytes);
  for (const batch of snapshot.msrs) writes.add('KVM_SET_MSRS', batch);
  if (snapshot.xcrs) writes.add('KVM_SET_XCRS', snapshot.xcrs);
  writes.run(vcpu);
  vcpu.kvmRun.cr8 = viewOf(sregs.bytes).getBigUint64(CR8_AT, true);
  vcpu.setXsave(snapshot.xsave);
  writes.add('KVM_SET_DEBUGREGS', snapshot.debugRegs);
  // Registers before events: KVM_SET_REGS forgets a pending exception.
  writes.add('KVM_SET_REGS', snapshot.regs);
  if (snapshot.lapic) {
    writes.add('KVM_SET_LAPIC', snapshot.lapic);
    if (snapshot.tscDeadline) writes.add('KVM_SET_MSRS', snapshot.tscDeadline);
  }
  // Events before nested state: SMM, which is one of them, decides which nested state is legal.
  writes.add('KVM_SET_VCPU_EVENTS', snapshot.events);
  if (nested) {
    writes.run(vcpu);
    vcpu.setNestedState(nested);
  }
  writes.add('KVM_SET_MP_STATE', snapshot.mpState);
  writes.run(vcpu);
}
