// SPDX-License-Identifier: Apache-2.0
// What the exit qualification and its companions say, by exit reason (SDM vol. 3, 28.2).
import { decodeEvent, type VectoredEvent } from './event.ts';
import type { ExitReason } from './exit_reasons.ts';

/** General registers in instruction-encoding order. */
export const REGISTERS = [
  'rax',
  'rcx',
  'rdx',
  'rbx',
  'rsp',
  'rbp',
  'rsi',
  'rdi',
  'r8',
  'r9',
  'r10',
  'r11',
  'r12',
  'r13',
  'r14',
  'r15',
] as const;
export type RegisterName = (typeof REGISTERS)[number];

export interface ExitEvent {
  readonly reason: 'exception-or-nmi';
  readonly event: VectoredEvent | undefined;
  /** #PF: the faulting linear address; #DB: the pending bits of DR6; else 0. */
  readonly qualification: bigint;
}

export interface ExternalInterrupt {
  readonly reason: 'external-interrupt';
  /** Known only with `acknowledge-interrupt-on-exit`. */
  readonly vector: number | undefined;
}

export interface TaskSwitch {
  readonly reason: 'task-switch';
  readonly selector: number;
  readonly source: 'call' | 'iret' | 'jmp' | 'task-gate';
}

export interface ControlRegisterAccess {
  readonly reason: 'control-register-access';
  readonly register: number;
  readonly access: 'mov-to' | 'mov-from' | 'clts' | 'lmsw';
  /** The general register of a MOV. */
  readonly operand: RegisterName | undefined;
  /** What LMSW loads. */
  readonly source: number | undefined;
}

export interface DebugRegisterAccess {
  readonly reason: 'mov-dr';
  readonly register: number;
  readonly access: 'mov-to' | 'mov-from';
  readonly operand: RegisterName;
}

export interface IoInstruction {
  readonly reason: 'io-instruction';
  readonly port: number;
  /** Bytes. */
  readonly size: 1 | 2 | 4;
  readonly direction: 'in' | 'out';
  readonly string: boolean;
  readonly rep: boolean;
  readonly portOperand: 'dx' | 'immediate';
}

export interface MsrAccess {
  readonly reason: 'rdmsr' | 'wrmsr';
  readonly index: number;
  /** What WRMSR would write. */
  readonly value: bigint | undefined;
}

const APIC_ACCESSES = {
  0: 'linear-read',
  1: 'linear-write',
  2: 'linear-fetch',
  3: 'linear-event-delivery',
  10: 'physical-event-delivery',
  15: 'physical',
} as const;

export interface ApicAccess {
  readonly reason: 'apic-access';
  /** Byte within the APIC-access page; of a linear access only. */
  readonly offset: number;
  readonly access: (typeof APIC_ACCESSES)[keyof typeof APIC_ACCESSES] | 'reserved';
}

export interface EptViolation {
  readonly reason: 'ept-violation';
  readonly guestPhysicalAddress: number;
  /** Undefined when the CPU says that there is none. */
  readonly guestLinearAddress: bigint | undefined;
  /** What the access wanted. */
  readonly read: boolean;
  readonly write: boolean;
  readonly execute: boolean;
  /** What the EPT allows there. */
  readonly allowed: { readonly read: boolean; readonly write: boolean; readonly execute: boolean };
  /** The access was to what the linear address means; false: to a paging structure on the way. */
  readonly translated: boolean;
  readonly nmiUnblocking: boolean;
}

export interface EptMisconfigurationExit {
  readonly reason: 'ept-misconfiguration';
  readonly guestPhysicalAddress: number;
}

export interface InvalidGuestState {
  readonly reason: 'invalid-guest-state';
  readonly why: 'unspecified' | 'pdpte' | 'nmi' | 'vmcs-link-pointer' | `code-${bigint}`;
}

export interface MsrLoading {
  readonly reason: 'msr-loading';
  /** The first entry of the list that could not be loaded, from 1. */
  readonly entry: number;
}

export interface DescriptorTableAccess {
  readonly reason: 'gdtr-idtr-access' | 'ldtr-tr-access';
  readonly instruction: 'sgdt' | 'sidt' | 'lgdt' | 'lidt' | 'sldt' | 'str' | 'lldt' | 'ltr';
}

export type ExitDetail =
  | ExitEvent
  | ExternalInterrupt
  | TaskSwitch
  | ControlRegisterAccess
  | DebugRegisterAccess
  | IoInstruction
  | MsrAccess
  | ApicAccess
  | EptViolation
  | EptMisconfigurationExit
  | InvalidGuestState
  | MsrLoading
  | DescriptorTableAccess
  | { readonly reason: 'cpuid'; readonly leaf: number; readonly subleaf: number }
  | { readonly reason: 'invlpg'; readonly address: bigint }
  | { readonly reason: 'virtualized-eoi'; readonly vector: number }
  | { readonly reason: 'apic-write'; readonly offset: number }
  | { readonly reason: OtherReason };

type Decoded =
  | 'exception-or-nmi'
  | 'external-interrupt'
  | 'task-switch'
  | 'control-register-access'
  | 'mov-dr'
  | 'io-instruction'
  | 'rdmsr'
  | 'wrmsr'
  | 'apic-access'
  | 'ept-violation'
  | 'ept-misconfiguration'
  | 'invalid-guest-state'
  | 'msr-loading'
  | 'gdtr-idtr-access'
  | 'ldtr-tr-access'
  | 'cpuid'
  | 'invlpg'
  | 'virtualized-eoi'
  | 'apic-write';
