// SPDX-License-Identifier: Apache-2.0

const ENTRY_BYTES = 16;
const CAPACITY = 4096 / ENTRY_BYTES;

/** A page of MSR entries that VM entry loads, or VM exit stores or loads (SDM vol. 3, 25.7.2 and 25.8.2). */
export class MsrList {
  readonly gpa: number;
  readonly #view: DataView;
  #length = 0;

  constructor(memory: ArrayBuffer, gpa: number, entries: Iterable<readonly [index: number, value: bigint]>) {
    this.gpa = gpa;
    this.#view = new DataView(memory, gpa, CAPACITY * ENTRY_BYTES);
    for (const [index, value] of entries) this.#append(index, value);
  }

  /** Entries, for the count field of the VMCS. */
  get length(): number {
    return this.#length;
  }

  /** What is in the list. */
  *entries(): IterableIterator<readonly [index: number, value: bigint]> {
    for (let at = 0; at < this.#length * ENTRY_BYTES; at += ENTRY_BYTES) {
      yield [this.#view.getUint32(at, true), this.#view.getBigUint64(at + 8, true)];
    }
  }

  #append(index: number, value: bigint): void {
    if (this.#length === CAPACITY) throw new RangeError(`a list holds at most ${CAPACITY} MSRs`);
    this.#view.setUint32(this.#length * ENTRY_BYTES, index, true);
    this.#length += 1;
    this.set(index, value);
  }

  #at(index: number): number {
    for (let i = 0; i < this.#length; i += 1) {
      if (this.#view.getUint32(i * ENTRY_BYTES, true) === index) return i * ENTRY_BYTES;
    }
    throw new RangeError(`MSR 0x${index.toString(16)} is not in the list`);
  }

  /** The value of an MSR in the list: what will be loaded, or what was stored last. */
  get(index: number): bigint {
    return this.#view.getBigUint64(this.#at(index) + 8, true);
  }

  set(index: number, value: bigint): void {
    this.#view.setBigUint64(this.#at(index) + 8, value, true);
  }
}
