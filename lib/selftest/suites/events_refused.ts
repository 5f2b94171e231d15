// SPDX-License-Identifier: Apache-2.0
// VM entries that must not happen: bad control and host-state fields (VMfail 7 and 8, SDM vol. 3, 27.2) and bad guest
// state (exit 33, 27.3). Every row writes its fields into a good VMCS, tries, and puts the old values back.
import type { ControlName, VmcsField } from '../../guest/index.ts';
import type { Observed, Selftest } from '../engine/model.ts';
import { vmxControl } from '../engine/requirements.ts';
import { type Bench, CONTROL_FIELD, type ScenarioCase, scenarioTest } from './scenario.ts';
import { trace } from './trace.ts';

type Fields = Partial<Record<VmcsField, bigint | number>>;

interface Row {
  readonly name: string;
  readonly fields?: Fields;
  /** Controls to set, and to clear, in this row alone. */
  readonly set?: readonly ControlName[];
  readonly clear?: readonly ControlName[];
}

const NONCANONICAL = 0x8000_0000_0000_0000n;
/** No CPU has so many physical-address bits that this one is none of them. */
const BEYOND = 1n << 51n;
const UNALIGNED = 0x1008;
const EVENT = 0x8000_0000;

/** VM-execution, VM-exit and VM-entry control fields, SDM vol. 3, 27.2.1. */
const CONTROLS: readonly Row[] = [
  { name: 'pin-based, nothing set', fields: { PIN_BASED_VM_EXEC_CONTROL: 0 } },
  { name: 'pin-based, all set', fields: { PIN_BASED_VM_EXEC_CONTROL: 0xffff_ffff } },
  { name: 'primary, nothing set', fields: { CPU_BASED_VM_EXEC_CONTROL: 0 } },
  { name: 'primary, all set', fields: { CPU_BASED_VM_EXEC_CONTROL: 0xffff_ffff } },
  { name: 'secondary, all set', fields: { SECONDARY_VM_EXEC_CONTROL: 0xffff_ffff } },
  { name: 'exit controls, nothing set', fields: { VM_EXIT_CONTROLS: 0 } },
  { name: 'exit controls, all set', fields: { VM_EXIT_CONTROLS: 0xffff_ffff } },
  { name: 'entry controls, nothing set', fields: { VM_ENTRY_CONTROLS: 0 } },
  { name: 'entry controls, all set', fields: { VM_ENTRY_CONTROLS: 0xffff_ffff } },
  { name: 'five CR3 targets', fields: { CR3_TARGET_COUNT: 5 } },
  {
    name: 'I/O bitmap A unaligned',
    set: ['primary.use-io-bitmaps'],
    fields: { IO_BITMAP_A: UNALIGNED, IO_BITMAP_B: 0x1000 },
  },
  {
    name: 'I/O bitmap B unaligned',
    set: ['primary.use-io-bitmaps'],
    fields: { IO_BITMAP_A: 0x1000, IO_BITMAP_B: UNALIGNED },
  },
  { name: 'MSR bitmap unaligned', set: ['primary.use-msr-bitmaps'], fields: { MSR_BITMAP: UNALIGNED } },
  { name: 'MSR bitmap beyond memory', set: ['primary.use-msr-bitmaps'], fields: { MSR_BITMAP: BEYOND } },
  {
    name: 'virtual-APIC page unaligned',
    set: ['primary.use-tpr-shadow'],
    fields: { VIRTUAL_APIC_PAGE_ADDR: UNALIGNED, TPR_THRESHOLD: 0 },
  },
  {
    name: 'TPR threshold above 15',
    set: ['primary.use-tpr-shadow'],
    fields: { VIRTUAL_APIC_PAGE_ADDR: 0x1000, TPR_THRESHOLD: 16 },
  },
  { name: 'virtual NMIs without NMI exiting', set: ['pin.virtual-nmis'] },
  { name: 'NMI-window exiting without virtual NMIs', set: ['primary.nmi-window-exiting'] },
  {
    name: 'APIC-access page unaligned',
    set: ['secondary.virtualize-apic-accesses'],
    fields: { APIC_ACCESS_ADDR: UNALIGNED },
  },
  { name: 'x2APIC mode without TPR shadow', set: ['secondary.virtualize-x2apic-mode'] },
  { name: 'APIC registers without TPR shadow', set: ['secondary.apic-register-virtualization'] },
  {
    name: 'x2APIC mode and APIC accesses',
    set: ['primary.use-tpr-shadow', 'secondary.virtualize-x2apic-mode', 'secondary.virtualize-apic-accesses'],
    fields: { VIRTUAL_APIC_PAGE_ADDR: 0x1000, APIC_ACCESS_ADDR: 0x1000, TPR_THRESHOLD: 0 },
  },
  {
    name: 'virtual interrupts without external-interrupt exiting',
    set: ['primary.use-tpr-shadow', 'secondary.virtual-interrupt-delivery'],
    fields: { VIRTUAL_APIC_PAGE_ADDR: 0x1000, TPR_THRESHOLD: 0 },
  },
  {
    name: 'posted interrupts without virtual interrupts',
    set: [
      'pin.external-interrupt-exiting',
      'pin.process-posted-interrupts',
      'exit.acknowledge-interrupt-on-exit',
      'primary.use-tpr-shadow',
    ],
    fields: {
      VIRTUAL_APIC_PAGE_ADDR: 0x1000,
      TPR_THRESHOLD: 0,
      POSTED_INTR_NV: 0xe2,
      POSTED_INTR_DESC_ADDR: 0x1000,
    },
  },
  ...(
    [
      ['posted-interrupt descriptor unaligned', { POSTED_INTR_NV: 0xe2, POSTED_INTR_DESC_ADDR: UNALIGNED }],
      ['posted-interrupt vector above 255', { POSTED_INTR_NV: 0x100, POSTED_INTR_DESC_ADDR: 0x1000 }],
    ] as const
  ).map(
    ([name, fields]): Row => ({
      name,
      set: [
        'pin.external-interrupt-exiting',
        'pin.process-posted-interrupts',
        'exit.acknowledge-interrupt-on-exit',
        'primary.use-tpr-shadow',
        'secondary.virtual-interrupt-delivery',
      ],
      fields: { VIRTUAL_APIC_PAGE_ADDR: 0x1000, TPR_THRESHOLD: 0, ...fields },
    }),
  ),
  { name: 'VPID 0', set: ['secondary.enable-vpid'], fields: { VIRTUAL_PROCESSOR_ID: 0 } },
  { name: 'EPT memory type 1', fields: { EPT_POINTER: 0x1019 } },
  { name: 'EPT walk of three levels', fields: { EPT_POINTER: 0x1016 } },
  { name: 'EPTP reserved bit', fields: { EPT_POINTER: 0x181e } },
  { name: 'EPTP beyond memory', fields: { EPT_POINTER: BEYOND | 0x1en } },
  {
    name: 'unrestricted guest without EPT',
    set: ['secondary.unrestricted-guest'],
    clear: ['secondary.enable-ept'],
  },
  {
    name: 'PML without EPT',
    set: ['secondary.enable-pml'],
    clear: ['secondary.enable-ept'],
    fields: { PML_ADDRESS: 0x1000 },
  },
  { name: 'PML address unaligned', set: ['secondary.enable-pml'], fields: { PML_ADDRESS: UNALIGNED } },
  { name: 'VM function 1', set: ['secondary.enable-vm-functions'], fields: { VM_FUNCTION_CONTROL: 2 } },
  {
    name: 'EPTP list unaligned',
    set: ['secondary.enable-vm-functions'],
    fields: { VM_FUNCTION_CONTROL: 1, EPTP_LIST_ADDRESS: UNALIGNED },
  },
  {
    name: 'VMREAD bitmap unaligned',
    set: ['secondary.vmcs-shadowing'],
    fields: { VMREAD_BITMAP: UNALIGNED, VMWRITE_BITMAP: 0x1000 },
  },
  { name: 'preemption timer saved without being active', set: ['exit.save-vmx-preemption-timer'] },
  {
    name: 'exit-store list unaligned',
    fields: { VM_EXIT_MSR_STORE_COUNT: 1, VM_EXIT_MSR_STORE_ADDR: 0x1004 },
  },
  {
    name: 'exit-load list beyond memory',
    fields: { VM_EXIT_MSR_LOAD_COUNT: 1, VM_EXIT_MSR_LOAD_ADDR: BEYOND },
  },
  {
    name: 'entry-load list unaligned',
    fields: { VM_ENTRY_MSR_LOAD_COUNT: 1, VM_ENTRY_MSR_LOAD_ADDR: 0x1004 },
  },
];

