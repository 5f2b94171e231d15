// SPDX-License-Identifier: Apache-2.0
// The pages an L2's virtual interrupts live in. KVM and the CPU change them while the host looks.

/** Guest memory at an address, looked up at each use: the memslot under it may change. */
export type MemoryAt = (gpa: number, length: number) => Uint8Array;

const VECTORS = 256;
const DESCRIPTOR_BYTES = 64;
const CONTROL_WORD = 8;
const ON = 1;
const SN = 2;
const NV_SHIFT = 16;

function checkVector(vector: number): number {
  if (!Number.isSafeInteger(vector) || vector < 0 || vector >= VECTORS) {
    throw new RangeError(`a vector is between 0 and 255, not ${vector}`);
  }
  return vector;
}

/** The values of EOI_EXIT_BITMAP0 to 3 that make EOIs of these vectors exit. */
export function eoiExitBitmap(vectors: Iterable<number>): [bigint, bigint, bigint, bigint] {
  const words: [bigint, bigint, bigint, bigint] = [0n, 0n, 0n, 0n];
  for (const vector of vectors) words[checkVector(vector) >> 6]! |= 1n << BigInt(vector & 63);
  return words;
}

/** A posted-interrupt descriptor: 64 bytes, SDM vol. 3, 30.6. Changes are atomic, as the CPU's are. */
export class PostedInterruptDescriptor {
  readonly gpa: number;
  readonly #memory: MemoryAt;

  /** @throws RangeError unless the address is a multiple of 64 */
  constructor(memory: MemoryAt, gpa: number) {
    if (!Number.isSafeInteger(gpa) || gpa < 0 || gpa % DESCRIPTOR_BYTES !== 0) {
      throw new RangeError(`a posted-interrupt descriptor is at a multiple of 64, not at ${gpa}`);
    }
    this.gpa = gpa;
    this.#memory = memory;
  }

  get #words(): Uint32Array {
    const { buffer, byteOffset } = this.#memory(this.gpa, DESCRIPTOR_BYTES);
    return new Uint32Array(buffer, byteOffset, DESCRIPTOR_BYTES / 4);
  }

  #assign(word: number, mask: number, value: number): void {
    Atomics.and(this.#words, word, ~mask);
    Atomics.or(this.#words, word, value);
  }

  /** Sets the vector's PIR bit, then ON. The notification is the caller's: L1.signal(). */
  post(vector: number): void {
    this.request(vector);
    this.outstanding = true;
  }

  /** Sets (or clears) the vector's PIR bit alone. */
  request(vector: number, on = true): void {
    const bit = 1 << (checkVector(vector) & 31);
    this.#assign(vector >> 5, bit, on ? bit : 0);
  }

  /** Vectors whose PIR bit is set. */
  get pending(): number[] {
    return setBits(this.#words.subarray(0, 8));
  }

  /** ON: a notification is outstanding. */
  get outstanding(): boolean {
    return (this.#words[CONTROL_WORD]! & ON) !== 0;
  }
  set outstanding(on: boolean) {
    this.#assign(CONTROL_WORD, ON, on ? ON : 0);
  }

  /** SN: notifications are suppressed. */
  get suppressed(): boolean {
    return (this.#words[CONTROL_WORD]! & SN) !== 0;
  }
  set suppressed(on: boolean) {
    this.#assign(CONTROL_WORD, SN, on ? SN : 0);
  }

  /** NV, as an IOMMU reads it; KVM goes by the VMCS field POSTED_INTR_NV. */
  get notificationVector(): number {
    return (this.#words[CONTROL_WORD]! >>> NV_SHIFT) & 0xff;
  }
  set notificationVector(vector: number) {
    this.#assign(CONTROL_WORD, 0xff << NV_SHIFT, checkVector(vector) << NV_SHIFT);
  }

  /** NDST: the APIC id that is notified. */
  get destination(): number {
    return this.#words[CONTROL_WORD + 1]!;
  }
  set destination(apicId: number) {
    Atomics.store(this.#words, CONTROL_WORD + 1, apicId);
  }
}

/** A virtual-APIC page: the registers of a local APIC at their offsets (SDM vol. 3, 30.1). */
export class VirtualApicPage {
  readonly gpa: number;
  readonly #memory: MemoryAt;

  constructor(memory: MemoryAt, gpa: number) {
    this.gpa = gpa;
    this.#memory = memory;
  }

  get #view(): DataView {
    const { buffer, byteOffset, byteLength } = this.#memory(this.gpa, 4096);
    return new DataView(buffer, byteOffset, byteLength);
  }

  read32(offset: number): number {
    return this.#view.getUint32(offset, true);
  }

  write32(offset: number, value: number): void {
    this.#view.setUint32(offset, value, true);
  }

  /** VTPR: all 8 bits; CR8 is its upper half. */
  get tpr(): number {
    return this.read32(0x80) & 0xff;
  }
  set tpr(value: number) {
    this.write32(0x80, value);
  }

  /** VPPR. */
  get ppr(): number {
    return this.read32(0xa0) & 0xff;
  }

  /** Vectors requested (VIRR). */
  get requested(): number[] {
    return this.#vectors(0x200);
  }

  /** Vectors in service (VISR). */
  get inService(): number[] {
    return this.#vectors(0x100);
  }

  /** Sets or clears a vector's VIRR bit; delivery also needs RVI in GUEST_INTR_STATUS. */
  request(vector: number, on = true): void {
    const offset = 0x200 + (checkVector(vector) >> 5) * 16;
    const bit = 1 << (vector & 31);
    const old = this.read32(offset);
    this.write32(offset, (on ? old | bit : old & ~bit) >>> 0);
  }

  #vectors(offset: number): number[] {
    return setBits(Array.from({ length: 8 }, (_, i) => this.read32(offset + 16 * i)));
  }
}

function setBits(words: ArrayLike<number>): number[] {
  const bits: number[] = [];
  for (let bit = 0; bit < 32 * words.length; bit += 1) {
    if ((words[bit >> 5]! >>> (bit & 31)) & 1) bits.push(bit);
  }
  return bits;
}
