// SPDX-License-Identifier: Apache-2.0
// The enlightened VMCS, version 1, and the VP assist page: HV_VMX_ENLIGHTENED_VMCS and HV_VP_ASSIST_PAGE of the
// Hyper-V Top-Level Functional Specification.
import { VMCS_FIELDS, type VmcsField, vmcsFieldInfo } from './vmcs_fields.ts';

/** First word of an eVMCS, in place of the VMCS revision identifier. */
export const EVMCS_REVISION = 1;
export const EVMCS_BYTES = 1024;

/** Groups of fields by their bit in `hv_clean_fields`: a set bit says the group did not change since the last entry. */
export const EVMCS_CLEAN = {
  ioBitmap: 1 << 0,
  msrBitmap: 1 << 1,
  controlGroup2: 1 << 2,
  controlGroup1: 1 << 3,
  controlProcessor: 1 << 4,
  controlEvent: 1 << 5,
  controlEntry: 1 << 6,
  controlExceptions: 1 << 7,
  controlRegisters: 1 << 8,
  controlTranslation: 1 << 9,
  guestBasic: 1 << 10,
  guestGroup1: 1 << 11,
  guestGroup2: 1 << 12,
  hostPointers: 1 << 13,
  hostGroup1: 1 << 14,
  enlightenments: 1 << 15,
  all: 0xffff,
} as const;
export type EvmcsGroup = Exclude<keyof typeof EVMCS_CLEAN, 'all'>;

/** Words of an eVMCS that no VMCS has. */
export const EVMCS_WORDS = {
  cleanFields: { offset: 824, bytes: 4 },
  syntheticControls: { offset: 832, bytes: 4 },
  /** Bit 0: nested flush hypercall; bit 1: the MSR bitmap's clean bit may be trusted. */
  enlightenmentsControl: { offset: 836, bytes: 4 },
  vpId: { offset: 840, bytes: 4 },
  vmId: { offset: 848, bytes: 8 },
  partitionAssistPage: { offset: 856, bytes: 8 },
} as const;
export type EvmcsWord = keyof typeof EVMCS_WORDS;

/** Of HV_VP_ASSIST_PAGE; MSR 0x40000073 holds the page's address and, in bit 0, that it is enabled. */
export const VP_ASSIST = { nestedFeatures: 32, enlightenVmEntry: 40, currentNestedVmcs: 48 } as const;
export const HV_MSRS = { guestOsId: 0x4000_0000, hypercall: 0x4000_0001, vpAssistPage: 0x4000_0073 } as const;

