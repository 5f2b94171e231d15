// SPDX-License-Identifier: Apache-2.0
import { checkField, checkInteger, checkObject, checkU64 } from '../check.ts';

/** struct kvm_regs: the order of the fields is the layout. */
export const REGISTERS = [
  'rax',
  'rbx',
  'rcx',
  'rdx',
  'rsi',
  'rdi',
  'rsp',
  'rbp',
  'r8',
  'r9',
  'r10',
  'r11',
  'r12',
  'r13',
  'r14',
  'r15',
  'rip',
  'rflags',
] as const;
export type Register = (typeof REGISTERS)[number];
export type Regs = Record<Register, bigint>;
export const REGS_SIZE = REGISTERS.length * 8;

export function decodeRegs(words: BigUint64Array): Regs {
  // A literal: filling the object in a loop costs as much as the ioctl's own work.
  return {
    rax: words[0]!,
    rbx: words[1]!,
    rcx: words[2]!,
    rdx: words[3]!,
    rsi: words[4]!,
    rdi: words[5]!,
    rsp: words[6]!,
    rbp: words[7]!,
    r8: words[8]!,
    r9: words[9]!,
    r10: words[10]!,
    r11: words[11]!,
    r12: words[12]!,
    r13: words[13]!,
    r14: words[14]!,
    r15: words[15]!,
    rip: words[16]!,
    rflags: words[17]!,
  };
}

/** False when it is no 64-bit number. */
function put(words: BigUint64Array, index: number, value: bigint | undefined): boolean {
  if (typeof value !== 'bigint') return false;
  words[index] = value;
  return words[index] === value;
}

/**
 * Writes all registers; false for anything that {@link patchRegs} must look at: a part of them, other names, wrong
 * types or values. One call after the other for the same reason as above.
 */
export function encodeRegs(words: BigUint64Array, regs: Partial<Regs>): boolean {
  let names = 0;
  for (const _ in regs) names++;
  return (
    names === REGISTERS.length &&
    put(words, 0, regs.rax) &&
    put(words, 1, regs.rbx) &&
    put(words, 2, regs.rcx) &&
    put(words, 3, regs.rdx) &&
    put(words, 4, regs.rsi) &&
    put(words, 5, regs.rdi) &&
    put(words, 6, regs.rsp) &&
    put(words, 7, regs.rbp) &&
    put(words, 8, regs.r8) &&
    put(words, 9, regs.r9) &&
    put(words, 10, regs.r10) &&
    put(words, 11, regs.r11) &&
    put(words, 12, regs.r12) &&
    put(words, 13, regs.r13) &&
    put(words, 14, regs.r14) &&
    put(words, 15, regs.r15) &&
    put(words, 16, regs.rip) &&
    put(words, 17, regs.rflags)
  );
}

/** Writes the given registers over those in `words`. */
export function patchRegs(words: BigUint64Array, patch: Partial<Regs>): void {
  let given = 0;
  for (let index = 0; index < REGISTERS.length; index++) {
    const name = REGISTERS[index]!;
    const value = patch[name];
    if (value === undefined) continue;
    words[index] = checkU64(name, value);
    given++;
  }
  const names = Object.keys(patch);
  if (names.length !== given) {
    const unknown = names.find((name) => !(REGISTERS as readonly string[]).includes(name));
    if (unknown !== undefined)
      throw new TypeError(`${unknown} is not a register; they are ${REGISTERS.join(', ')}`);
  }
}

/** struct kvm_segment: a segment register with its hidden part. */
export interface Segment {
  base: bigint;
  limit: number;
  selector: number;
  type: number;
  present: number;
  dpl: number;
  db: number;
  s: number;
  l: number;
  g: number;
  avl: number;
  unusable: number;
}
/** struct kvm_dtable: GDTR or IDTR. */
export interface DescriptorTable {
  base: bigint;
  limit: number;
}

