// SPDX-License-Identifier: Apache-2.0
export type { Clock } from './abi/clock.ts';
export type { CpuidEntry } from './abi/cpuid.ts';
export type { Breakpoint, DebugRegs, GuestDebug } from './abi/debug.ts';
export { VCPUEVENT_VALID, type VcpuEvents, type VcpuEventsPatch } from './abi/events.ts';
export type { Fpu } from './abi/fpu.ts';
export type { GsiRoute, IoEvent, IrqChip } from './abi/irq.ts';
export type {
  DescriptorTable,
  Register,
  Regs,
  Segment,
  Sregs,
  Sregs2,
  Sregs2Patch,
  SregsPatch,
} from './abi/regs.ts';
export type { Backing, BackingSpec, BackingType } from './backing.ts';
export { type CapabilityName, capabilities } from './capabilities.ts';
export type { DirtyPage } from './dirty_ring.ts';
export type { EnableCapOptions } from './enable_cap.ts';
export {
  KvmClosedError,
  KvmError,
  KvmMsrError,
  KvmPendingExitError,
  KvmUnsupportedError,
  VcpuBusyError,
} from './errors.ts';
export { EventFd } from './event_fd.ts';
export type { Exit } from './exit.ts';
export type { ExitRule } from './exit_filter.ts';
export { Kvm, kvmRunTime, VM_TYPE, type VmTypeName } from './kvm.ts';
export { type KvmRun, SYNC } from './kvm_run.ts';
export type { MemoryOptions, VmMemory } from './memory.ts';
export type { MemoryRegion, Protection, RegionFlags } from './region.ts';
export type { VcpuSnapshot } from './snapshot.ts';
export type { StatSchema, Stats } from './stats.ts';
export { runSteps, type Step, type StepTimes, timestamp, UnexpectedExitError } from './step_loop.ts';
export type { Fault, Userfault } from './userfault.ts';
export type { Vcpu } from './vcpu.ts';
export { MP_STATE, type Translation } from './vcpu_state.ts';
export type { Vm } from './vm.ts';
