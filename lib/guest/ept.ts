// SPDX-License-Identifier: Apache-2.0
import { type PageSize, PagingTree, type TreeOptions } from './paging.ts';

/** SDM vol. 3, 29.3.2: read, write, execute; memory type write-back in leaves. */
const EPTE = { table: 0x7n, page: 0x37n, present: 0x7n };
/** EPTP: write-back tables, a walk of four levels. */
const POINTER = 0x1en;
const POINTER_ACCESSED_DIRTY = 1n << 6n;
const READ = 1n;
const WRITE = 2n;
const EXECUTE = 4n;
const TYPE_SHIFT = 3n;
const IGNORE_PAT = 1n << 6n;
const ACCESSED = 1n << 8n;
const DIRTY = 1n << 9n;

const MEMORY_TYPES = {
  uncacheable: 0n,
  'write-combining': 1n,
  'write-through': 4n,
  'write-protected': 5n,
  'write-back': 6n,
} as const;
export type EptMemoryType = keyof typeof MEMORY_TYPES;

export interface EptPermissions {
  read?: boolean;
  write?: boolean;
  execute?: boolean;
}

export interface EptPageOptions extends EptPermissions {
  /** The L1 guest-physical address the page leads to; default the L2 one. */
  to?: number;
  /** Default 4K. */
  size?: PageSize;
  memoryType?: EptMemoryType;
  ignorePat?: boolean;
}

export interface EptOptions extends TreeOptions {
  /** Turns accessed and dirty flags on (EPTP bit 6); L1's CPU must offer them. */
  accessedDirty?: boolean;
}

/** Ways to make an entry that no CPU accepts (SDM vol. 3, 29.3.3.1). */
export type EptMisconfiguration = 'write-only' | 'memory-type' | 'reserved-bit';
const MISCONFIGURATIONS: Readonly<Record<EptMisconfiguration, { clear: bigint; set: bigint }>> = {
  'write-only': { clear: 7n, set: WRITE },
  'memory-type': { clear: 7n << TYPE_SHIFT, set: 7n | (7n << TYPE_SHIFT) },
  // Bit 51 is an address bit beyond the width of any CPU that this runs on
  'reserved-bit': { clear: 0n, set: 7n | (1n << 51n) },
};

/** L2's EPT: L2 guest-physical addresses to L1 guest-physical ones. After an edit, INVEPT. */
export class Ept extends PagingTree {
  readonly accessedDirty: boolean;

  /** @internal Made by L1.createEpt, or like one of another L1. */
  constructor(memory: ArrayBuffer, allocate: () => number, from: EptOptions | Ept = {}) {
    super(memory, allocate, EPTE, from);
    this.accessedDirty = from.accessedDirty ?? false;
  }

  /** For the VMCS: EPT_POINTER. */
  get pointer(): bigint {
    return BigInt(this.root) | POINTER | (this.accessedDirty ? POINTER_ACCESSED_DIRTY : 0n);
  }

  /** Maps a page; with a number, a 4 KiB page with all permissions to that address. */
  map(gpa: number, options: number | EptPageOptions = {}): void {
    const page: EptPageOptions = typeof options === 'number' ? { to: options } : options;
    const { to = gpa, size = '4K', memoryType = 'write-back', ignorePat = false } = page;
    const type = MEMORY_TYPES[memoryType];
    if (type === undefined) throw new TypeError(`"${memoryType}" is not a memory type`);
    const bits = permissions(page) | (type << TYPE_SHIFT) | (ignorePat ? IGNORE_PAT : 0n);
    this.setEntry(gpa, size, this.leaf(to, size, bits));
  }

  /** Sets the permissions of the page at an address; those not named are allowed. Splits to that size first. */
  protect(gpa: number, allowed: EptPermissions, size: PageSize = '4K'): void {
    this.change(gpa, size, 7n, permissions(allowed));
  }

  /** Makes accesses to the page exit with `ept-misconfiguration`. map() repairs it. */
  misconfigure(gpa: number, how: EptMisconfiguration = 'write-only', size: PageSize = '4K'): void {
    const bits = MISCONFIGURATIONS[how];
    if (!bits) throw new TypeError(`"${how}" is not a misconfiguration`);
    this.change(gpa, size, bits.clear, bits.set);
  }

  /** What the CPU has set since the entry was written or cleared; needs `accessedDirty`. */
  flags(gpa: number): { accessed: boolean; dirty: boolean } {
    const { value } = this.entry(gpa);
    return { accessed: (value & ACCESSED) !== 0n, dirty: (value & DIRTY) !== 0n };
  }

  /** Clears the accessed and dirty flags of the page at an address. */
  clearFlags(gpa: number, size: PageSize = '4K'): void {
    this.change(gpa, size, ACCESSED | DIRTY, 0n);
  }
}

function permissions({ read = true, write = true, execute = true }: EptPermissions): bigint {
  return (read ? READ : 0n) | (write ? WRITE : 0n) | (execute ? EXECUTE : 0n);
}
