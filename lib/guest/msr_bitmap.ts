// SPDX-License-Identifier: Apache-2.0
import type { MemoryAt } from './apic_pages.ts';

const HIGH_MSRS = 0xc000_0000;
const MSRS = 0x2000;
const PAGE_SIZE = 4096;
/** Byte offsets of the four bitmaps, SDM vol. 3, 25.6.9. */
const OFFSETS = { read: { low: 0, high: 0x400 }, write: { low: 0x800, high: 0xc00 } } as const;

/** The page that says which MSR accesses of L2 exit to L1. MSRs in neither range always exit. */
export class MsrBitmap {
  readonly gpa: number;
  readonly #memory: MemoryAt;

  constructor(memory: MemoryAt, gpa: number) {
    this.gpa = gpa;
    this.#memory = memory;
  }

  /** Makes RDMSR of this MSR exit, or not. @throws RangeError for an MSR that no bitmap covers */
  interceptRead(index: number, on = true): void {
    this.#set('read', index, on);
  }

  /** Makes WRMSR of this MSR exit, or not. @throws RangeError for an MSR that no bitmap covers */
  interceptWrite(index: number, on = true): void {
    this.#set('write', index, on);
  }

  #set(access: 'read' | 'write', index: number, on: boolean): void {
    const isHigh = index >= HIGH_MSRS;
    const bit = isHigh ? index - HIGH_MSRS : index;
    if (!Number.isSafeInteger(bit) || bit < 0 || bit >= MSRS) {
      throw new RangeError(
        `MSR 0x${index.toString(16)} is in neither range of the MSR bitmap: it always exits`,
      );
    }
    const at = OFFSETS[access][isHigh ? 'high' : 'low'] + (bit >> 3);
    const mask = 1 << (bit & 7);
    const bytes = this.#memory(this.gpa, PAGE_SIZE);
    bytes[at] = on ? bytes[at]! | mask : bytes[at]! & ~mask;
  }
}