/** The VM-entry interruption-information field, SDM vol. 3, 27.2.1.3. */
const INJECTIONS: readonly Row[] = (
  [
    ['reserved type 1', EVENT | (1 << 8)],
    ['NMI with vector 3', EVENT | (2 << 8) | 3],
    ['hardware exception 32', EVENT | (3 << 8) | 32],
    ['error code with an external interrupt', EVENT | (1 << 11) | 0x61],
    ['error code with #UD', EVENT | (1 << 11) | (3 << 8) | 6],
    ['#GP without its error code', EVENT | (3 << 8) | 13],
    ['reserved bit 13', EVENT | (1 << 13) | 0x61],
  ] as const
).map(
  ([name, info]): Row => ({
    name,
    fields: { VM_ENTRY_INTR_INFO_FIELD: info >>> 0, VM_ENTRY_EXCEPTION_ERROR_CODE: 0 },
  }),
);
const MORE_INJECTIONS: readonly Row[] = [
  {
    name: 'error code with bits 31:16',
    fields: {
      VM_ENTRY_INTR_INFO_FIELD: (EVENT | (1 << 11) | (3 << 8) | 13) >>> 0,
      VM_ENTRY_EXCEPTION_ERROR_CODE: 0x1_0000,
    },
  },
  {
    name: 'software interrupt of 16 bytes',
    fields: { VM_ENTRY_INTR_INFO_FIELD: (EVENT | (4 << 8) | 0x61) >>> 0, VM_ENTRY_INSTRUCTION_LEN: 16 },
  },
];