/** Reasons whose qualification says nothing, or nothing that is decoded here. */
type OtherReason = Exclude<ExitReason, Decoded> | `reason-${number}`;

/** The parts of an exit that the details are in. */
export interface RawExit {
  readonly reason: ExitReason | `reason-${number}`;
  readonly qualification: bigint;
  readonly guestLinearAddress: bigint;
  readonly guestPhysicalAddress: number;
  readonly instructionInfo: number;
  readonly interruptionInfo: number;
  readonly interruptionErrorCode: number;
  readonly registers: Readonly<Record<RegisterName, bigint>>;
}

const low32 = (value: bigint) => Number(value & 0xffff_ffffn);

/** The details of an exit, for the reasons that have any. */
export function exitDetail(exit: RawExit): ExitDetail {
  const { reason, qualification, registers } = exit;
  const bits = low32(qualification);
  switch (reason) {
    case 'exception-or-nmi':
      return { reason, event: decodeEvent(exit.interruptionInfo, exit.interruptionErrorCode), qualification };
    case 'external-interrupt':
      return { reason, vector: decodeEvent(exit.interruptionInfo, 0)?.vector };
    case 'task-switch':
      return {
        reason,
        selector: bits & 0xffff,
        source: (['call', 'iret', 'jmp', 'task-gate'] as const)[bits >>> 30]!,
      };
    case 'control-register-access':
      return controlRegister(bits);
    case 'mov-dr':
      return {
        reason,
        register: bits & 7,
        access: bits & 16 ? 'mov-from' : 'mov-to',
        operand: REGISTERS[(bits >> 8) & 15]!,
      };
    case 'io-instruction':
      return {
        reason,
        port: bits >>> 16,
        size: ((bits & 7) + 1) as 1 | 2 | 4,
        direction: bits & 8 ? 'in' : 'out',
        string: (bits & 16) !== 0,
        rep: (bits & 32) !== 0,
        portOperand: bits & 64 ? 'immediate' : 'dx',
      };
    case 'rdmsr':
      return { reason, index: low32(registers.rcx), value: undefined };
    case 'wrmsr':
      return {
        reason,
        index: low32(registers.rcx),
        value: ((registers.rdx & 0xffff_ffffn) << 32n) | (registers.rax & 0xffff_ffffn),
      };
    case 'apic-access':
      return {
        reason,
        offset: bits & 0xfff,
        access: APIC_ACCESSES[((bits >> 12) & 15) as keyof typeof APIC_ACCESSES] ?? 'reserved',
      };
    case 'ept-violation':
      return eptViolation(exit, bits);
    case 'ept-misconfiguration':
      return { reason, guestPhysicalAddress: exit.guestPhysicalAddress };
    case 'invalid-guest-state':
      return { reason, why: invalidState(qualification) };
    case 'msr-loading':
      return { reason, entry: bits };
    case 'gdtr-idtr-access':
      return { reason, instruction: (['sgdt', 'sidt', 'lgdt', 'lidt'] as const)[tableOperation(exit)]! };
    case 'ldtr-tr-access':
      return { reason, instruction: (['sldt', 'str', 'lldt', 'ltr'] as const)[tableOperation(exit)]! };
    case 'cpuid':
      return { reason, leaf: low32(registers.rax), subleaf: low32(registers.rcx) };
    case 'invlpg':
      return { reason, address: qualification };
    case 'virtualized-eoi':
      return { reason, vector: bits & 0xff };
    case 'apic-write':
      return { reason, offset: bits & 0xfff };
    default:
      return { reason };
  }
}

function controlRegister(bits: number): ControlRegisterAccess {
  const access = (['mov-to', 'mov-from', 'clts', 'lmsw'] as const)[(bits >> 4) & 3]!;
  return {
    reason: 'control-register-access',
    register: bits & 15,
    access,
    operand: access.startsWith('mov') ? REGISTERS[(bits >> 8) & 15] : undefined,
    source: access === 'lmsw' ? bits >>> 16 : undefined,
  };
}

function eptViolation(exit: RawExit, bits: number): EptViolation {
  const bit = (n: number) => (bits & (1 << n)) !== 0;
  return {
    reason: 'ept-violation',
    guestPhysicalAddress: exit.guestPhysicalAddress,
    guestLinearAddress: bit(7) ? exit.guestLinearAddress : undefined,
    read: bit(0),
    write: bit(1),
    execute: bit(2),
    allowed: { read: bit(3), write: bit(4), execute: bit(5) },
    translated: bit(8),
    nmiUnblocking: bit(12),
  };
}

function invalidState(qualification: bigint): InvalidGuestState['why'] {
  if (qualification === 0n) return 'unspecified';
  if (qualification === 2n) return 'pdpte';
  if (qualification === 3n) return 'nmi';
  return qualification === 4n ? 'vmcs-link-pointer' : `code-${qualification}`;
}

/** Instruction identity, bits 29:28 of the instruction information. */
function tableOperation(exit: RawExit): number {
  return (exit.instructionInfo >>> 28) & 3;
}
