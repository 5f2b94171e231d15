// SPDX-License-Identifier: Apache-2.0
// Four-level maps in guest memory, edited in place: L1's and L2's page tables, and L2's EPT. A new one maps the
// first 4 GiB to themselves. The caller flushes what the CPU cached: INVEPT, INVVPID, CR3.
import { MAPPED_BYTES, PAGE_SIZE } from './layout.ts';

const ENTRIES = 512;
const ADDRESS_MASK = 0x000f_ffff_ffff_f000n;
/** The leaf bit of levels 2 and 3; in a 4 KiB leaf it means something else or nothing. */
const LARGE = 1n << 7n;
const SPACE = 2 ** 48;
const WORD = 2 ** 32;

/** Bytes a page maps; a 4 KiB page is a leaf of level 1. */
export type PageSize = '4K' | '2M' | '1G';
const LEVELS = { '4K': 1, '2M': 2, '1G': 3 } as const;
const SIZES: readonly PageSize[] = ['4K', '2M', '1G'];

/** Bytes an entry of a level covers, by level. */
const REACH = [0, 1, 2, 3].map((power) => PAGE_SIZE * ENTRIES ** power);
function reach(level: number): number {
  return REACH[level - 1]!;
}

/** Where an entry is, what it holds and how much it maps. */
export interface Entry {
  /** Guest-physical address of the entry itself. */
  readonly at: number;
  readonly value: bigint;
  /** 1 for the entry of a 4 KiB page, up to 4. */
  readonly level: number;
}

export interface TreeOptions {
  /** Page size of the first 4 GiB; default 2M. */
  pageSize?: PageSize;
  /** Maps nothing to begin with. */
  empty?: boolean;
}

interface Bits {
  readonly table: bigint;
  readonly page: bigint;
  readonly present: bigint;
}

/** Tables of 2 MiB pages by the 1 GiB page they stand for: every L1 that boots makes the same. */
const tables = new Map<bigint, Uint32Array>();
const MOST_TABLES = 16;

/** What page tables and EPT have in common. */
export abstract class PagingTree {
  /** Guest-physical address of the top table. */
  readonly root: number;
  readonly #view: DataView;
  readonly #allocate: () => number;
  readonly #bits: Bits;

  /** @param from a tree whose copy is in `memory` already, or how to make a new one */
  protected constructor(
    memory: ArrayBuffer,
    allocate: () => number,
    bits: Bits,
    from: TreeOptions | PagingTree,
  ) {
    this.#view = new DataView(memory);
    this.#allocate = allocate;
    this.#bits = bits;
    if (from instanceof PagingTree) {
      this.root = from.root;
      return;
    }
    this.root = allocate();
    const { pageSize = '2M', empty = false } = from;
    if (!SIZES.includes(pageSize)) throw new TypeError(`"${pageSize}" is not a page size`);
    for (let gpa = 0; !empty && gpa < MAPPED_BYTES; gpa += reach(3)) {
      this.setEntry(gpa, '1G', this.leaf(gpa, '1G', bits.page));
    }
    // By splitting: an entry at a time this would be most of L1's boot on an emulated CPU
    for (let level = 2; level >= LEVELS[pageSize]; level -= 1) {
      for (let gpa = 0; !empty && gpa < MAPPED_BYTES; gpa += reach(level + 1)) this.#reachLevel(gpa, level);
    }
  }

