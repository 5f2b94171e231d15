// SPDX-License-Identifier: Apache-2.0
// A page of L1's that L0 uses to run L2, in a memslot of its own, and what the host can do to it.
import { closeSync, openSync, readFileSync, readSync } from 'node:fs';
import type { Backing, MemoryRegion, Vm } from '../../kvm/index.ts';
import type { Requirement } from '../engine/model.ts';

/** Far from L1's memory. */
export const PAGE_GPA = 0xc000_0000;
export const PAGE_SIZE = 4096;
const MOVE_STEP = 0x1_0000;

export class GuestPage {
  readonly gpa: number;
  readonly #vm: Vm;
  #region: MemoryRegion | undefined;
  /** What each pageout() did: the page went, or it stayed. */
  readonly pageouts: ('out' | 'in')[] = [];
  /** What each migrate() did. */
  readonly migrations: ('moved' | 'stayed')[] = [];

  constructor(vm: Vm, gpa = PAGE_GPA, backing: Backing = 'anonymous') {
    this.#vm = vm;
    this.gpa = gpa;
    this.add(backing);
  }

  get isBacked(): boolean {
    return this.#region !== undefined;
  }

  get region(): MemoryRegion {
    if (!this.#region) throw new Error('the page has no memslot');
    return this.#region;
  }

  /** Its bytes, wherever the slot is; the next change of the slot may detach them. */
  get view(): DataView {
    return new DataView(this.region.buffer);
  }

  /** Its bytes, as the structures of lib/guest want them. */
  readonly at = (gpa: number, length: number): Uint8Array => this.region.bytes(gpa - this.gpa, length);

  /** A memslot again, of zeroes. */
  add(backing: Backing = 'anonymous'): void {
    this.#region = this.#vm.memory.add({ gpa: this.gpa, size: PAGE_SIZE, backing });
  }

  delete(): void {
    this.#region?.delete();
    this.#region = undefined;
  }

  /** Another slot with other memory, at the same address. */
  replace(): void {
    this.delete();
    this.add();
  }

  /** The slot goes elsewhere with its memory. */
  moveAway(): void {
    this.region.move(this.gpa + MOVE_STEP);
  }

  moveBack(): void {
    this.region.move(this.gpa);
  }

  /** Zeroes, or with `copy` the same bytes, at another host address. */
  swap(copy = false): void {
    this.region.swap({ copy });
  }

  /** madvise(MADV_DONTNEED). */
  discard(): void {
    this.region.discard();
  }

  /** madvise(MADV_PAGEOUT); Linux 6.1 needs two to write out a page that was clean. */
  pageout(): void {
    const { region } = this;
    for (let tries = 0; tries < 2 && isPresent(region.hva); tries++) region.pageout();
    this.pageouts.push(isPresent(region.hva) ? 'in' : 'out');
  }

  /** move_pages to the other one of two nodes; returns whether it went there. */
  migrate(): boolean {
    const target = 1 - (this.region.nodes()[0] ?? 0);
    const moved = this.region.migrate(target)[0] === target;
    this.migrations.push(moved ? 'moved' : 'stayed');
    return moved;
  }
}

/** This process has the page mapped: bit 63 of its entry in /proc/self/pagemap. */
function isPresent(hva: bigint): boolean {
  const entry = Buffer.alloc(8);
  const file = openSync('/proc/self/pagemap', 'r');
  try {
    readSync(file, entry, 0, 8, (hva / BigInt(PAGE_SIZE)) * 8n);
  } finally {
    closeSync(file);
  }
  return entry.readBigUInt64LE() >> 63n === 1n;
}

function read(path: string): string {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return '';
  }
}

/** Pages can be moved between NUMA nodes. */
export const twoNodes: Requirement = {
  name: 'two NUMA nodes',
  missing: () =>
    /^0-/.test(read('/sys/devices/system/node/has_memory'))
      ? undefined
      : 'this machine has one NUMA node: a kernel with CONFIG_NUMA_EMU has two in the lab (--kernel debian:6.12-amd64)',
};

/** Anonymous pages can be paged out. */
export const swapSpace: Requirement = {
  name: 'swap space',
  missing: () =>
    read('/proc/swaps').split('\n').length > 1
      ? undefined
      : 'this machine has no swap space: swapon a device (the lab does so with CONFIG_BLK_DEV_RAM)',
};

/** What the first of a page's changes did, between two entries, and the second, with L2 active. */
const changesOf =
  (list: (page: GuestPage) => readonly string[]) =>
  ({ page }: { readonly page: GuestPage }) => ({
    atEntry: list(page)[0] ?? 'never',
    whileActive: list(page)[1] ?? 'never',
  });

/** For a page that goes out between two entries, then with L2 active: stock KVM pins it there from 6.13 on. */
export const pagedOut = {
  requires: [swapSpace],
  after: changesOf((page) => page.pageouts),
  more: {
    stock: { atEntry: 'out', whileActive: { oneOf: ['out', 'in'] } },
    patched: { atEntry: 'out', whileActive: 'out' },
  },
} as const;

/** For a page that migrates between two entries, and with L2 active, where stock KVM holds it. */
export const migrated = {
  requires: [twoNodes],
  after: changesOf((page) => page.migrations),
  more: {
    stock: { atEntry: 'moved', whileActive: 'stayed' },
    patched: { atEntry: 'moved', whileActive: 'moved' },
  },
} as const;
