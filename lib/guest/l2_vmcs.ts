// SPDX-License-Identifier: Apache-2.0
// The VMCS of a new L2: guest state and controls. The host state is L1's own business (HOST_STATE).
import { abi } from './abi.ts';
import type { ControlName, VmxControls } from './controls.ts';
import type { MsrList } from './msr_list.ts';
import type { VmcsEntry } from './vmcs.ts';
import { VMCS_FIELDS as F } from './vmcs_fields.ts';

/** Access rights, SDM vol. 3, 25.4.1. */
const AR = { code: 0xa09b, data: 0xc093, tss: 0x8b, unusable: 0x1_0000 };
const CR0 = 0x8001_0033n;
/** PAE, VMXE: the latter because VMX operation fixes it to 1, for guests too. */
const CR4 = 0x2020n;
const EFER = 0x500n;
const PAT = 0x0007_0406_0007_0406n;
/** IF: with it off, an emulated machine's host gets no interrupts while L2 runs, and its other threads starve. */
const RFLAGS = 0x202n;
const NO_LINK = 0xffff_ffff_ffff_ffffn;

/** Where things are. */
export interface L2Places {
  readonly entry: number;
  readonly stackTop: number;
  readonly control: number;
  readonly gdt: { readonly address: number; readonly size: number };
  readonly idt: { readonly address: number; readonly size: number };
  readonly cr3: number;
}

/** Addresses are guest-physical; what is undefined is off. */
export interface L2Controls {
  readonly eptPointer: bigint | undefined;
  readonly vpid: number | undefined;
  readonly msrBitmap: number | undefined;
  /** Of bitmap A; B is the next page. */
  readonly ioBitmap: number | undefined;
  readonly apicAccess: number | undefined;
  readonly virtualApic: number | undefined;
  readonly tprThreshold: number | undefined;
  readonly externalInterrupts: 'exit' | 'acknowledge' | boolean | undefined;
  readonly virtualInterrupts: boolean | undefined;
  readonly postedInterrupts: { readonly vector: number; readonly descriptor: number } | undefined;
  readonly eoiExitBitmap: readonly [bigint, bigint, bigint, bigint] | undefined;
  readonly preemptionTimer: number | undefined;
  readonly entryLoadMsrs: MsrList | undefined;
  readonly exitStoreMsrs: MsrList | undefined;
  readonly exitLoadMsrs: MsrList | undefined;
  readonly exceptionBitmap: number | undefined;
  readonly extra: readonly ControlName[];
}

const ALWAYS: readonly ControlName[] = [
  'primary.activate-secondary-controls',
  'exit.host-address-space-size',
  'exit.save-ia32-pat',
  'exit.load-ia32-pat',
  'exit.save-ia32-efer',
  'exit.load-ia32-efer',
  'entry.ia-32e-mode-guest',
  'entry.load-ia32-pat',
  'entry.load-ia32-efer',
];

/** The controls an L2 with these options needs. */
export function wantedControls(options: L2Controls): ControlName[] {
  const wanted = [...ALWAYS, ...options.extra];
  const on = (value: unknown, ...names: ControlName[]) => {
    if (value !== undefined && value !== false) wanted.push(...names);
  };
  on(options.eptPointer, 'secondary.enable-ept');
  on(options.vpid, 'secondary.enable-vpid');
  on(options.msrBitmap, 'primary.use-msr-bitmaps');
  on(options.ioBitmap, 'primary.use-io-bitmaps');
  on(options.apicAccess, 'secondary.virtualize-apic-accesses');
  on(options.virtualApic, 'primary.use-tpr-shadow');
  on(options.externalInterrupts, 'pin.external-interrupt-exiting');
  on(options.externalInterrupts === 'acknowledge', 'exit.acknowledge-interrupt-on-exit');
  on(options.virtualInterrupts, 'secondary.virtual-interrupt-delivery');
  on(options.postedInterrupts, 'pin.process-posted-interrupts');
  on(options.preemptionTimer, 'pin.activate-vmx-preemption-timer');
  return wanted;
}

