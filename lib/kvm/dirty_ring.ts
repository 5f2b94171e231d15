// SPDX-License-Identifier: Apache-2.0
import { native, type VcpuHandle } from './loader.ts';

/** A page the guest wrote, from a dirty ring. */
export interface DirtyPage {
  slot: number;
  /** Number of the page within the slot. */
  page: number;
}

const ENTRIES = 1024;

/** Takes entries from a vCPU's dirty ring, with one buffer for all calls. */
export class DirtyRingReader {
  readonly #words = new BigUint64Array(ENTRIES * 2);

  read(vcpu: VcpuHandle): DirtyPage[] {
    const pages: DirtyPage[] = [];
    for (;;) {
      const count = native().vcpuHarvest(vcpu, this.#words);
      for (let i = 0; i < count; i++) {
        pages.push({ slot: Number(this.#words[i * 2]), page: Number(this.#words[i * 2 + 1]) });
      }
      if (count < ENTRIES) return pages;
    }
  }
}
