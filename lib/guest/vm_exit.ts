// SPDX-License-Identifier: Apache-2.0
import type { RecordView } from './abi.ts';
import { type ExitDetail, exitDetail, REGISTERS, type RegisterName } from './exit_detail.ts';
import { type ExitReason, exitReasonName } from './exit_reasons.ts';

/** A VM exit as L1 read it from the VMCS. Fields that the reason leaves undefined hold old values (SDM 28.2). */
export interface VmExit {
  readonly reason: ExitReason | `reason-${number}`;
  /** Basic exit reason, bits 15:0. */
  readonly code: number;
  /** Bit 31 of the exit reason: the VM entry failed and L2 did not run. */
  readonly entryFailure: boolean;
  readonly qualification: bigint;
  readonly guestLinearAddress: bigint;
  readonly guestPhysicalAddress: number;
  readonly instructionLength: number;
  readonly instructionInfo: number;
  readonly interruptionInfo: number;
  readonly interruptionErrorCode: number;
  readonly idtVectoringInfo: number;
  readonly idtVectoringErrorCode: number;
  readonly activityState: number;
  readonly interruptibility: number;
  readonly rip: bigint;
  readonly rflags: bigint;
  readonly cr0: bigint;
  readonly cr3: bigint;
  readonly cr4: bigint;
  readonly registers: Readonly<Record<RegisterName, bigint>>;
  /** The qualification and its companions, decoded; `detail.reason` says which. */
  readonly detail: ExitDetail;
}

/** The exit that ended the last ENTER of an L2. */
export function readExit(area: RecordView<'l2'>): VmExit {
  const exit = area.inner('exit', 'exit');
  const reason = exit.u32('reason');
  const code = reason & 0xffff;
  const registers = {} as Record<RegisterName, bigint>;
  for (let i = 0; i < REGISTERS.length; i += 1) registers[REGISTERS[i]!] = area.u64('regs', i);
  registers.rsp = exit.u64('rsp');
  const raw = {
    reason: exitReasonName(code),
    code,
    entryFailure: reason >= 0x8000_0000,
    qualification: exit.u64('qualification'),
    guestLinearAddress: exit.u64('guest_linear_address'),
    guestPhysicalAddress: Number(exit.u64('guest_physical_address')),
    instructionLength: exit.u32('instruction_length'),
    instructionInfo: exit.u32('instruction_info'),
    interruptionInfo: exit.u32('intr_info'),
    interruptionErrorCode: exit.u32('intr_error_code'),
    idtVectoringInfo: exit.u32('idt_vectoring_info'),
    idtVectoringErrorCode: exit.u32('idt_vectoring_error_code'),
    activityState: exit.u32('activity_state'),
    interruptibility: exit.u32('interruptibility'),
    rip: exit.u64('rip'),
    rflags: exit.u64('rflags'),
    cr0: exit.u64('cr0'),
    cr3: exit.u64('cr3'),
    cr4: exit.u64('cr4'),
    registers,
  };
  return { ...raw, detail: exitDetail(raw) };
}
