// SPDX-License-Identifier: Apache-2.0
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { LineTable } from './lines.ts';

const ELF_MAGIC = 0x464c457f;
const CLASS_64 = 2;
const ET_EXEC = 2;
const EM_X86_64 = 62;
const PT_LOAD = 1;
const SHT_SYMTAB = 2;
/** STT_NOTYPE, STT_OBJECT, STT_FUNC: no sections or files. */
const SYMBOL_TYPES = [0, 1, 2];

export interface Symbol {
  readonly name: string;
  readonly address: number;
  readonly size: number;
}

export interface Segment {
  readonly gpa: number;
  readonly bytes: Uint8Array;
  /** Size in memory: what follows `bytes` is zero. */
  readonly size: number;
}

/** A static 64-bit executable: what to load where, and its symbols. */
export class Image {
  readonly name: string;
  readonly entry: number;
  readonly segments: readonly Segment[];
  readonly #symbols: readonly Symbol[];
  /** Read at the first use: only a fault asks. */
  readonly #debug: () => LineTable;
  #lines: LineTable | undefined;

  /** @throws Error when the bytes are not a static x86-64 ELF executable */
  constructor(name: string, file: Uint8Array) {
    this.name = name;
    const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
    if (
      file.byteLength < 64 ||
      view.getUint32(0, true) !== ELF_MAGIC ||
      view.getUint8(4) !== CLASS_64 ||
      view.getUint16(16, true) !== ET_EXEC ||
      view.getUint16(18, true) !== EM_X86_64
    ) {
      throw new Error(`${name} is not a static x86-64 ELF executable: build the guest images again`);
    }
    this.entry = number64(view, 24);
    this.segments = readSegments(view, file);
    this.#symbols = readSymbols(view, file);
    this.#debug = () => {
      const names = ['.debug_line', '.debug_line_str', '.debug_str'];
      const [line, lineStrings, strings] = readSections(view, file, names);
      return new LineTable({ line: line!, lineStrings: lineStrings!, strings: strings! });
    };
  }

  /** The line of the source that an address is of, as `guests/l1/main.c:12`; undefined where there is none. */
  line(address: bigint | number): string | undefined {
    this.#lines ??= this.#debug();
    return this.#lines.at(Number(address));
  }

  /** @throws Error when the image has no such symbol */
  symbol(name: string): Symbol {
    const found = this.#symbols.find((symbol) => symbol.name === name);
    if (!found) throw new Error(`${this.name} has no symbol "${name}"`);
    return found;
  }

  /** The symbol that covers an address, as `name+0x12`; undefined outside all of them. */
  locate(address: bigint | number): string | undefined {
    const at = Number(address);
    const found = this.#symbols.find((symbol) => at >= symbol.address && at < symbol.address + symbol.size);
    if (!found) return undefined;
    return at === found.address ? found.name : `${found.name}+0x${(at - found.address).toString(16)}`;
  }
}

/** The contents of the named sections, empty where there is none. */
function readSections(view: DataView, file: Uint8Array, names: readonly string[]): Uint8Array[] {
  const table = number64(view, 40);
  const entrySize = view.getUint16(58, true);
  const entries = Array.from({ length: view.getUint16(60, true) }, (_, i) => table + i * entrySize);
  const strings = entries[view.getUint16(62, true)];
  const found = new Map<string, Uint8Array>();
  for (const at of entries) {
    const name = cString(file, number64(view, strings! + 24) + view.getUint32(at, true));
    const offset = number64(view, at + 24);
    found.set(name, file.subarray(offset, offset + number64(view, at + 32)));
  }
  return names.map((name) => found.get(name) ?? new Uint8Array());
}

function number64(view: DataView, offset: number): number {
  return Number(view.getBigUint64(offset, true));
}

function readSegments(view: DataView, file: Uint8Array): Segment[] {
  const table = number64(view, 32);
  const entrySize = view.getUint16(54, true);
  const count = view.getUint16(56, true);
  const segments: Segment[] = [];
  for (let i = 0; i < count; i += 1) {
    const at = table + i * entrySize;
    const size = number64(view, at + 40);
    if (view.getUint32(at, true) !== PT_LOAD || size === 0) continue;
    const offset = number64(view, at + 8);
    const bytes = file.subarray(offset, offset + number64(view, at + 32));
    segments.push({ gpa: number64(view, at + 24), bytes, size });
  }
  return segments;
}

function readSymbols(view: DataView, file: Uint8Array): Symbol[] {
  const table = number64(view, 40);
  const entrySize = view.getUint16(58, true);
  const count = view.getUint16(60, true);
  const symbols: Symbol[] = [];
  for (let i = 0; i < count; i += 1) {
    const at = table + i * entrySize;
    if (view.getUint32(at + 4, true) !== SHT_SYMTAB) continue;
    const offset = number64(view, at + 24);
    const end = offset + number64(view, at + 32);
    const strings = number64(view, table + view.getUint32(at + 40, true) * entrySize + 24);
    for (let entry = offset; entry < end; entry += 24) {
      const type = view.getUint8(entry + 4) & 0xf;
      const defined = view.getUint16(entry + 6, true) !== 0;
      if (!SYMBOL_TYPES.includes(type) || !defined) continue;
      const name = cString(file, strings + view.getUint32(entry, true));
      symbols.push({ name, address: number64(view, entry + 8), size: number64(view, entry + 16) });
    }
  }
  return symbols;
}

function cString(file: Uint8Array, offset: number): string {
  return Buffer.from(file.buffer, file.byteOffset + offset, file.indexOf(0, offset) - offset).toString(
    'latin1',
  );
}

/** Where the images are: beside the shipped addon, or where the CMake build of a checkout leaves them. */
const FOLDERS = ['prebuilds/linux-x64', 'out/cmake/guests'];

const loaded = new Map<string, Image>();

/**
 * Loads `l1.elf` or `l2.elf`, once. A checkout's own build wins over a prebuilt one.
 * @throws Error that says how to build them when there are none
 */
export function loadImage(name: 'l1.elf' | 'l2.elf'): Image {
  const known = loaded.get(name);
  if (known) return known;
  const root = join(dirname(fileURLToPath(import.meta.url)), '../..');
  const path = FOLDERS.toReversed()
    .map((folder) => join(root, folder, name))
    .find((candidate) => existsSync(candidate));
  if (path === undefined) {
    throw new Error(
      `the guest image ${name} is not built: run "npm run build" (looked in ${FOLDERS.join(', ')})`,
    );
  }
  const image = new Image(name, readFileSync(path));
  loaded.set(name, image);
  return image;
}
