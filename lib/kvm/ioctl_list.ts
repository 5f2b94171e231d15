// SPDX-License-Identifier: Apache-2.0
import { native } from './loader.ts';

/** Where a structure is in a list's buffer. */
export interface Part {
  readonly at: number;
  readonly size: number;
}

const WORDS = 3;
/** Structures begin at multiples of a cache line. */
const align = (at: number) => (at + 63) & ~63;

/**
 * vCPU requests that the addon makes one after the other in one call, each on its part of one buffer: what is copied to
 * and fro by the dozen need not cross to native code by the dozen.
 */
export class IoctlList {
  #words = new Uint32Array(32 * WORDS);
  #length = 0;
  #bytes = 0;

  /** Requests so far. */
  get length(): number {
    return this.#length;
  }

  /** Bytes that the buffer needs. */
  get bytes(): number {
    return this.#bytes;
  }

  /** For the addon: row, offset and size of each request, and room for more. */
  get words(): Uint32Array {
    return this.#words;
  }

  /** @param size bytes of the structure; 4 for the answer of a request without one. */
  add(request: string, size: number): Part {
    const word = this.#length * WORDS;
    if (word === this.#words.length) {
      const longer = new Uint32Array(2 * word);
      longer.set(this.#words);
      this.#words = longer;
    }
    const at = this.#bytes;
    this.#words[word] = native().ioctls.vcpu[request]!;
    this.#words[word + 1] = at;
    this.#words[word + 2] = size;
    this.#length++;
    this.#bytes = align(at + size);
    return { at, size };
  }

  clear(): void {
    this.#length = 0;
    this.#bytes = 0;
  }
}
