// SPDX-License-Identifier: Apache-2.0
import { constants } from 'node:os';
import { KvmError } from './errors.ts';

/** Why KVM_RUN came back (`kvm_run.exit_reason`). */
export type Exit =
  | {
      type: 'io';
      direction: 'in' | 'out';
      port: number;
      size: 1 | 2 | 4;
      /** Repetitions (string instructions). */
      count: number;
      /** size × count bytes, a live view in kvm_run: for `in`, fill it before the next run. */
      data: Uint8Array;
    }
  | {
      type: 'mmio';
      /** Guest-physical. */
      address: number;
      isWrite: boolean;
      /** As long as the access (1 to 8), a live view in kvm_run: for a read, fill it before the next run. */
      data: Uint8Array;
    }
  | { type: 'hlt' }
  /** Triple fault. */
  | { type: 'shutdown' }
  /** A kick or a signal (EINTR), or an application processor that was just woken (EAGAIN): run again. */
  | { type: 'interrupted' }
  | { type: 'irq-window-open' }
  | { type: 'fail-entry'; hardwareReason: bigint; cpu: number }
  | { type: 'internal-error'; suberror: number; data: bigint[] }
  /**
   * KVM_RUN failed with EFAULT or EHWPOISON; `errno` is negative. `isPrivate` (bit 3 of `flags`,
   * KVM_MEMORY_EXIT_FLAG_PRIVATE): the guest's access was to private memory. The next run makes the access again.
   */
  | { type: 'memory-fault'; flags: bigint; isPrivate: boolean; gpa: number; size: number; errno: number }
  | { type: 'system-event'; event: number; data: bigint[] }
  /** KVM_SET_GUEST_DEBUG: a step, a breakpoint (`dr6` says which), or INT3 (`exception` 3). */
  | { type: 'debug'; exception: number; pc: bigint; dr6: bigint; dr7: bigint }
  /** KVM_CAP_X86_USER_SPACE_MSR: answer with `vcpu.kvmRun.answerMsr()` before the next run. */
  | { type: 'rdmsr'; index: number; why: number }
  | { type: 'wrmsr'; index: number; why: number; value: bigint }
  /** A hypercall for userspace (KVM_CAP_EXIT_HYPERCALL): answer with `vcpu.kvmRun.answerHypercall()`. */
  | { type: 'hypercall'; nr: bigint; args: bigint[] }
  /** Harvest and reset the dirty ring, then run again. */
  | { type: 'dirty-ring-full' }
  /** A split irqchip's IOAPIC gets an EOI. */
  | { type: 'ioapic-eoi'; vector: number }
  | { type: 'bus-lock' }
  /** KVM_CAP_X86_NOTIFY_VMEXIT; bit 0 of `flags`: the vCPU's context is lost. */
  | { type: 'notify'; flags: number }
  /** The data is in `vcpu.kvmRun`. */
  | { type: 'unknown'; reason: number };

const REASON_AT = 8;
/** Where the union of struct kvm_run starts. */
const UNION_AT = 32;

const REASON = {
  unknown: 0,
  io: 2,
  debug: 4,
  hlt: 5,
  mmio: 6,
  irqWindowOpen: 7,
  shutdown: 8,
  failEntry: 9,
  interrupted: 10,
  internalError: 17,
  systemEvent: 24,
  hypercall: 3,
  ioapicEoi: 26,
  rdmsr: 29,
  wrmsr: 30,
  dirtyRingFull: 31,
  busLock: 33,
  notify: 37,
  memoryFault: 39,
} as const;

/** KVM_MEMORY_EXIT_FLAG_PRIVATE. */
const FAULT_PRIVATE = 8n;

/** EHWPOISON, which node:os does not name. */
const EHWPOISON = 133;

function words(view: DataView<ArrayBuffer>, at: number, count: number): bigint[] {
  return Array.from({ length: Math.min(count, 16) }, (_, word) => view.getBigUint64(at + word * 8, true));
}

