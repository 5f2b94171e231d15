// SPDX-License-Identifier: Apache-2.0
import { checkField, checkObject } from '../check.ts';

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

const ENTRY_SIZE = 40;
const ENTRY_WORDS = ENTRY_SIZE / 4;
const HEADER_SIZE = 8;

/** A struct kvm_cpuid2 with room for `count` entries. */
export function cpuidBuffer(count: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(HEADER_SIZE + count * ENTRY_SIZE);
  new DataView(bytes.buffer).setUint32(0, count, true);
  return bytes;
}

function word(index: number, field: keyof CpuidEntry, value: number): number {
  return checkField('cpuid entry', field, value, 0xffff_ffff, index);
}

export function encodeCpuid(entries: readonly CpuidEntry[]): Uint8Array {
  const bytes = cpuidBuffer(entries.length);
  const words = new Uint32Array(bytes.buffer, HEADER_SIZE);
  for (const [index, entry] of entries.entries()) {
    checkObject(`cpuid entry ${index}`, entry);
    const at = index * ENTRY_WORDS;
    words[at] = word(index, 'function', entry.function);
    words[at + 1] = word(index, 'index', entry.index);
    words[at + 2] = word(index, 'flags', entry.flags);
    words[at + 3] = word(index, 'eax', entry.eax);
    words[at + 4] = word(index, 'ebx', entry.ebx);
    words[at + 5] = word(index, 'ecx', entry.ecx);
    words[at + 6] = word(index, 'edx', entry.edx);
  }
  return bytes;
}

export function decodeCpuid(bytes: Uint8Array<ArrayBuffer>): CpuidEntry[] {
  const count = new DataView(bytes.buffer).getUint32(0, true);
  const words = new Uint32Array(bytes.buffer, HEADER_SIZE, count * ENTRY_WORDS);
  return Array.from({ length: count }, (_, index) => {
    const at = index * ENTRY_WORDS;
    return {
      function: words[at]!,
      index: words[at + 1]!,
      flags: words[at + 2]!,
      eax: words[at + 3]!,
      ebx: words[at + 4]!,
      ecx: words[at + 5]!,
      edx: words[at + 6]!,
    };
  });
}
