// SPDX-License-Identifier: Apache-2.0
import { type CpuidEntry, cpuidBuffer, decodeCpuid, encodeCpuid } from './abi/cpuid.ts';
import {
  DEBUGREGS_SIZE,
  type DebugRegs,
  decodeDebugRegs,
  encodeGuestDebug,
  type GuestDebug,
  patchDebugRegs,
} from './abi/debug.ts';
import {
  decodeEvents,
  EVENTS_SIZE,
  patchEvents,
  type VcpuEvents,
  type VcpuEventsPatch,
} from './abi/events.ts';
import { decodeFpu, decodeXcrs, encodeXcrs, FPU_SIZE, type Fpu, patchFpu, XCRS_SIZE } from './abi/fpu.ts';
import { getMsrs, setMsrs } from './abi/msrs.ts';
import {
  decodeRegs,
  decodeSregs,
  decodeSregs2,
  encodeRegs,
  patchRegs,
  patchSregs,
  patchSregs2,
  REGS_SIZE,
  type Regs,
  SREGS_SIZE,
  SREGS2_SIZE,
  type Sregs,
  type Sregs2,
  type Sregs2Patch,
  type SregsPatch,
} from './abi/regs.ts';
import { checkBytes, checkInteger, checkIterable, checkObject, checkU64 } from './check.ts';
import type { VcpuCalls } from './loader.ts';

/** KVM_MP_STATE_*. */
export const MP_STATE = {
  runnable: 0,
  uninitialized: 1,
  initReceived: 2,
  halted: 3,
  sipiReceived: 4,
} as const;

const LAPIC_SIZE = 1024;

/** KVM_TRANSLATE's answer. */
export interface Translation {
  valid: boolean;
  /** Guest-physical; meaningless unless valid. */
  physical: bigint;
  writable: boolean;
  user: boolean;
}

/**
 * The architectural state of a vCPU: each call is one ioctl (setters of a part are two: get, then set), made at once
 * on the calling thread. During a run they throw {@link VcpuBusyError}.
 */
export abstract class VcpuState {
  // Buffers above 64 bytes are slow to make, and a state call needs one only until it returns.
  readonly #scratch = new ArrayBuffer(512);
  readonly #words = new BigUint64Array(this.#scratch, 0, REGS_SIZE / 8);
  readonly #sregs = new Uint8Array(this.#scratch, 0, SREGS_SIZE);
  readonly #calls: Pick<VcpuCalls, 'getRegs' | 'setRegs'>;

  /** @internal The addon keeps the buffer's address, so nobody else may ever have the buffer. */
  constructor(bind: (registers: ArrayBuffer) => Pick<VcpuCalls, 'getRegs' | 'setRegs'>) {
    this.#calls = bind(this.#scratch);
  }

  /**
   * Any vCPU request of the addon's table by its KVM_ name, on raw bytes. The buffer must be as long as the request's
   * structure. @returns the ioctl's result.
   * @throws TypeError for a request that is not in the table, RangeError for a buffer that is too short.
   */
  abstract ioctl(request: string, argument?: Uint8Array | number): number;

  /** @internal CR8 is also a field of kvm_run. */
  protected abstract setRunCr8(value: bigint): void;