  #read(at: number): bigint {
    return this.#view.getBigUint64(at, true);
  }

  #write(at: number, value: bigint): void {
    this.#view.setBigUint64(at, value, true);
  }

  #slot(table: number, level: number, gpa: number): number {
    return table + (Math.floor(gpa / reach(level)) % ENTRIES) * 8;
  }

  #isTable(value: bigint, level: number): boolean {
    return level > 1 && (value & this.#bits.present) !== 0n && (level === 4 || (value & LARGE) === 0n);
  }

  /** An entry that maps a page to `to`, with these bits. */
  protected leaf(to: number, size: PageSize, bits: bigint): bigint {
    const address = BigInt(to - (to % reach(LEVELS[size])));
    return address | bits | (size === '4K' ? 0n : LARGE);
  }

  /** The entry that maps an address, or would: the first on the way that is not a table. */
  entry(gpa: number): Entry {
    checkAddress(gpa);
    let table = this.root;
    for (let level = 4; ; level -= 1) {
      const at = this.#slot(table, level, gpa);
      const value = this.#read(at);
      if (!this.#isTable(value, level)) return { at, value, level };
      table = Number(value & ADDRESS_MASK);
    }
  }

  /** Makes the entry of a page of this size exist, splitting or making what is above it; returns where it is. */
  #reachLevel(gpa: number, target: number): number {
    checkAddress(gpa);
    let table = this.root;
    for (let level = 4; level > target; level -= 1) {
      const at = this.#slot(table, level, gpa);
      const value = this.#read(at);
      if (this.#isTable(value, level)) {
        table = Number(value & ADDRESS_MASK);
        continue;
      }
      table = this.#allocate();
      if (value !== 0n) this.#fill(table, level - 1, value);
      this.#write(at, BigInt(table) | this.#bits.table);
    }
    return this.#slot(table, target, gpa);
  }

  /** 512 smaller pages in place of a large one, with its bits. */
  #fill(table: number, level: number, large: bigint): void {
    const bits = (large & ~ADDRESS_MASK & ~LARGE) | (level > 1 ? LARGE : 0n);
    const low = Number(BigInt.asUintN(32, bits));
    const high = Number(bits >> 32n);
    const start = Number(large & ADDRESS_MASK);
    const words = new Uint32Array(this.#view.buffer, table, ENTRIES * 2);
    const known = level === 2 ? tables.get(large) : undefined;
    if (known) {
      words.set(known);
      return;
    }
    // What a large page covers does not cross 4 GiB.
    words.fill(Math.floor(start / WORD) + high);
    const step = reach(level);
    for (let i = 0, word = (start % WORD) + low; i < ENTRIES * 2; i += 2, word += step) words[i] = word;
    if (level === 2 && tables.size < MOST_TABLES) tables.set(large, words.slice());
  }

  /** Puts any 64 bits into the entry of the page of this size at an address, sensible or not. */
  setEntry(gpa: number, size: PageSize, value: bigint): void {
    const level = LEVELS[size];
    if (level === undefined) throw new TypeError(`"${size}" is not a page size`);
    this.#write(this.#reachLevel(gpa, level), BigInt.asUintN(64, value));
  }

  /** Splits the mapping around an address so that its 4 KiB page can trap or change alone. */
  split(gpa: number): void {
    this.#reachLevel(gpa, 1);
  }

  /** Makes accesses to the page at an address fault. */
  unmap(gpa: number, size: PageSize = '4K'): void {
    this.setEntry(gpa, size, 0n);
  }

  /** Changes bits of the page at an address, splitting to that size first. */
  protected change(gpa: number, size: PageSize, clear: bigint, set: bigint): void {
    const at = this.#reachLevel(gpa, LEVELS[size]);
    this.#write(at, (this.#read(at) & ~clear) | set);
  }
}

function checkAddress(gpa: number): void {
  if (!Number.isSafeInteger(gpa) || gpa < 0 || gpa >= SPACE) {
    throw new RangeError(`the address ${gpa} is outside the 256 TiB that four levels map`);
  }
}

/** SDM vol. 3, 4.5: present, writable, accessed (and dirty in leaves). */
const PTE = { table: 0x23n, page: 0x63n, present: 1n };

export interface PageOptions {
  /** Where the page leads; default the address itself. */
  to?: number;
  size?: PageSize;
  writable?: boolean;
  /** Accessible at CPL 3. */
  user?: boolean;
}

/** The page tables L1 and L2 run on; `root` is their CR3. */
export class PageTables extends PagingTree {
  /** @internal Made by L1.createPageTables, or like those of another L1. */
  constructor(memory: ArrayBuffer, allocate: () => number, from: TreeOptions | PageTables = {}) {
    super(memory, allocate, PTE, from);
  }

  /** Maps a 4 KiB page (or another size), to itself unless told otherwise. */
  map(gpa: number, options: number | PageOptions = {}): void {
    const {
      to = gpa,
      size = '4K',
      writable = true,
      user = false,
    } = typeof options === 'number' ? { to: options } : options;
    const bits = PTE.page & ~(writable ? 0n : 2n);
    this.setEntry(gpa, size, this.leaf(to, size, bits | (user ? 4n : 0n)));
  }

  /** What the CPU has set since the entry was written. */
  flags(gpa: number): { accessed: boolean; dirty: boolean } {
    const { value } = this.entry(gpa);
    return { accessed: (value & 0x20n) !== 0n, dirty: (value & 0x40n) !== 0n };
  }

  /** Clears the accessed and dirty flags of the page at an address. */
  clearFlags(gpa: number, size: PageSize = '4K'): void {
    this.change(gpa, size, 0x60n, 0n);
  }
}