/** Control fields. @throws MissingControlError */
export function controlFields(controls: VmxControls, options: L2Controls): VmcsEntry[] {
  const { pin, primary, secondary, exit, entry } = controls.values(wantedControls(options));
  const fields: VmcsEntry[] = [
    [F.PIN_BASED_VM_EXEC_CONTROL, pin],
    [F.CPU_BASED_VM_EXEC_CONTROL, primary],
    [F.SECONDARY_VM_EXEC_CONTROL, secondary],
    [F.VM_EXIT_CONTROLS, exit],
    [F.VM_ENTRY_CONTROLS, entry],
    [F.EXCEPTION_BITMAP, options.exceptionBitmap ?? 0],
    [F.PAGE_FAULT_ERROR_CODE_MASK, 0],
    [F.PAGE_FAULT_ERROR_CODE_MATCH, 0],
    [F.CR3_TARGET_COUNT, 0],
    [F.VM_EXIT_MSR_STORE_COUNT, 0],
    [F.VM_EXIT_MSR_LOAD_COUNT, 0],
    [F.VM_ENTRY_MSR_LOAD_COUNT, 0],
    [F.VM_ENTRY_INTR_INFO_FIELD, 0],
    [F.CR0_GUEST_HOST_MASK, 0],
    [F.CR4_GUEST_HOST_MASK, 0],
    [F.CR0_READ_SHADOW, CR0],
    [F.CR4_READ_SHADOW, CR4],
  ];
  if (options.eptPointer !== undefined) fields.push([F.EPT_POINTER, options.eptPointer]);
  if (options.vpid !== undefined) fields.push([F.VIRTUAL_PROCESSOR_ID, options.vpid]);
  if (options.msrBitmap !== undefined) fields.push([F.MSR_BITMAP, options.msrBitmap]);
  if (options.apicAccess !== undefined) fields.push([F.APIC_ACCESS_ADDR, options.apicAccess]);
  if (options.virtualApic !== undefined) {
    fields.push(
      [F.VIRTUAL_APIC_PAGE_ADDR, options.virtualApic],
      [F.TPR_THRESHOLD, options.tprThreshold ?? 0],
    );
  }
  if (options.ioBitmap !== undefined) {
    fields.push([F.IO_BITMAP_A, options.ioBitmap], [F.IO_BITMAP_B, options.ioBitmap + 4096]);
  }
  if (options.virtualInterrupts) fields.push([F.GUEST_INTR_STATUS, 0]);
  if (options.postedInterrupts) {
    const { vector, descriptor } = options.postedInterrupts;
    fields.push([F.POSTED_INTR_NV, vector], [F.POSTED_INTR_DESC_ADDR, descriptor]);
  }
  for (const [i, word] of options.eoiExitBitmap?.entries() ?? []) {
    fields.push([F[`EOI_EXIT_BITMAP${i as 0 | 1 | 2 | 3}`], word]);
  }
  if (options.preemptionTimer !== undefined) {
    fields.push([F.VMX_PREEMPTION_TIMER_VALUE, options.preemptionTimer]);
  }
  const { entryLoadMsrs, exitStoreMsrs, exitLoadMsrs } = options;
  if (entryLoadMsrs) {
    fields.push(
      [F.VM_ENTRY_MSR_LOAD_ADDR, entryLoadMsrs.gpa],
      [F.VM_ENTRY_MSR_LOAD_COUNT, entryLoadMsrs.length],
    );
  }
  if (exitStoreMsrs) {
    fields.push(
      [F.VM_EXIT_MSR_STORE_ADDR, exitStoreMsrs.gpa],
      [F.VM_EXIT_MSR_STORE_COUNT, exitStoreMsrs.length],
    );
  }
  if (exitLoadMsrs) {
    fields.push([F.VM_EXIT_MSR_LOAD_ADDR, exitLoadMsrs.gpa], [F.VM_EXIT_MSR_LOAD_COUNT, exitLoadMsrs.length]);
  }
  return fields;
}

/** 64-bit mode at CPL 0, flat segments, interrupts on: what is the same for every L2. */
const FLAT: readonly VmcsEntry[] = [
  ...(['ES', 'SS', 'DS', 'FS', 'GS', 'CS'] as const).flatMap((segment): VmcsEntry[] => [
    [F[`GUEST_${segment}_SELECTOR`], segment === 'CS' ? abi.SELECTOR_CODE : abi.SELECTOR_DATA],
    [F[`GUEST_${segment}_LIMIT`], 0xffff_ffff],
    [F[`GUEST_${segment}_AR_BYTES`], segment === 'CS' ? AR.code : AR.data],
    [F[`GUEST_${segment}_BASE`], 0],
  ]),
  [F.GUEST_LDTR_SELECTOR, 0],
  [F.GUEST_LDTR_LIMIT, 0],
  [F.GUEST_LDTR_AR_BYTES, AR.unusable],
  [F.GUEST_LDTR_BASE, 0],
  [F.GUEST_TR_SELECTOR, abi.SELECTOR_TSS],
  [F.GUEST_TR_LIMIT, 0x67],
  [F.GUEST_TR_AR_BYTES, AR.tss],
  [F.GUEST_TR_BASE, 0],
  [F.GUEST_CR0, CR0],
  [F.GUEST_CR4, CR4],
  [F.GUEST_DR7, 0x400],
  [F.GUEST_RFLAGS, RFLAGS],
  [F.GUEST_IA32_EFER, EFER],
  [F.GUEST_IA32_PAT, PAT],
  [F.GUEST_IA32_DEBUGCTL, 0],
  [F.GUEST_SYSENTER_CS, 0],
  [F.GUEST_SYSENTER_ESP, 0],
  [F.GUEST_SYSENTER_EIP, 0],
  [F.GUEST_INTERRUPTIBILITY_INFO, 0],
  [F.GUEST_ACTIVITY_STATE, 0],
  [F.GUEST_PENDING_DBG_EXCEPTIONS, 0],
  [F.VMCS_LINK_POINTER, NO_LINK],
];

/** Guest state. */
export function guestState(places: L2Places): VmcsEntry[] {
  return [
    ...FLAT,
    [F.GUEST_GS_BASE, places.control],
    [F.GUEST_GDTR_BASE, places.gdt.address],
    [F.GUEST_GDTR_LIMIT, places.gdt.size - 1],
    [F.GUEST_IDTR_BASE, places.idt.address],
    [F.GUEST_IDTR_LIMIT, places.idt.size - 1],
    [F.GUEST_CR3, places.cr3],
    [F.GUEST_RSP, places.stackTop],
    [F.GUEST_RIP, places.entry],
  ];
}
