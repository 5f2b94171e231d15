// SPDX-License-Identifier: Apache-2.0
import { type Backing, type BackingType, backingType, withBacking } from './backing.ts';
import { checkBytes, checkFlag, checkInteger, checkName, checkObject } from './check.ts';
import { KvmClosedError } from './errors.ts';
import { native, type RegionHandle, type VmCalls } from './loader.ts';
import { Userfault } from './userfault.ts';

const PAGE_SIZE = 4096;
const MAX_ARRAY_BUFFER = 2 ** 32;
const FLAG_LOG_DIRTY_PAGES = 1;
const FLAG_READONLY = 2;
/** In the addon's order. */
const ADVICE = {
  unmap: 0,
  pageout: 1,
  populateRead: 2,
  populateWrite: 3,
  hugePages: 4,
  noHugePages: 5,
} as const;
const PROTECTIONS = ['none', 'read', 'read-write'] as const;
const PROTECTION_BITS = [0, 1, 3] as const;

/** An ArrayBuffer over a part of the memory that somebody may still have. */
interface Window {
  readonly weak: WeakRef<ArrayBuffer>;
  readonly offset: number;
  readonly length: number;
}
const NONE: readonly Window[] = [];

export type Protection = (typeof PROTECTIONS)[number];

export interface RegionFlags {
  /** Guest writes exit as MMIO (KVM_MEM_READONLY); the host can still write. */
  readOnly?: boolean;
  /** The kernel records which pages the guest writes (KVM_MEM_LOG_DIRTY_PAGES). */
  logDirtyPages?: boolean;
}

export function encodeFlags(flags: RegionFlags): number {
  checkObject('flags', flags);
  return (
    (checkFlag('logDirtyPages', flags.logDirtyPages) ? FLAG_LOG_DIRTY_PAGES : 0) |
    (checkFlag('readOnly', flags.readOnly) ? FLAG_READONLY : 0)
  );
}

/**
 * One memslot (KVM_SET_USER_MEMORY_REGION2, or the older request where the kernel has no other) and the host memory
 * behind it. Made by `VmMemory.add`. Offsets and lengths are in bytes and whole pages.
 */
export class MemoryRegion {
  readonly slot: number;
  /** Bytes. */
  readonly size: number;
  readonly #calls: VmCalls;
  readonly #forget: (slot: number) => void;
  /** Made when it is needed first: it costs as much as a memslot's own objects. */
  #handle: RegionHandle | undefined;
  #backing: Backing;
  #gpa: number;
  #flags: number;
  #whole: ArrayBuffer | undefined;
  #windows: readonly Window[] = NONE;
  #userfault: Userfault | undefined;
  #closed = false;

  /** @internal */
  constructor(
    calls: VmCalls,
    slot: number,
    options: { gpa: number; size: number; flags: number; backing: Backing },
    forget: (slot: number) => void,
  ) {
    this.#calls = calls;
    this.#forget = forget;
    this.#gpa = options.gpa;
    this.#flags = options.flags;
    this.#backing = options.backing;
    this.size = options.size;
    this.slot = slot;
  }

  /** @internal */
  get handle(): RegionHandle {
    this.#requireOpen();
    this.#handle ??= this.#calls.region(this.slot);
    return this.#handle;
  }

  /** @internal The slot was moved behind this object's back. */
  movedTo(gpa: number): void {
    this.#gpa = gpa;
  }

  /** Where the guest sees it now. */
  get gpa(): number {
    return this.#gpa;
  }

  /** Host-virtual address of the first byte; {@link swap} changes it. */
  get hva(): bigint {
    this.#requireOpen();
    return native().regionHva(this.handle);
  }

