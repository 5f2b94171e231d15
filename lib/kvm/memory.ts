// SPDX-License-Identifier: Apache-2.0
import { type Backing, withBacking } from './backing.ts';
import { checkBytes, checkInteger, checkObject } from './check.ts';
import { native, type VmCalls, type VmHandle } from './loader.ts';
import { encodeFlags, MemoryRegion, type RegionFlags } from './region.ts';

export interface MemoryOptions extends RegionFlags {
  /** Guest-physical address, page aligned. */
  gpa: number;
  /** Bytes, a multiple of 4096 (hugetlb: of the huge page). */
  size: number;
  /** Default 'anonymous'. */
  backing?: Backing;
  /** Default: the lowest free number. */
  slot?: number;
}

/** The memslots of a VM. */
export class VmMemory {
  readonly #calls: VmCalls;
  /** By slot. */
  readonly #regions = new Map<number, MemoryRegion>();
  readonly #forget = (slot: number) => this.#regions.delete(slot);

  /** @internal */
  constructor(vm: VmHandle) {
    this.#calls = native().vmCalls(vm);
  }

  get regions(): readonly MemoryRegion[] {
    return [...this.#regions.values()];
  }

  /**
   * Maps memory and gives it to the guest: fresh and zeroed, unless it is a file's.
   * @throws RangeError for an address or a size that is not page aligned, a size of 0, a slot in use.
   * @throws KvmError what the kernel refuses: EEXIST for an overlap, EINVAL for a slot beyond its limit.
   */
  add(options: MemoryOptions): MemoryRegion {
    checkObject('options', options);
    const backing = options.backing ?? 'anonymous';
    const gpa = checkInteger('gpa', options.gpa, 0);
    const size = checkInteger('size', options.size, 0);
    const slot = options.slot === undefined ? -1 : checkInteger('slot', options.slot, 0, 0xffffffff);
    const flags = encodeFlags(options);
    const calls = this.#calls;
    // Plain memory without a closure: it is what slots are added and deleted with by the thousand.
    const at =
      backing === 'anonymous'
        ? calls.addMemory(slot, gpa, size, flags)
        : withBacking(backing, (request) => calls.addMemory(slot, gpa, size, flags, request));
    const region = new MemoryRegion(calls, at, { gpa, size, flags, backing }, this.#forget);
    this.#regions.set(at, region);
    return region;
  }

  /** The region a guest-physical address lies in. */
  regionAt(gpa: number): MemoryRegion | undefined {
    checkInteger('gpa', gpa, 0);
    for (const region of this.#regions.values())
      if (gpa >= region.gpa && gpa < region.gpa + region.size) return region;
    return undefined;
  }

  /** A copy of guest memory; the range may span adjacent regions. @throws RangeError where no slot is. */
  read(gpa: number, length: number): Uint8Array {
    checkInteger('gpa', gpa, 0);
    const copy = new Uint8Array(checkInteger('length', length, 0));
    this.#walk(gpa, length, (part, done) => {
      copy.set(part, done);
    });
    return copy;
  }

  /** Writes guest memory, read-only slots included; the range may span adjacent regions. */
  write(gpa: number, bytes: Uint8Array): void {
    checkInteger('gpa', gpa, 0);
    checkBytes('bytes', bytes);
    // Nothing is written unless all of it can be.
    this.#walk(gpa, bytes.length, () => {});
    this.#walk(gpa, bytes.length, (part, done) => {
      part.set(bytes.subarray(done, done + part.length));
    });
  }

  #walk(gpa: number, length: number, visit: (part: Uint8Array, done: number) => void): void {
    for (let done = 0; done < length; ) {
      const at = gpa + done;
      const region = this.regionAt(at);
      if (!region) throw new RangeError(`no memory region at guest address 0x${at.toString(16)}`);
      const offset = at - region.gpa;
      const size = Math.min(length - done, region.size - offset);
      visit(region.bytes(offset, size), done);
      done += size;
    }
  }

  /** @internal The VM is closed. */
  retire(): void {
    for (const region of this.#regions.values()) region.retire();
    this.#regions.clear();
  }
}
