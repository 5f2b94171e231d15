// SPDX-License-Identifier: Apache-2.0
export { abiPorts, RecordView } from './abi.ts';
export { eoiExitBitmap, PostedInterruptDescriptor, VirtualApicPage } from './apic_pages.ts';
export {
  type AccessSize,
  Batch,
  CommandPages,
  type CommandResult,
  type CommandStatus,
  type EnterMode,
  INVEPT,
  INVVPID,
} from './batch.ts';
export {
  type ControlGroup,
  type ControlName,
  offeredControls,
  VMX_CAPABILITY_MSRS,
  VmxControls,
} from './controls.ts';
export { Image, loadImage } from './elf.ts';
export type {
  Ept,
  EptMemoryType,
  EptMisconfiguration,
  EptOptions,
  EptPageOptions,
  EptPermissions,
} from './ept.ts';
export { GuestFault, GuestProtocolError, MissingControlError, VmxError } from './errors.ts';
export { decodeEvent, type EventType, encodeEvent, type InjectedEvent, type VectoredEvent } from './event.ts';
export {
  EVMCS_BYTES,
  EVMCS_CLEAN,
  EVMCS_FIELDS,
  EVMCS_REVISION,
  EVMCS_WORDS,
  type Evmcs,
  type EvmcsGroup,
  HV_MSRS,
  VP_ASSIST,
} from './evmcs.ts';
export type { ExitDetail } from './exit_detail.ts';
export { type ExitReason, exitReasonCode, exitReasonName } from './exit_reasons.ts';
export type { IoBitmap } from './io_bitmap.ts';
export { type BootOptions, L1 } from './l1.ts';
export type { L1Vcpu, RunOptions, VcpuStop } from './l1_vcpu.ts';
export type { L2 } from './l2.ts';
export type { EnterOptions, ExitAction, ExitPolicy, L2Progress, L2Stop } from './l2_enter.ts';
export type { L2Options, L2Structures } from './l2_options.ts';
export type { MsrBitmap } from './msr_bitmap.ts';
export type { MsrList } from './msr_list.ts';
export type { Entry, PageOptions, PageSize, PageTables, TreeOptions } from './paging.ts';
export { foldChecksum, L2Program, vmcallRegsValues } from './program.ts';
export {
  type Actor,
  atEachSync,
  hostActor,
  type InterleaveOptions,
  type Interleaving,
  InterleavingError,
  interleave,
  type L2ActorOptions,
  l2Actor,
  lockstep,
} from './schedule.ts';
export type { VmExit } from './vm_exit.ts';
export type { Vmcs, VmcsValues } from './vmcs.ts';
export {
  VMCS_FIELD_NAMES,
  VMCS_FIELDS,
  type VmcsField,
  type VmcsFieldInfo,
  type VmcsFieldOf,
  type VmcsFieldWidth,
  vmcsEncoding,
  vmcsFieldInfo,
  type WidthOf,
} from './vmcs_fields.ts';