  /** KVM_GET_REGS. */
  getRegs(): Regs {
    this.#calls.getRegs();
    return decodeRegs(this.#words);
  }

  /** KVM_SET_REGS; registers not given keep their value (which costs a KVM_GET_REGS). */
  setRegs(regs: Partial<Regs>): void {
    checkObject('regs', regs);
    if (!encodeRegs(this.#words, regs)) {
      this.#calls.getRegs();
      patchRegs(this.#words, regs);
    }
    this.#calls.setRegs();
  }

  /** KVM_GET_SREGS. */
  getSregs(): Sregs {
    this.ioctl('KVM_GET_SREGS', this.#sregs);
    return decodeSregs(this.#sregs);
  }

  /** KVM_SET_SREGS; what is not given keeps its value, also inside a segment. */
  setSregs(sregs: SregsPatch): void {
    checkObject('sregs', sregs);
    this.ioctl('KVM_GET_SREGS', this.#sregs);
    patchSregs(this.#sregs, sregs);
    this.ioctl('KVM_SET_SREGS', this.#sregs);
    // Without an in-kernel LAPIC, KVM_RUN loads CR8 from kvm_run, not from what was set here.
    if (sregs.cr8 !== undefined) this.setRunCr8(sregs.cr8);
  }

  /** KVM_GET_SREGS2 (KVM_CAP_SREGS2): without the interrupt bitmap, with the PDPTRs of PAE paging. */
  getSregs2(): Sregs2 {
    return decodeSregs2(this.#get('KVM_GET_SREGS2', SREGS2_SIZE));
  }

  /** KVM_SET_SREGS2. */
  setSregs2(sregs: Sregs2Patch): void {
    checkObject('sregs', sregs);
    const bytes = this.#get('KVM_GET_SREGS2', SREGS2_SIZE);
    patchSregs2(bytes, sregs);
    this.ioctl('KVM_SET_SREGS2', bytes);
    if (sregs.cr8 !== undefined) this.setRunCr8(sregs.cr8);
  }

  /** KVM_GET_MSRS. @throws KvmMsrError at the first MSR the kernel refuses. */
  getMsrs(indices: Iterable<number>): Map<number, bigint> {
    return getMsrs(checkIterable('indices', indices), (bytes) => this.ioctl('KVM_GET_MSRS', bytes));
  }

  /** KVM_SET_MSRS, in the given order. @throws KvmMsrError at the first the kernel refuses. */
  setMsrs(entries: Iterable<readonly [number, bigint]>): void {
    setMsrs(checkIterable('entries', entries), (bytes) => this.ioctl('KVM_SET_MSRS', bytes));
  }

  /** KVM_GET_CPUID2. */
  getCpuid(): CpuidEntry[] {
    const bytes = cpuidBuffer(256);
    this.ioctl('KVM_GET_CPUID2', bytes);
    return decodeCpuid(bytes);
  }

  /** KVM_SET_CPUID2. The kernel refuses changes after the first run. */
  setCpuid(entries: Iterable<CpuidEntry>): void {
    this.ioctl('KVM_SET_CPUID2', encodeCpuid(checkIterable('entries', entries)));
  }

  /** KVM_GET_SUPPORTED_HV_CPUID of this vCPU: unlike the system's, it knows whether eVMCS is enabled. */
  supportedHvCpuid(): CpuidEntry[] {
    const bytes = cpuidBuffer(256);
    this.ioctl('KVM_GET_SUPPORTED_HV_CPUID', bytes);
    return decodeCpuid(bytes);
  }

  /** KVM_GET_VCPU_EVENTS. */
  getEvents(): VcpuEvents {
    return decodeEvents(this.#get('KVM_GET_VCPU_EVENTS', EVENTS_SIZE));
  }

  /** KVM_SET_VCPU_EVENTS; what is not given, `flags` included, stays as the kernel reports it. */
  setEvents(events: VcpuEventsPatch): void {
    checkObject('events', events);
    const bytes = this.#get('KVM_GET_VCPU_EVENTS', EVENTS_SIZE);
    patchEvents(bytes, events);
    this.ioctl('KVM_SET_VCPU_EVENTS', bytes);
  }

  /** KVM_GET_FPU. */
  getFpu(): Fpu {
    return decodeFpu(this.#get('KVM_GET_FPU', FPU_SIZE));
  }

  /**
   * KVM_SET_FPU; what is not given keeps its value. KVM does not mark the registers as in use by this: on a vCPU that has
   * not used them yet XRSTOR drops them. `setXsave` with XSTATE_BV is the way that always works.
   */
  setFpu(fpu: Partial<Fpu>): void {
    checkObject('fpu', fpu);
    const bytes = this.#get('KVM_GET_FPU', FPU_SIZE);
    patchFpu(bytes, fpu);
    this.ioctl('KVM_SET_FPU', bytes);
  }

  /** KVM_GET_XCRS: number to value; XCR0 is 0. */
  getXcrs(): Map<number, bigint> {
    return decodeXcrs(this.#get('KVM_GET_XCRS', XCRS_SIZE));
  }

  /** KVM_SET_XCRS. */
  setXcrs(values: Iterable<readonly [number, bigint]>): void {
    this.ioctl('KVM_SET_XCRS', encodeXcrs(values));
  }

  /** KVM_GET_DEBUGREGS. */
  getDebugRegs(): DebugRegs {
    return decodeDebugRegs(this.#get('KVM_GET_DEBUGREGS', DEBUGREGS_SIZE));
  }

  /** KVM_SET_DEBUGREGS; what is not given keeps its value. */
  setDebugRegs(registers: Partial<DebugRegs>): void {
    checkObject('registers', registers);
    const bytes = this.#get('KVM_GET_DEBUGREGS', DEBUGREGS_SIZE);
    patchDebugRegs(bytes, registers);
    this.ioctl('KVM_SET_DEBUGREGS', bytes);
  }

  /** KVM_SET_GUEST_DEBUG: runs then give `debug` exits. `{}` turns it off. */
  setGuestDebug(debug: GuestDebug): void {
    this.ioctl('KVM_SET_GUEST_DEBUG', encodeGuestDebug(debug));
  }

  /** KVM_TRANSLATE: a linear address through the guest's page tables, as of now. */
  translate(linear: bigint): Translation {
    const view = new DataView(new ArrayBuffer(24));
    view.setBigUint64(0, checkU64('linear', linear), true);
    this.ioctl('KVM_TRANSLATE', new Uint8Array(view.buffer));
    return {
      valid: view.getUint8(16) !== 0,
      physical: view.getBigUint64(8, true),
      writable: view.getUint8(17) !== 0,
      user: view.getUint8(18) !== 0,
    };
  }

  /** KVM_GET_TSC_KHZ: the guest's TSC frequency. */
  getTscKhz(): number {
    return this.ioctl('KVM_GET_TSC_KHZ');
  }

  /** KVM_SET_TSC_KHZ; another frequency than the host's needs KVM_CAP_TSC_CONTROL. */
  setTscKhz(khz: number): void {
    this.ioctl('KVM_SET_TSC_KHZ', checkInteger('khz', khz, 0, 0x7fffffff));
  }

  /** KVM_GET_LAPIC: 1024 bytes of registers. Needs createIrqchip() or a split irqchip. */
  getLapic(): Uint8Array {
    return this.#get('KVM_GET_LAPIC', LAPIC_SIZE);
  }

  /** KVM_SET_LAPIC. */
  setLapic(registers: Uint8Array): void {
    if (checkBytes('registers', registers).length !== LAPIC_SIZE) {
      throw new RangeError(`the LAPIC has ${LAPIC_SIZE} bytes of registers, not ${registers.length}`);
    }
    this.ioctl('KVM_SET_LAPIC', registers);
  }

  /** KVM_GET_MP_STATE: one of {@link MP_STATE}. */
  getMpState(): number {
    return new Uint32Array(this.#get('KVM_GET_MP_STATE', 4).buffer)[0]!;
  }

  /** KVM_SET_MP_STATE. */
  setMpState(state: number): void {
    const words = new Uint32Array([checkInteger('state', state, 0, 0xffffffff)]);
    this.ioctl('KVM_SET_MP_STATE', new Uint8Array(words.buffer));
  }

  /** KVM_NMI: makes an NMI pending. */
  injectNmi(): void {
    this.ioctl('KVM_NMI');
  }

  /** KVM_SMI (KVM_CAP_X86_SMM): makes a system-management interrupt pending. */
  injectSmi(): void {
    this.ioctl('KVM_SMI');
  }

  /** KVM_INTERRUPT, without an in-kernel irqchip: injects `vector`. */
  injectInterrupt(vector: number): void {
    const words = new Uint32Array([checkInteger('vector', vector, 0, 255)]);
    this.ioctl('KVM_INTERRUPT', new Uint8Array(words.buffer));
  }

  /** KVM_KVMCLOCK_CTRL: tells the guest that it was stopped, so that its watchdogs stay calm. */
  notifyPaused(): void {
    this.ioctl('KVM_KVMCLOCK_CTRL');
  }

  #get(request: string, size: number): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(size);
    this.ioctl(request, bytes);
    return bytes;
  }
}
