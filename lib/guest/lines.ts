// SPDX-License-Identifier: Apache-2.0
// Which line of the source an address is of: the line table of DWARF version 5, sections 6.2.4 and 6.2.5.
import { posix } from 'node:path';

/** From this address on; no line where a sequence of instructions has ended. */
interface Row {
  readonly address: number;
  readonly place: string | undefined;
}

const VERSION = 5;
const PATH = 1;
const DIRECTORY = 2;
const FORM = {
  data2: 0x05,
  string: 0x08,
  block: 0x09,
  data1: 0x0b,
  strp: 0x0e,
  udata: 0x0f,
  data16: 0x1e,
  lineStrp: 0x1f,
};

class Reader {
  readonly #view: DataView;
  at = 0;

  constructor(bytes: Uint8Array) {
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  get end(): boolean {
    return this.at >= this.#view.byteLength;
  }

  u8(): number {
    return this.#view.getUint8(this.at++);
  }

  i8(): number {
    return this.#view.getInt8(this.at++);
  }

  u16(): number {
    this.at += 2;
    return this.#view.getUint16(this.at - 2, true);
  }

  u32(): number {
    this.at += 4;
    return this.#view.getUint32(this.at - 4, true);
  }

  u64(): number {
    this.at += 8;
    return Number(this.#view.getBigUint64(this.at - 8, true));
  }

  uleb(): number {
    let value = 0;
    for (let shift = 1; ; shift *= 128) {
      const byte = this.u8();
      value += (byte & 0x7f) * shift;
      if (byte < 0x80) return value;
    }
  }

  sleb(): number {
    let value = 0;
    for (let shift = 1; ; shift *= 128) {
      const byte = this.u8();
      value += (byte & 0x7f) * shift;
      if (byte < 0x80) return byte & 0x40 ? value - shift * 128 : value;
    }
  }

  string(): string {
    let text = '';
    for (let byte = this.u8(); byte !== 0; byte = this.u8()) text += String.fromCharCode(byte);
    return text;
  }
}

export interface DebugSections {
  readonly line: Uint8Array;
  readonly lineStrings: Uint8Array;
  readonly strings: Uint8Array;
}

/** One table of directories or files: its entries' paths and directory indices. */
function readEntries(reader: Reader, sections: DebugSections): { path: string; directory: number }[] {
  const formats = Array.from({ length: reader.u8() }, () => [reader.uleb(), reader.uleb()] as const);
  const read = (form: number): string | number => {
    const stringAt = (bytes: Uint8Array, offset: number) => {
      const strings = new Reader(bytes);
      strings.at = offset;
      return strings.string();
    };
    if (form === FORM.string) return reader.string();
    if (form === FORM.lineStrp) return stringAt(sections.lineStrings, reader.u32());
    if (form === FORM.strp) return stringAt(sections.strings, reader.u32());
    if (form === FORM.udata) return reader.uleb();
    if (form === FORM.data1) return reader.u8();
    if (form === FORM.data2) return reader.u16();
    if (form === FORM.data16 || form === FORM.block) {
      reader.at += form === FORM.data16 ? 16 : reader.uleb();
      return 0;
    }
    throw new Error(`form 0x${form.toString(16)} in a line table`);
  };
  return Array.from({ length: reader.uleb() }, () => {
    const entry = { path: '', directory: 0 };
    for (const [content, form] of formats) {
      const value = read(form);
      if (content === PATH) entry.path = String(value);
      if (content === DIRECTORY) entry.directory = Number(value);
    }
    return entry;
  });
}

/** The rows of one unit, which ends at `end`. */
function readUnit(reader: Reader, end: number, sections: DebugSections): Row[] {
  reader.at += 2; // address and segment selector size
  const headerLength = reader.u32();
  const program = reader.at + headerLength;
  const step = reader.u8();
  reader.at += 2; // operations of an instruction, is_stmt
  const lineBase = reader.i8();
  const lineRange = reader.u8();
  const opcodeBase = reader.u8();
  const lengths = Array.from({ length: opcodeBase - 1 }, () => reader.u8());
  const directories = readEntries(reader, sections);
  const files = readEntries(reader, sections);
  const places = files.map(({ path, directory }) => {
    const folder = directories[directory]?.path ?? '';
    return path.startsWith('/') ? path : posix.join(folder, path);
  });
  reader.at = program;

  const rows: Row[] = [];
  let [address, file, line] = [0, 1, 1];
  const emit = () => rows.push({ address, place: `${places[file]}:${line}` });
  const advance = (operations: number) => {
    address += operations * step;
  };
  const extended = (length: number) => {
    const next = reader.at + length;
    const code = reader.u8();
    if (code === 1) {
      rows.push({ address, place: undefined });
      [address, file, line] = [0, 1, 1];
    } else if (code === 2) {
      address = reader.u64();
    }
    reader.at = next;
  };
  while (reader.at < end) {
    const opcode = reader.u8();
    if (opcode >= opcodeBase) {
      const special = opcode - opcodeBase;
      advance(Math.floor(special / lineRange));
      line += lineBase + (special % lineRange);
      emit();
    } else if (opcode === 0) extended(reader.uleb());
    else if (opcode === 1) emit();
    else if (opcode === 2) advance(reader.uleb());
    else if (opcode === 3) line += reader.sleb();
    else if (opcode === 4) file = reader.uleb();
    else if (opcode === 8) advance(Math.floor((255 - opcodeBase) / lineRange));
    else if (opcode === 9) address += reader.u16();
    else for (let operand = 0; operand < lengths[opcode - 1]!; operand += 1) reader.uleb();
  }
  return rows;
}

/** The lines of an image. */
export class LineTable {
  readonly #rows: readonly Row[];

  /** Units of another DWARF version are left out. */
  constructor(sections: DebugSections) {
    const reader = new Reader(sections.line);
    const rows: Row[] = [];
    while (!reader.end) {
      const length = reader.u32();
      const end = reader.at + length;
      if (reader.u16() === VERSION) rows.push(...readUnit(reader, end, sections));
      reader.at = end;
    }
    // Where one sequence ends another may begin: the row with a line is the one that counts.
    this.#rows = rows.sort(
      (a, b) => a.address - b.address || Number(a.place !== undefined) - Number(b.place !== undefined),
    );
  }

  /** `file:line`, or undefined where no line is. */
  at(address: number): string | undefined {
    return this.#rows.findLast((row) => row.address <= address)?.place;
  }
}