function decodeReason(view: DataView<ArrayBuffer>, reason: number): Exit {
  switch (reason) {
    case REASON.io: {
      const size = view.getUint8(UNION_AT + 1) as 1 | 2 | 4;
      const count = view.getUint32(UNION_AT + 4, true);
      const offset = Number(view.getBigUint64(UNION_AT + 8, true));
      return {
        type: 'io',
        direction: view.getUint8(UNION_AT) === 0 ? 'in' : 'out',
        port: view.getUint16(UNION_AT + 2, true),
        size,
        count,
        data: new Uint8Array(view.buffer, offset, size * count),
      };
    }
    case REASON.mmio:
      return {
        type: 'mmio',
        address: Number(view.getBigUint64(UNION_AT, true)),
        isWrite: view.getUint8(UNION_AT + 20) !== 0,
        data: new Uint8Array(view.buffer, UNION_AT + 8, view.getUint32(UNION_AT + 16, true)),
      };
    case REASON.hlt:
      return { type: 'hlt' };
    case REASON.shutdown:
      return { type: 'shutdown' };
    case REASON.irqWindowOpen:
      return { type: 'irq-window-open' };
    case REASON.interrupted:
      return { type: 'interrupted' };
    case REASON.failEntry:
      return {
        type: 'fail-entry',
        hardwareReason: view.getBigUint64(UNION_AT, true),
        cpu: view.getUint32(UNION_AT + 8, true),
      };
    case REASON.internalError:
      return {
        type: 'internal-error',
        suberror: view.getUint32(UNION_AT, true),
        data: words(view, UNION_AT + 8, view.getUint32(UNION_AT + 4, true)),
      };
    case REASON.systemEvent:
      return {
        type: 'system-event',
        event: view.getUint32(UNION_AT, true),
        data: words(view, UNION_AT + 8, view.getUint32(UNION_AT + 4, true)),
      };
    case REASON.debug:
      return {
        type: 'debug',
        exception: view.getUint32(UNION_AT, true),
        pc: view.getBigUint64(UNION_AT + 8, true),
        dr6: view.getBigUint64(UNION_AT + 16, true),
        dr7: view.getBigUint64(UNION_AT + 24, true),
      };
    case REASON.rdmsr:
      return {
        type: 'rdmsr',
        index: view.getUint32(UNION_AT + 12, true),
        why: view.getUint32(UNION_AT + 8, true),
      };
    case REASON.wrmsr:
      return {
        type: 'wrmsr',
        index: view.getUint32(UNION_AT + 12, true),
        why: view.getUint32(UNION_AT + 8, true),
        value: view.getBigUint64(UNION_AT + 16, true),
      };
    case REASON.hypercall:
      return {
        type: 'hypercall',
        nr: view.getBigUint64(UNION_AT, true),
        args: words(view, UNION_AT + 8, 6),
      };
    case REASON.dirtyRingFull:
      return { type: 'dirty-ring-full' };
    case REASON.ioapicEoi:
      return { type: 'ioapic-eoi', vector: view.getUint8(UNION_AT) };
    case REASON.busLock:
      return { type: 'bus-lock' };
    case REASON.notify:
      return { type: 'notify', flags: view.getUint32(UNION_AT, true) };
    default:
      return { type: 'unknown', reason };
  }
}

/**
 * Decodes what KVM_RUN left. `errno` is 0 or positive.
 * @throws KvmError for an errno that is not an exit.
 */
export function decodeExit(view: DataView<ArrayBuffer>, errno: number): Exit {
  const reason = view.getUint32(REASON_AT, true);
  if (errno === 0) return decodeReason(view, reason);
  if (errno === constants.errno.EINTR || errno === constants.errno.EAGAIN) return { type: 'interrupted' };
  if (reason === REASON.memoryFault && (errno === constants.errno.EFAULT || errno === EHWPOISON)) {
    const flags = view.getBigUint64(UNION_AT, true);
    return {
      type: 'memory-fault',
      flags,
      isPrivate: (flags & FAULT_PRIVATE) !== 0n,
      gpa: Number(view.getBigUint64(UNION_AT + 8, true)),
      size: Number(view.getBigUint64(UNION_AT + 16, true)),
      errno: -errno,
    };
  }
  throw new KvmError({ errno, syscall: 'ioctl', request: 'KVM_RUN' });
}
