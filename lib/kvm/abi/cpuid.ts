// SPDX-License-Identifier: Apache-2.0
import { checkInteger, checkObject } from '../check.ts';

/** struct kvm_cpuid_entry2. `flags` bit 0: `index` (ECX) matters for this leaf. */
export interface CpuidEntry {
  function: number;
  index: number;
  flags: number;
  eax: number;
  ebx: number;
  ecx: number;
  edx: number;
}

const FIELDS = ['function', 'index', 'flags', 'eax', 'ebx', 'ecx', 'edx'] as const;
const ENTRY_SIZE = 40;
const HEADER_SIZE = 8;

/** A struct kvm_cpuid2 with room for `count` entries. */
export function cpuidBuffer(count: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(HEADER_SIZE + count * ENTRY_SIZE);
  new DataView(bytes.buffer).setUint32(0, count, true);
  return bytes;
}

export function encodeCpuid(entries: readonly CpuidEntry[]): Uint8Array {
  const bytes = cpuidBuffer(entries.length);
  const view = new DataView(bytes.buffer);
  for (const [index, entry] of entries.entries()) {
    checkObject(`cpuid entry ${index}`, entry);
    for (const [word, field] of FIELDS.entries()) {
      const value = checkInteger(`cpuid entry ${index}.${field}`, entry[field], 0, 0xffffffff);
      view.setUint32(HEADER_SIZE + index * ENTRY_SIZE + word * 4, value, true);
    }
  }
  return bytes;
}

export function decodeCpuid(bytes: Uint8Array<ArrayBuffer>): CpuidEntry[] {
  const view = new DataView(bytes.buffer);
  return Array.from({ length: view.getUint32(0, true) }, (_, index) => {
    const entry = {} as CpuidEntry;
    for (const [word, field] of FIELDS.entries()) {
      entry[field] = view.getUint32(HEADER_SIZE + index * ENTRY_SIZE + word * 4, true);
    }
    return entry;
  });
}