/** Runs of fields that follow each other without a gap: offset of the first, clean group, names. */
const RUNS: readonly (readonly [offset: number, group: EvmcsGroup | null, ...fields: VmcsField[]])[] = [
  [8, 'hostGroup1', ...selectors('HOST', ['ES', 'CS', 'SS', 'DS', 'FS', 'GS', 'TR'])],
  [24, 'hostGroup1', 'HOST_IA32_PAT', 'HOST_IA32_EFER', 'HOST_CR0', 'HOST_CR3', 'HOST_CR4'],
  [64, 'hostGroup1', 'HOST_IA32_SYSENTER_ESP', 'HOST_IA32_SYSENTER_EIP', 'HOST_RIP', 'HOST_IA32_SYSENTER_CS'],
  [92, 'controlGroup1', 'PIN_BASED_VM_EXEC_CONTROL', 'VM_EXIT_CONTROLS', 'SECONDARY_VM_EXEC_CONTROL'],
  [104, 'ioBitmap', 'IO_BITMAP_A', 'IO_BITMAP_B'],
  [120, 'msrBitmap', 'MSR_BITMAP'],
  [128, 'guestGroup2', ...selectors('GUEST', ['ES', 'CS', 'SS', 'DS', 'FS', 'GS', 'LDTR', 'TR'])],
  [144, 'guestGroup2', ...segments('LIMIT', true)],
  [184, 'guestGroup2', ...segments('AR_BYTES', false)],
  [216, 'guestGroup2', ...segments('BASE', true)],
  [320, 'controlGroup2', 'VM_EXIT_MSR_STORE_ADDR', 'VM_EXIT_MSR_LOAD_ADDR', 'VM_ENTRY_MSR_LOAD_ADDR'],
  [
    344,
    'controlRegisters',
    'CR3_TARGET_VALUE0',
    'CR3_TARGET_VALUE1',
    'CR3_TARGET_VALUE2',
    'CR3_TARGET_VALUE3',
  ],
  [376, 'controlExceptions', 'PAGE_FAULT_ERROR_CODE_MASK', 'PAGE_FAULT_ERROR_CODE_MATCH'],
  [384, 'controlRegisters', 'CR3_TARGET_COUNT'],
  [388, 'controlGroup2', 'VM_EXIT_MSR_STORE_COUNT', 'VM_EXIT_MSR_LOAD_COUNT', 'VM_ENTRY_MSR_LOAD_COUNT'],
  [400, 'controlGroup2', 'TSC_OFFSET', 'VIRTUAL_APIC_PAGE_ADDR'],
  [416, 'guestGroup1', 'VMCS_LINK_POINTER', 'GUEST_IA32_DEBUGCTL', 'GUEST_IA32_PAT', 'GUEST_IA32_EFER'],
  [448, 'guestGroup1', 'GUEST_PDPTR0', 'GUEST_PDPTR1', 'GUEST_PDPTR2', 'GUEST_PDPTR3'],
  [480, 'guestGroup1', 'GUEST_PENDING_DBG_EXCEPTIONS', 'GUEST_SYSENTER_ESP', 'GUEST_SYSENTER_EIP'],
  [504, 'guestGroup1', 'GUEST_ACTIVITY_STATE', 'GUEST_SYSENTER_CS'],
  [
    512,
    'controlRegisters',
    'CR0_GUEST_HOST_MASK',
    'CR4_GUEST_HOST_MASK',
    'CR0_READ_SHADOW',
    'CR4_READ_SHADOW',
  ],
  [544, 'controlRegisters', 'GUEST_CR0', 'GUEST_CR3', 'GUEST_CR4', 'GUEST_DR7'],
  [576, 'hostPointers', 'HOST_FS_BASE', 'HOST_GS_BASE', 'HOST_TR_BASE', 'HOST_GDTR_BASE', 'HOST_IDTR_BASE'],
  [616, 'hostPointers', 'HOST_RSP'],
  [624, 'controlTranslation', 'EPT_POINTER', 'VIRTUAL_PROCESSOR_ID'],
  [680, null, 'GUEST_PHYSICAL_ADDRESS', 'VM_INSTRUCTION_ERROR', 'VM_EXIT_REASON', 'VM_EXIT_INTR_INFO'],
  [700, null, 'VM_EXIT_INTR_ERROR_CODE', 'IDT_VECTORING_INFO_FIELD', 'IDT_VECTORING_ERROR_CODE'],
  [712, null, 'VM_EXIT_INSTRUCTION_LEN', 'VMX_INSTRUCTION_INFO', 'EXIT_QUALIFICATION'],
  [728, null, 'IO_RCX', 'IO_RSI', 'IO_RDI', 'IO_RIP', 'GUEST_LINEAR_ADDRESS'],
  [768, 'guestBasic', 'GUEST_RSP', 'GUEST_RFLAGS', 'GUEST_INTERRUPTIBILITY_INFO'],
  [788, 'controlProcessor', 'CPU_BASED_VM_EXEC_CONTROL'],
  [792, 'controlExceptions', 'EXCEPTION_BITMAP'],
  [796, 'controlEntry', 'VM_ENTRY_CONTROLS'],
  [
    800,
    'controlEvent',
    'VM_ENTRY_INTR_INFO_FIELD',
    'VM_ENTRY_EXCEPTION_ERROR_CODE',
    'VM_ENTRY_INSTRUCTION_LEN',
  ],
  [812, null, 'TPR_THRESHOLD', 'GUEST_RIP'],
  [896, 'guestGroup1', 'GUEST_BNDCFGS', 'GUEST_IA32_PERF_GLOBAL_CTRL', 'GUEST_S_CET', 'GUEST_SSP'],
  [928, 'guestGroup1', 'GUEST_INTR_SSP_TABLE', 'GUEST_IA32_LBR_CTL'],
  [960, 'controlGroup2', 'XSS_EXIT_BITMAP', 'ENCLS_EXITING_BITMAP'],
  [976, 'hostGroup1', 'HOST_IA32_PERF_GLOBAL_CTRL'],
  [984, 'controlGroup2', 'TSC_MULTIPLIER'],
  [992, 'hostGroup1', 'HOST_S_CET', 'HOST_SSP', 'HOST_INTR_SSP_TABLE'],
];

function selectors(level: 'HOST' | 'GUEST', names: readonly string[]): VmcsField[] {
  return names.map((name) => `${level}_${name}_SELECTOR` as VmcsField);
}