/** Host-state area, SDM vol. 3, 27.2.2 to 27.2.4. */
const HOST_STATE: readonly Row[] = [
  { name: 'CR0 without PG', fields: { HOST_CR0: 0x33 } },
  { name: 'CR4 without PAE', fields: { HOST_CR4: 0x2000 } },
  { name: 'CR4 without VMXE', fields: { HOST_CR4: 0x20 } },
  { name: 'CR3 beyond memory', fields: { HOST_CR3: BEYOND } },
  { name: 'CS 0', fields: { HOST_CS_SELECTOR: 0 } },
  { name: 'TR 0', fields: { HOST_TR_SELECTOR: 0 } },
  { name: 'CS with RPL 3', fields: { HOST_CS_SELECTOR: 0xb } },
  { name: 'SS of the LDT', fields: { HOST_SS_SELECTOR: 0x14 } },
  { name: 'DS with RPL 1', fields: { HOST_DS_SELECTOR: 0x11 } },
  { name: 'ES with RPL 2', fields: { HOST_ES_SELECTOR: 0x12 } },
  { name: 'FS of the LDT', fields: { HOST_FS_SELECTOR: 4 } },
  { name: 'GS with RPL 3', fields: { HOST_GS_SELECTOR: 3 } },
  { name: 'TR with RPL 3', fields: { HOST_TR_SELECTOR: 0x1b } },
  { name: 'FS base not canonical', fields: { HOST_FS_BASE: NONCANONICAL } },
  { name: 'GS base not canonical', fields: { HOST_GS_BASE: NONCANONICAL } },
  { name: 'TR base not canonical', fields: { HOST_TR_BASE: NONCANONICAL } },
  { name: 'GDTR base not canonical', fields: { HOST_GDTR_BASE: NONCANONICAL } },
  { name: 'IDTR base not canonical', fields: { HOST_IDTR_BASE: NONCANONICAL } },
  { name: 'SYSENTER_ESP not canonical', fields: { HOST_IA32_SYSENTER_ESP: NONCANONICAL } },
  { name: 'SYSENTER_EIP not canonical', fields: { HOST_IA32_SYSENTER_EIP: NONCANONICAL } },
  { name: 'RIP not canonical', fields: { HOST_RIP: NONCANONICAL } },
  { name: 'PAT entry of type 2', fields: { HOST_IA32_PAT: 0x0007_0406_0007_0402n } },
  { name: 'EFER without LMA', fields: { HOST_IA32_EFER: 0x100 } },
  { name: 'EFER reserved bit', fields: { HOST_IA32_EFER: 0x502 } },
  { name: '32-bit host', clear: ['exit.host-address-space-size'] },
];

