// SPDX-License-Identifier: Apache-2.0
const ATTRIBUTE_PRIVATE = 8n;

/** Which guest-physical memory is private: the kernel keeps it per page and has no request that tells. */
export class PrivateRanges {
  /** From, and up to; disjoint, in no order. */
  #ranges: readonly (readonly [bigint, bigint])[] = [];

  get isEmpty(): boolean {
    return this.#ranges.length === 0;
  }

  /** Takes over what KVM_SET_MEMORY_ATTRIBUTES did with this struct kvm_memory_attributes. */
  set(attributes: Uint8Array): void {
    const view = new DataView(attributes.buffer, attributes.byteOffset);
    const from = view.getBigUint64(0, true);
    const to = from + view.getBigUint64(8, true);
    const outside = this.#ranges.flatMap(([start, end]): [bigint, bigint][] => [
      [start, end < from ? end : from],
      [start > to ? start : to, end],
    ]);
    const isPrivate = (view.getBigUint64(16, true) & ATTRIBUTE_PRIVATE) !== 0n;
    if (isPrivate) outside.push([from, to]);
    this.#ranges = outside.filter(([start, end]) => start < end);
  }
}