  get backing(): BackingType {
    return backingType(this.#backing);
  }

  /** As given to `add` or {@link swap}. */
  get backingSpec(): Backing {
    return this.#backing;
  }

  get readOnly(): boolean {
    return (this.#flags & FLAG_READONLY) !== 0;
  }

  get logDirtyPages(): boolean {
    return (this.#flags & FLAG_LOG_DIRTY_PAGES) !== 0;
  }

  get closed(): boolean {
    return this.#closed;
  }

  /**
   * The whole memory, shared with the guest. Detached (length 0) after delete(), swap() or close(), and when a part
   * is protected or watched for faults.
   * @throws RangeError above 4 GiB, where Node aborts: use {@link window}.
   */
  get buffer(): ArrayBuffer {
    this.#whole ??= this.window(0, this.size);
    return this.#whole;
  }

  /**
   * A part of the memory as its own ArrayBuffer; offset and length in bytes, at most 4 GiB.
   * @throws RangeError for a range that this process must not touch now: see {@link protect}, {@link watchFaults}.
   */
  window(offset: number, length: number): ArrayBuffer {
    this.#requireOpen();
    checkInteger('offset', offset, 0, this.size);
    checkInteger('length', length, 0, this.size - offset);
    const buffer = native().regionWindow(this.handle, offset, length);
    const live = this.#windows.filter(({ weak }) => weak.deref() !== undefined);
    this.#windows = [...live, { weak: new WeakRef(buffer), offset, length }];
    return buffer;
  }

  /** A Uint8Array over [offset, offset + length) of the memory itself, whatever the size of the region. */
  bytes(offset = 0, length?: number): Uint8Array {
    checkInteger('offset', offset, 0, this.size);
    const size = checkInteger('length', length ?? this.size - offset, 0, this.size - offset);
    if (this.#whole || (offset === 0 && size === this.size && size <= MAX_ARRAY_BUFFER)) {
      return new Uint8Array(this.buffer, offset, size);
    }
    return new Uint8Array(this.window(offset, size));
  }

  /**
   * Drops the pages: the guest and the host see zeroes at the next access, and KVM's mappings are invalidated.
   * anonymous, hugetlb: madvise(MADV_DONTNEED). memfd: MADV_REMOVE, which punches a hole; MADV_DONTNEED alone would
   * bring the old contents back (see {@link unmapPages}). guest-memfd: fallocate(FALLOC_FL_PUNCH_HOLE), and where this
   * process does not map it MADV_DONTNEED of the shared pages too, unless `part` is 'private'. A file of yours keeps its
   * contents: only the mapping is dropped.
   * @throws RangeError for the private pages of another backing than guest-memfd.
   */
  discard(offset = 0, length?: number, part: 'all' | 'private' = 'all'): void {
    const onlyPrivate = checkName('part', part, ['all', 'private']) === 1;
    if (onlyPrivate && this.backing !== 'guest-memfd')
      throw new RangeError(`only a guest-memfd has private pages, this region's backing is ${this.backing}`);
    native().regionDiscard(...this.#range(offset, length), onlyPrivate);
  }

  /**
   * madvise(MADV_DONTNEED) whatever the backing: KVM's mappings are invalidated, a memfd keeps its contents, a
   * guest-memfd its private pages.
   */
  unmapPages(offset = 0, length?: number): void {
    this.#advise(ADVICE.unmap, offset, length);
  }

  /** madvise(MADV_PAGEOUT): pages go to swap or back to their file, contents stay. Without swap, nothing happens. */
  pageout(offset = 0, length?: number): void {
    this.#advise(ADVICE.pageout, offset, length);
  }

  /** madvise(MADV_POPULATE_WRITE), or _READ: pages are there before anybody touches them. */
  populate(offset = 0, length?: number, access: 'write' | 'read' = 'write'): void {
    const write = checkName('access', access, ['read', 'write']) === 1;
    this.#advise(write ? ADVICE.populateWrite : ADVICE.populateRead, offset, length);
  }

  /** madvise(MADV_HUGEPAGE or MADV_NOHUGEPAGE). */
  setHugePages(on: boolean, offset = 0, length?: number): void {
    this.#advise(checkFlag('on', on) ? ADVICE.hugePages : ADVICE.noHugePages, offset, length);
  }

  /**
   * mprotect of the host's mapping: the guest's accesses then fail as they would for any process (KVM_RUN gives
   * EFAULT, a `memory-fault` exit where the kernel tells). Until the range is 'read-write' again this process has no
   * view of it: buffers over it are detached and window() throws, because touching it would kill the process.
   */
  protect(protection: Protection, offset = 0, length?: number): void {
    const bits = PROTECTION_BITS[checkName('protection', protection, PROTECTIONS)]!;
    const range = this.#range(offset, length);
    if (bits !== 3) this.#detach(range[1], range[2]);
    native().regionProtect(...range, bits);
  }

  /**
   * move_pages(MPOL_MF_MOVE): moves pages to a NUMA node; the kernel invalidates KVM's mappings of those that move.
   * @returns per page the node it is on now, or a negative errno (-ENOENT: not populated).
   */
  migrate(node: number, offset = 0, length?: number): Int32Array {
    const range = this.#range(offset, length);
    native().regionMigrate(...range, checkInteger('node', node, 0, 1023));
    // Of pages that it could not move the request says nothing
    return native().regionMigrate(...range, -1);
  }

  /** move_pages without moving: per page the NUMA node it is on, or a negative errno (-ENOENT: not populated). */
  nodes(offset = 0, length?: number): Int32Array {
    return native().regionMigrate(...this.#range(offset, length), -1);
  }

  /** One request with a new guest address. The kernel answers an overlap with EEXIST. Not for guest-memfd (EINVAL). */
  move(gpa: number): void {
    this.#requireOpen();
    native().regionUpdate(this.handle, checkInteger('gpa', gpa, 0), this.#flags);
    this.#gpa = gpa;
  }

  /**
   * Other host memory at the same guest address and slot number: zeroes, or with `copy` the same contents. Buffers are
   * detached. The kernel has no such request, so the slot is deleted and made again in one native call; a vCPU that
   * comes between sees an MMIO exit. Private pages are not copied. When the kernel refuses the new memory the old one is put back.
   */
  swap(options: { backing?: Backing; copy?: boolean } = {}): void {
    this.#requireOpen();
    checkObject('options', options);
    const backing = options.backing ?? this.#backing;
    const copy = checkFlag('copy', options.copy);
    withBacking(backing, (request) => {
      this.#userfault?.close();
      this.#detach(0, this.size);
      native().regionSwap(this.handle, request, copy);
    });
    this.#backing = backing;
  }

  /** Flags not given stay. The kernel refuses to change `readOnly` of an existing slot (EINVAL). */
  setFlags(flags: RegionFlags): void {
    this.#requireOpen();
    checkObject('flags', flags);
    const merged = encodeFlags({ readOnly: this.readOnly, logDirtyPages: this.logDirtyPages, ...flags });
    native().regionUpdate(this.handle, this.#gpa, merged);
    this.#flags = merged;
  }

  /**
   * KVM_GET_DIRTY_LOG: bit n of the little-endian bitmap is page n. Also clears it, unless the VM has
   * {@link Vm.enableManualDirtyLog} on.
   */
  dirtyLog(): Uint8Array {
    this.#requireOpen();
    return native().regionDirtyLog(this.handle);
  }

  /** The dirty log as page numbers within the region, ascending. */
  dirtyPages(): number[] {
    const bitmap = this.dirtyLog();
    const pages: number[] = [];
    for (let page = 0; page < this.size / PAGE_SIZE; page++) {
      if ((bitmap[page >> 3]! >> (page & 7)) & 1) pages.push(page);
    }
    return pages;
  }

  /**
   * KVM_CLEAR_DIRTY_LOG: forgets the pages whose bit is set and write-protects them again. `firstPage` must be a
   * multiple of 64, and `pages` too unless they reach the region's end.
   */
  clearDirtyLog(bitmap: Uint8Array, firstPage = 0, pages?: number): void {
    this.#requireOpen();
    const all = this.size / PAGE_SIZE;
    checkInteger('firstPage', firstPage, 0, all);
    const count = checkInteger('pages', pages ?? all - firstPage, 0, all - firstPage);
    native().regionClearDirtyLog(this.handle, firstPage, count, checkBytes('bitmap', bitmap));
  }

  /**
   * userfaultfd: who touches a page of the range that is not there waits until the returned object answers. `minor`
   * (memfd): pages that are in the file and not mapped. While it is open this process has no view of the range.
   * @throws KvmError EPERM without CAP_SYS_PTRACE; RangeError when the region has one already.
   */
  watchFaults(options: { mode?: 'missing' | 'minor'; offset?: number; length?: number } = {}): Userfault {
    checkObject('options', options);
    const minor = checkName('mode', options.mode ?? 'missing', ['missing', 'minor']) === 1;
    const range = this.#range(options.offset ?? 0, options.length);
    this.#detach(range[1], range[2]);
    const userfault = new Userfault(
      (onReady) => native().regionWatchFaults(...range, minor, onReady),
      (closed) => {
        if (this.#userfault === closed) this.#userfault = undefined;
      },
    );
    this.#userfault = userfault;
    return userfault;
  }

  /** Deletes the slot and gives the memory back; the buffers are detached. Idempotent. */
  delete(): void {
    if (this.#closed) return;
    this.#userfault?.close();
    this.#calls.removeMemory(this.slot);
    this.#forget(this.slot);
    this.retire();
  }

  /** @internal The slot is gone. */
  retire(): void {
    this.#closed = true;
    this.#userfault?.close();
    this.#detach(0, this.size);
  }

  /** @internal The contents of `source`, which must be as large; this memory must be fresh. */
  copyFrom(source: MemoryRegion): void {
    native().regionCopyFrom(this.handle, source.handle, true);
  }

  /** @internal The contents of `source`, which must be as large; pages that are the same already are not written. */
  overwriteFrom(source: MemoryRegion): void {
    native().regionCopyFrom(this.handle, source.handle, false);
  }

  #advise(advice: number, offset: number, length: number | undefined): void {
    native().regionAdvise(...this.#range(offset, length), advice);
  }

  #range(offset: number, length: number | undefined): [RegionHandle, number, number] {
    this.#requireOpen();
    checkInteger('offset', offset, 0, this.size);
    return [this.handle, offset, checkInteger('length', length ?? this.size - offset, 0, this.size - offset)];
  }

  #detach(offset: number, length: number): void {
    if (this.#windows.length === 0) return;
    this.#windows = this.#windows.filter((window) => {
      if (window.offset >= offset + length || window.offset + window.length <= offset) return true;
      const buffer = window.weak.deref();
      if (buffer) native().detach(buffer);
      return false;
    });
    if (this.#whole?.byteLength === 0) this.#whole = undefined;
  }

  #requireOpen(): void {
    if (this.#closed) throw new KvmClosedError('MemoryRegion');
  }
}