/** Guest-state area, SDM vol. 3, 27.3.1. */
const GUEST_STATE: readonly Row[] = [
  { name: 'CR0 with PG and without PE', fields: { GUEST_CR0: 0x8001_0032 } },
  { name: 'CR0 without NE', fields: { GUEST_CR0: 0x8001_0013 } },
  { name: 'CR4 without PAE in IA-32e mode', fields: { GUEST_CR4: 0x2000 } },
  { name: 'CR4 without VMXE', fields: { GUEST_CR4: 0x20 } },
  { name: 'CR4 reserved bit', fields: { GUEST_CR4: 0x8000_2020 } },
  { name: 'CR3 beyond memory', fields: { GUEST_CR3: BEYOND } },
  { name: 'DR7 bits 63:32', set: ['entry.load-debug-controls'], fields: { GUEST_DR7: 1n << 32n } },
  { name: 'SYSENTER_ESP not canonical', fields: { GUEST_SYSENTER_ESP: NONCANONICAL } },
  { name: 'SYSENTER_EIP not canonical', fields: { GUEST_SYSENTER_EIP: NONCANONICAL } },
  { name: 'PAT entry of type 3', fields: { GUEST_IA32_PAT: 0x0007_0406_0007_0403n } },
  { name: 'EFER without LMA in IA-32e mode', fields: { GUEST_IA32_EFER: 0x100 } },
  { name: 'EFER reserved bit', fields: { GUEST_IA32_EFER: 0x502 } },
  { name: 'CS of a data type', fields: { GUEST_CS_AR_BYTES: 0xa093 } },
  { name: 'CS with L and D', fields: { GUEST_CS_AR_BYTES: 0xe09b } },
  { name: 'CS unusable', fields: { GUEST_CS_AR_BYTES: 0x1_a09b } },
  { name: 'SS of a code type', fields: { GUEST_SS_AR_BYTES: 0xc09b } },
  { name: 'SS with another DPL than CS', fields: { GUEST_SS_AR_BYTES: 0xc0f3 } },
  { name: 'DS not present', fields: { GUEST_DS_AR_BYTES: 0xc013 } },
  { name: 'TR 16-bit in IA-32e mode', fields: { GUEST_TR_AR_BYTES: 0x83 } },
  { name: 'TR unusable', fields: { GUEST_TR_AR_BYTES: 0x1_008b } },
  { name: 'TR of the LDT', fields: { GUEST_TR_SELECTOR: 0x1c } },
  { name: 'TR base not canonical', fields: { GUEST_TR_BASE: NONCANONICAL } },
  { name: 'GS base not canonical', fields: { GUEST_GS_BASE: NONCANONICAL } },
  { name: 'LDTR of a TSS type', fields: { GUEST_LDTR_AR_BYTES: 0x8b } },
  { name: 'GDTR base not canonical', fields: { GUEST_GDTR_BASE: NONCANONICAL } },
  { name: 'GDTR limit above 64 KiB', fields: { GUEST_GDTR_LIMIT: 0x1_0000 } },
  { name: 'IDTR base not canonical', fields: { GUEST_IDTR_BASE: NONCANONICAL } },
  { name: 'IDTR limit above 64 KiB', fields: { GUEST_IDTR_LIMIT: 0x1_0000 } },
  { name: 'RFLAGS without bit 1', fields: { GUEST_RFLAGS: 0x200 } },
  { name: 'RFLAGS.VM in IA-32e mode', fields: { GUEST_RFLAGS: 0x2_0202 } },
  { name: 'RFLAGS reserved bit', fields: { GUEST_RFLAGS: 0x8202 } },
  { name: 'activity state 4', fields: { GUEST_ACTIVITY_STATE: 4 } },
  { name: 'interruptibility reserved bit', fields: { GUEST_INTERRUPTIBILITY_INFO: 0x20 } },
  { name: 'STI and MOV SS blocking', fields: { GUEST_INTERRUPTIBILITY_INFO: 3 } },
  { name: 'STI blocking with interrupts off', fields: { GUEST_INTERRUPTIBILITY_INFO: 1, GUEST_RFLAGS: 2 } },
  { name: 'pending debug reserved bit', fields: { GUEST_PENDING_DBG_EXCEPTIONS: 0x10 } },
];

const LINK_POINTER: readonly Row[] = [
  { name: 'unaligned', fields: { VMCS_LINK_POINTER: UNALIGNED } },
  { name: 'beyond memory', fields: { VMCS_LINK_POINTER: BEYOND } },
  { name: 'not a VMCS', fields: { VMCS_LINK_POINTER: 0x1000 } },
];