const SEGMENT_NAMES = ['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'tr', 'ldt'] as const;
const TABLE_NAMES = ['gdt', 'idt'] as const;
const WORD_NAMES = ['cr0', 'cr2', 'cr3', 'cr4', 'cr8', 'efer', 'apicBase'] as const;
const SEGMENT_FIELDS: ReadonlySet<string> = new Set([
  'base',
  'limit',
  'selector',
  'type',
  'present',
  'dpl',
  'db',
  's',
  'l',
  'g',
  'avl',
  'unusable',
]);

/** struct kvm_sregs. */
export type Sregs = Record<(typeof SEGMENT_NAMES)[number], Segment> &
  Record<(typeof TABLE_NAMES)[number], DescriptorTable> &
  Record<(typeof WORD_NAMES)[number], bigint> & {
    /** 256 bits: the one interrupt that was injected and not yet delivered. */
    interruptBitmap: bigint[];
  };
/** Segments may be given in part. */
export type SregsPatch = {
  [Name in keyof Sregs]?: Sregs[Name] extends Segment | DescriptorTable ? Partial<Sregs[Name]> : Sregs[Name];
};

const SEGMENT_SIZE = 24;
const TABLES_AT = SEGMENT_NAMES.length * SEGMENT_SIZE;
const WORDS_AT = TABLES_AT + TABLE_NAMES.length * 16;
const BITMAP_AT = WORDS_AT + WORD_NAMES.length * 8;
export const SREGS_SIZE = BITMAP_AT + 4 * 8;

/** struct kvm_sregs2. */
export type Sregs2 = Omit<Sregs, 'interruptBitmap'> & {
  /** Bit 0 (KVM_SREGS2_FLAGS_PDPTRS_VALID): the PDPTRs are those the CPU has loaded. */
  flags: bigint;
  pdptrs: bigint[];
};
export type Sregs2Patch = Omit<SregsPatch, 'interruptBitmap'> & { flags?: bigint; pdptrs?: bigint[] };
// The flags are where struct kvm_sregs has its bitmap.
const FLAGS_AT = BITMAP_AT;
const PDPTRS_AT = FLAGS_AT + 8;
export const SREGS2_SIZE = PDPTRS_AT + 4 * 8;

const viewOf = (bytes: Uint8Array) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

function decodeCommon(view: DataView): Sregs {
  const sregs = {} as Sregs;
  for (const [index, name] of SEGMENT_NAMES.entries()) {
    const at = index * SEGMENT_SIZE;
    sregs[name] = {
      base: view.getBigUint64(at, true),
      limit: view.getUint32(at + 8, true),
      selector: view.getUint16(at + 12, true),
      type: view.getUint8(at + 14),
      present: view.getUint8(at + 15),
      dpl: view.getUint8(at + 16),
      db: view.getUint8(at + 17),
      s: view.getUint8(at + 18),
      l: view.getUint8(at + 19),
      g: view.getUint8(at + 20),
      avl: view.getUint8(at + 21),
      unusable: view.getUint8(at + 22),
    };
  }
  for (const [index, name] of TABLE_NAMES.entries()) {
    const at = TABLES_AT + index * 16;
    sregs[name] = { base: view.getBigUint64(at, true), limit: view.getUint16(at + 8, true) };
  }
  for (const [index, name] of WORD_NAMES.entries())
    sregs[name] = view.getBigUint64(WORDS_AT + index * 8, true);
  return sregs;
}

const fourWords = (view: DataView, at: number) =>
  [0, 1, 2, 3].map((word) => view.getBigUint64(at + word * 8, true));

export function decodeSregs(bytes: Uint8Array): Sregs {
  const view = viewOf(bytes);
  const sregs = decodeCommon(view);
  sregs.interruptBitmap = fourWords(view, BITMAP_AT);
  return sregs;
}

export function decodeSregs2(bytes: Uint8Array): Sregs2 {
  const view = viewOf(bytes);
  return {
    ...decodeCommon(view),
    flags: view.getBigUint64(FLAGS_AT, true),
    pdptrs: fourWords(view, PDPTRS_AT),
  };
}

function includes<T extends string>(names: readonly T[], name: string): name is T {
  return (names as readonly string[]).includes(name);
}

/** Writes a field that is given. */
function patchNumber(
  view: DataView,
  at: number,
  size: 1 | 2 | 4,
  name: string,
  field: string,
  value: number | undefined,
): void {
  if (value === undefined) return;
  if (size === 1) view.setUint8(at, checkField(name, field, value, 0xff));
  else if (size === 2) view.setUint16(at, checkField(name, field, value, 0xffff), true);
  else view.setUint32(at, checkField(name, field, value, 0xffff_ffff), true);
}

/** One field after the other: a loop over names takes ten times as long. */
function patchSegment(view: DataView, at: number, name: string, patch: Partial<Segment>): void {
  for (const field in patch) {
    if (!SEGMENT_FIELDS.has(field)) throw new TypeError(`${name}.${field} is not a field of a segment`);
  }
  if (patch.base !== undefined) view.setBigUint64(at, checkU64(`${name}.base`, patch.base), true);
  patchNumber(view, at + 8, 4, name, 'limit', patch.limit);
  patchNumber(view, at + 12, 2, name, 'selector', patch.selector);
  patchNumber(view, at + 14, 1, name, 'type', patch.type);
  patchNumber(view, at + 15, 1, name, 'present', patch.present);
  patchNumber(view, at + 16, 1, name, 'dpl', patch.dpl);
  patchNumber(view, at + 17, 1, name, 'db', patch.db);
  patchNumber(view, at + 18, 1, name, 's', patch.s);
  patchNumber(view, at + 19, 1, name, 'l', patch.l);
  patchNumber(view, at + 20, 1, name, 'g', patch.g);
  patchNumber(view, at + 21, 1, name, 'avl', patch.avl);
  patchNumber(view, at + 22, 1, name, 'unusable', patch.unusable);
}

function patchFour(view: DataView, at: number, name: string, value: unknown): void {
  if (!Array.isArray(value) || value.length !== 4) throw new RangeError(`${name} has exactly 4 words`);
  for (const [word, bits] of value.entries()) view.setBigUint64(at + word * 8, checkU64(name, bits), true);
}

function patchField(view: DataView, name: string, value: unknown): void {
  if (includes(SEGMENT_NAMES, name)) {
    checkObject(name, value as Segment);
    patchSegment(view, SEGMENT_NAMES.indexOf(name) * SEGMENT_SIZE, name, value as Partial<Segment>);
  } else if (includes(TABLE_NAMES, name)) {
    const at = TABLES_AT + TABLE_NAMES.indexOf(name) * 16;
    const { base, limit } = checkObject(name, value as Partial<DescriptorTable>);
    if (base !== undefined) view.setBigUint64(at, checkU64(`${name}.base`, base), true);
    if (limit !== undefined) view.setUint16(at + 8, checkInteger(`${name}.limit`, limit, 0, 0xffff), true);
  } else if (includes(WORD_NAMES, name)) {
    view.setBigUint64(WORDS_AT + WORD_NAMES.indexOf(name) * 8, checkU64(name, value), true);
  } else {
    throw new TypeError(`${name} is not a special register`);
  }
}

/** Writes the given fields over those in `bytes`. */
export function patchSregs(bytes: Uint8Array, patch: SregsPatch): void {
  const view = viewOf(bytes);
  for (const [name, value] of Object.entries(patch)) {
    if (name === 'interruptBitmap') patchFour(view, BITMAP_AT, name, value);
    else patchField(view, name, value);
  }
}

/** Writes the given fields over those in `bytes`. */
export function patchSregs2(bytes: Uint8Array, patch: Sregs2Patch): void {
  const view = viewOf(bytes);
  for (const [name, value] of Object.entries(patch)) {
    if (name === 'flags') view.setBigUint64(FLAGS_AT, checkU64(name, value), true);
    else if (name === 'pdptrs') patchFour(view, PDPTRS_AT, name, value);
    else patchField(view, name, value);
  }
}