function segments(part: string, withTables: boolean): VmcsField[] {
  const names = ['ES', 'CS', 'SS', 'DS', 'FS', 'GS', 'LDTR', 'TR', ...(withTables ? ['GDTR', 'IDTR'] : [])];
  return names.map((name) => `GUEST_${name}_${part}` as VmcsField);
}

export interface EvmcsPlace {
  readonly offset: number;
  readonly bytes: 2 | 4 | 8;
  /** Its group of clean fields; null for what is always read, and for what VM exits write. */
  readonly group: EvmcsGroup | null;
}

function layOut(): Map<number, EvmcsPlace> {
  const places = new Map<number, EvmcsPlace>();
  for (const [first, group, ...fields] of RUNS) {
    let offset = first;
    for (const field of fields) {
      const { width } = vmcsFieldInfo(field);
      const bytes = width === 16 ? 2 : width === 32 ? 4 : 8;
      places.set(VMCS_FIELDS[field], { offset, bytes, group });
      offset += bytes;
    }
  }
  return places;
}

/** Where each VMCS field that an eVMCS has is, by encoding. */
export const EVMCS_FIELDS: ReadonlyMap<number, EvmcsPlace> = layOut();

/**
 * The table L1 looks fields up in: 1024 words, indexed by the encoding's width, type and index; offset in bits 15:0,
 * clean bits in 31:16, 0 for a field that an eVMCS lacks.
 */
export function evmcsMap(): Uint32Array {
  const map = new Uint32Array(1024);
  for (const [encoding, { offset, group }] of EVMCS_FIELDS) {
    map[evmcsMapIndex(encoding)] = (((group ? EVMCS_CLEAN[group] : 0) << 16) | offset) >>> 0;
  }
  return map;
}

/** Index bits 6:1 of the encoding, type in 7:6, width in 9:8 of the result. */
export function evmcsMapIndex(encoding: number): number {
  return (((encoding >> 13) & 3) << 8) | (((encoding >> 10) & 3) << 6) | ((encoding >> 1) & 0x3f);
}

/** An eVMCS in guest memory. Writing a field clears the clean bit of its group. */
export class Evmcs {
  readonly gpa: number;
  readonly #view: DataView;

  /** @param page its bytes */
  constructor(page: Uint8Array, gpa: number) {
    this.gpa = gpa;
    this.#view = new DataView(page.buffer, page.byteOffset, EVMCS_BYTES);
  }

  /** @throws RangeError for a field that an eVMCS does not have */
  static place(encoding: number): EvmcsPlace {
    const place = EVMCS_FIELDS.get(encoding);
    if (!place) throw new RangeError(`an enlightened VMCS has no field 0x${encoding.toString(16)}`);
    return place;
  }

  read(encoding: number): bigint {
    const { offset, bytes } = Evmcs.place(encoding);
    return this.#get(offset, bytes);
  }

  write(encoding: number, value: bigint | number): void {
    const { offset, bytes, group } = Evmcs.place(encoding);
    this.#set(offset, bytes, BigInt(value));
    if (group) this.cleanFields &= ~EVMCS_CLEAN[group];
  }

  /** `hv_clean_fields`: see {@link EVMCS_CLEAN}. */
  get cleanFields(): number {
    return Number(this.word('cleanFields'));
  }
  set cleanFields(bits: number) {
    this.setWord('cleanFields', bits >>> 0);
  }

  /** A word that no VMCS has. */
  word(name: EvmcsWord): bigint {
    return this.#get(EVMCS_WORDS[name].offset, EVMCS_WORDS[name].bytes);
  }

  setWord(name: EvmcsWord, value: bigint | number): void {
    this.#set(EVMCS_WORDS[name].offset, EVMCS_WORDS[name].bytes, BigInt(value));
  }

  /** The version number in the first word. */
  set revision(value: number) {
    this.#view.setUint32(0, value, true);
  }

  #get(offset: number, bytes: 2 | 4 | 8): bigint {
    if (bytes === 8) return this.#view.getBigUint64(offset, true);
    return BigInt(bytes === 4 ? this.#view.getUint32(offset, true) : this.#view.getUint16(offset, true));
  }

  #set(offset: number, bytes: 2 | 4 | 8, value: bigint): void {
    if (bytes === 8) this.#view.setBigUint64(offset, BigInt.asUintN(64, value), true);
    else if (bytes === 4) this.#view.setUint32(offset, Number(BigInt.asUintN(32, value)), true);
    else this.#view.setUint16(offset, Number(BigInt.asUintN(16, value)), true);
  }
}