async function attempt(bench: Bench, row: Row): Promise<string> {
  const { l2 } = bench;
  const controls = [...(row.set ?? []), ...(row.clear ?? [])].map(
    (name) => CONTROL_FIELD[name.split('.')[0] as keyof typeof CONTROL_FIELD],
  );
  const fields = [...new Set([...controls, ...(Object.keys(row.fields ?? {}) as VmcsField[])])];
  const old = await l2.fields.readAll(fields);
  for (const name of row.set ?? []) await bench.write(name, true);
  for (const name of row.clear ?? []) await bench.write(name, false);
  await l2.fields.writeAll(row.fields ?? {});
  const { exits } = await trace(l2);
  if (!bench.cpu.busy) await l2.fields.writeAll(old);
  return exits.join(', ');
}

/** One L2 on which every row is tried; at the end it must still be good. */
function refused(id: string, title: string, rows: readonly Row[], expected: string): ScenarioCase {
  const needs = new Set(rows.flatMap((row) => row.set ?? []));
  return {
    id,
    title,
    requires: [...needs].map(vmxControl),
    program: (p) => p.fold(7),
    before: async (bench) => {
      for (const row of rows) {
        bench.results[row.name] = bench.cpu.busy ? 'not tried' : await attempt(bench, row);
      }
    },
    after: (bench): Record<string, Observed> => ({ launches: bench.l2.timing.entries, ...bench.results }),
    expect: {
      exits: ['vmcall'],
      executed: 1,
      values: [7],
      more: { launches: 1, ...Object.fromEntries(rows.map((row) => [row.name, expected])) },
    },
  };
}

const TABLES: readonly ScenarioCase[] = [
  refused(
    'events/vmfail/controls',
    'bad control fields: VMfail 7, and L2 is not entered',
    CONTROLS,
    'VMLAUNCH VMfailValid 7',
  ),
  refused(
    'events/vmfail/injection',
    'bad interruption information: VMfail 7, and L2 is not entered',
    [...INJECTIONS, ...MORE_INJECTIONS],
    'VMLAUNCH VMfailValid 7',
  ),
  refused(
    'events/vmfail/host-state',
    'bad host state: VMfail 8, and L2 is not entered',
    HOST_STATE,
    'VMLAUNCH VMfailValid 8',
  ),
  refused(
    'events/invalid-guest-state/fields',
    'bad guest state: exit 33 and the launch state stays',
    GUEST_STATE,
    'invalid-guest-state at-entry',
  ),
  refused(
    'events/invalid-guest-state/link-pointer',
    'a bad VMCS link pointer: exit 33 with qualification 4',
    LINK_POINTER,
    'invalid-guest-state at-entry q=0x4',
  ),
  {
    id: 'events/invalid-guest-state/by-userspace',
    title: 'userspace makes TR unusable while L2 is active: L1 sees a triple fault',
    program: (p) => p.sync(1).fold(7),
    trace: (bench) => ({ onSync: () => bench.cpu.vcpu.setSregs({ tr: { unusable: 1 } }) }),
    after: async ({ cpu }) => ({ l1: (await cpu.cpuid(0)).eax > 0 }),
    expect: { exits: ['sync 1', 'triple-fault'], executed: 0, values: [], more: { l1: true } },
  },
  {
    id: 'events/launch-state',
    title: 'VMRESUME of a clear VMCS is error 5, VMLAUNCH of a launched one error 4',
    program: (p) => p.fold(7).vmcall().fold(8),
    before: async (bench) => {
      bench.results['resumeOfClear'] = (await trace(bench.l2, { mode: 'resume' })).exits.join(', ');
    },
    after: async (bench) => ({
      ...bench.results,
      launchOfLaunched: (await trace(bench.l2, { mode: 'launch' })).exits,
      resumed: (await trace(bench.l2, { mode: 'resume' })).exits,
    }),
    expect: {
      exits: ['vmcall'],
      executed: 1,
      more: {
        resumeOfClear: 'VMRESUME VMfailValid 5',
        launchOfLaunched: ['VMLAUNCH VMfailValid 4'],
        resumed: ['vmcall'],
      },
    },
  },
];

export const refusedEntries: readonly Selftest[] = TABLES.map(scenarioTest);
