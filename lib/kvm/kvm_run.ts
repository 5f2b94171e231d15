// SPDX-License-Identifier: Apache-2.0
import {
  decodeEvents,
  EVENTS_SIZE,
  patchEvents,
  type VcpuEvents,
  type VcpuEventsPatch,
} from './abi/events.ts';
import {
  decodeRegs,
  decodeSregs,
  patchRegs,
  patchSregs,
  REGS_SIZE,
  type Regs,
  SREGS_SIZE,
  type Sregs,
  type SregsPatch,
} from './abi/regs.ts';
import { checkFlag, checkInteger, checkObject, checkU64 } from './check.ts';

// struct kvm_run
const REQUEST_INTERRUPT_WINDOW = 0;
const IMMEDIATE_EXIT = 1;
const EXIT_REASON = 8;
const READY_FOR_INTERRUPT = 12;
const IF_FLAG = 13;
const FLAGS = 14;
const CR8 = 16;
const APIC_BASE = 24;
const MSR_ERROR = 32;
const MSR_DATA = 48;
const HYPERCALL_RET = 88;
const VALID_REGS = 288;
const DIRTY_REGS = 296;
const SYNC_REGS = 304;
const SYNC_SREGS = SYNC_REGS + REGS_SIZE;
const SYNC_EVENTS = SYNC_SREGS + SREGS_SIZE;

/** KVM_SYNC_X86_*: parts of the state that kvm_run can carry. */
export const SYNC = { regs: 1, sregs: 2, events: 4 } as const;

/**
 * A typed view over a vCPU's struct kvm_run, the page shared with the kernel: reads and writes are memory accesses,
 * no calls. Everything throws TypeError once the vCPU is closed.
 *
 * Synchronised registers (KVM_CAP_SYNC_REGS): set `validRegs` to SYNC bits, and every exit leaves those parts here;
 * {@link setSyncRegs} and its sisters change them and have the next KVM_RUN take them over. No ioctl is involved.
 */
export class KvmRun {
  readonly #buffer: ArrayBuffer;
  readonly #view: DataView<ArrayBuffer>;

  /** @internal */
  constructor(buffer: ArrayBuffer) {
    this.#buffer = buffer;
    this.#view = new DataView(buffer);
  }

  /** The page and what follows it, as it is. */
  get buffer(): ArrayBuffer {
    return this.#buffer;
  }

  /** KVM_EXIT_*, of the last exit. */
  get exitReason(): number {
    return this.#view.getUint32(EXIT_REASON, true);
  }

  /** Exit with `irq-window-open` as soon as the guest can take an interrupt (without an in-kernel irqchip). */
  get requestInterruptWindow(): boolean {
    return this.#view.getUint8(REQUEST_INTERRUPT_WINDOW) !== 0;
  }
  set requestInterruptWindow(on: boolean) {
    this.#view.setUint8(REQUEST_INTERRUPT_WINDOW, checkFlag('requestInterruptWindow', on) ? 1 : 0);
  }

  /** The next KVM_RUN gives EINTR before it enters the guest. `run()` clears it; a kick sets it. */
  get immediateExit(): boolean {
    return this.#view.getUint8(IMMEDIATE_EXIT) !== 0;
  }

  get readyForInterruptInjection(): boolean {
    return this.#view.getUint8(READY_FOR_INTERRUPT) !== 0;
  }

  /** RFLAGS.IF at the last exit. */
  get ifFlag(): boolean {
    return this.#view.getUint8(IF_FLAG) !== 0;
  }

  /** KVM_RUN_X86_*: bit 0 SMM, bit 1 bus lock, bit 2 guest mode (an L2 was active, KVM_CAP_X86_GUEST_MODE). */
  get flags(): number {
    return this.#view.getUint16(FLAGS, true);
  }

  get cr8(): bigint {
    return this.#view.getBigUint64(CR8, true);
  }
  set cr8(value: bigint) {
    this.#view.setBigUint64(CR8, checkU64('cr8', value), true);
  }

  get apicBase(): bigint {
    return this.#view.getBigUint64(APIC_BASE, true);
  }

  /** Answers an `rdmsr` or `wrmsr` exit: a value (ignored for wrmsr), or undefined for #GP in the guest. */
  answerMsr(value: bigint | undefined): void {
    this.#view.setUint8(MSR_ERROR, value === undefined ? 1 : 0);
    if (value !== undefined) this.#view.setBigUint64(MSR_DATA, checkU64('value', value), true);
  }

  /** Answers a `hypercall` exit. */
  answerHypercall(result: bigint): void {
    this.#view.setBigUint64(HYPERCALL_RET, checkU64('result', result), true);
  }

  /** Which parts every exit shall leave here: bits of {@link SYNC}. Unsupported ones make KVM_RUN fail (EINVAL). */
  get validRegs(): number {
    return Number(this.#view.getBigUint64(VALID_REGS, true) & 0xffff_ffffn);
  }
  set validRegs(bits: number) {
    this.#view.setBigUint64(VALID_REGS, BigInt(checkInteger('validRegs', bits, 0, 0xffffffff)), true);
  }

  /** Which parts the next KVM_RUN takes over. */
  get dirtyRegs(): number {
    return Number(this.#view.getBigUint64(DIRTY_REGS, true) & 0xffff_ffffn);
  }

  /** As of the last exit, if `validRegs` had {@link SYNC}.regs then. */
  get syncRegs(): Regs {
    return decodeRegs(new BigUint64Array(this.#buffer, SYNC_REGS, REGS_SIZE / 8));
  }
  get syncSregs(): Sregs {
    return decodeSregs(new Uint8Array(this.#buffer, SYNC_SREGS, SREGS_SIZE));
  }
  get syncEvents(): VcpuEvents {
    return decodeEvents(new Uint8Array(this.#buffer, SYNC_EVENTS, EVENTS_SIZE));
  }

  /** Changes registers over those of the last exit; the next KVM_RUN takes all of them. */
  setSyncRegs(regs: Partial<Regs>): void {
    patchRegs(new BigUint64Array(this.#buffer, SYNC_REGS, REGS_SIZE / 8), checkObject('regs', regs));
    this.#markDirty(SYNC.regs);
  }
  setSyncSregs(sregs: SregsPatch): void {
    patchSregs(new Uint8Array(this.#buffer, SYNC_SREGS, SREGS_SIZE), checkObject('sregs', sregs));
    this.#markDirty(SYNC.sregs);
  }
  setSyncEvents(events: VcpuEventsPatch): void {
    patchEvents(new Uint8Array(this.#buffer, SYNC_EVENTS, EVENTS_SIZE), checkObject('events', events));
    this.#markDirty(SYNC.events);
  }

  #markDirty(bit: number): void {
    this.#view.setBigUint64(DIRTY_REGS, this.#view.getBigUint64(DIRTY_REGS, true) | BigInt(bit), true);
  }
}
