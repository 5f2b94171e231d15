// SPDX-License-Identifier: Apache-2.0
import { abi } from './abi.ts';

export const PAGE_SIZE = 4096;
/** What L1's page tables, L2's page tables and the EPT map. */
export const MAPPED_BYTES = 4 * 1024 ** 3;
/** The images are below, everything else is allocated from here on. */
const HEAP = abi.L2_BASE + 0x10_0000;

/** Hands out whole pages of L1's memory; nothing is ever given back. */
export class PageAllocator {
  readonly #limit: number;
  #next = HEAP;

  /** @internal Goes on where another stands. */
  adopt(other: PageAllocator): void {
    this.#next = other.#next;
  }

  get limit(): number {
    return this.#limit;
  }

  constructor(limit: number) {
    if (!Number.isSafeInteger(limit) || limit < HEAP + 64 * PAGE_SIZE || limit % PAGE_SIZE !== 0) {
      throw new RangeError(
        `L1's memory must be whole pages and at least ${HEAP + 64 * PAGE_SIZE} bytes, not ${limit}`,
      );
    }
    this.#limit = limit;
  }

  /** @throws RangeError when L1's memory is used up */
  allocate(pages = 1): number {
    const gpa = this.#next;
    if (!Number.isSafeInteger(pages) || pages < 1 || gpa + pages * PAGE_SIZE > this.#limit) {
      throw new RangeError(`L1 has no ${pages} free pages left: boot it with a larger "memory"`);
    }
    this.#next = gpa + pages * PAGE_SIZE;
    return gpa;
  }
}
