// SPDX-License-Identifier: Apache-2.0
import { closeSync, openSync, readFileSync, readSync } from 'node:fs';

const MAGIC = 0xeb9f;
const HEADER_SIZE = 24;
const KIND_STRUCT = 4;

/** Bytes that follow a type's 12-byte header, by BTF kind; `vlen` is the number of members. */
const TRAILING: Readonly<Record<number, (vlen: number) => number>> = {
  1: () => 4, // INT
  3: () => 12, // ARRAY
  4: (vlen) => 12 * vlen, // STRUCT
  5: (vlen) => 12 * vlen, // UNION
  6: (vlen) => 8 * vlen, // ENUM
  13: (vlen) => 8 * vlen, // FUNC_PROTO
  14: () => 4, // VAR
  15: (vlen) => 12 * vlen, // DATASEC
  17: () => 4, // DECL_TAG
  19: (vlen) => 12 * vlen, // ENUM64
};

/**
 * The members of the named structs in a kernel's BPF Type Format data (Documentation/bpf/btf.rst).
 *
 * @param path the module's or vmlinux' file under /sys/kernel/btf
 * @param basePath vmlinux' file when `path` is a module's: a module's strings go on where vmlinux' end
 * @returns struct name → member names; a struct that is not defined in the file is not in the map
 * @throws Error when a file is not BTF of the machine's byte order
 */
export function structMembers(
  path: string,
  wanted: ReadonlySet<string>,
  basePath?: string,
): Map<string, Set<string>> {
  const data = readFileSync(path);
  const { typeStart, typeEnd, stringStart, stringLength } = header(data, path);
  const base = basePath === undefined ? Buffer.alloc(0) : baseStrings(basePath);
  const own = data.subarray(stringStart, stringStart + stringLength);
  const name = (offset: number): string =>
    offset < base.length ? cString(base, offset) : cString(own, offset - base.length);

  const found = new Map<string, Set<string>>();
  let at = typeStart;
  while (at < typeEnd) {
    const nameOffset = data.readUInt32LE(at);
    const info = data.readUInt32LE(at + 4);
    const vlen = info & 0xffff;
    const kind = (info >>> 24) & 0x1f;
    const members = at + 12;
    if (kind === KIND_STRUCT && nameOffset !== 0) {
      const struct = name(nameOffset);
      if (wanted.has(struct)) {
        const names = found.get(struct) ?? new Set<string>();
        for (let i = 0; i < vlen; i++) names.add(name(data.readUInt32LE(members + 12 * i)));
        found.set(struct, names);
      }
    }
    at = members + (TRAILING[kind]?.(vlen) ?? 0);
  }
  return found;
}

function header(
  data: Buffer,
  path: string,
): { typeStart: number; typeEnd: number; stringStart: number; stringLength: number } {
  if (data.length < HEADER_SIZE || data.readUInt16LE(0) !== MAGIC) {
    throw new Error(`${path} is not BTF data of this machine's byte order`);
  }
  const headerLength = data.readUInt32LE(4);
  const typeStart = headerLength + data.readUInt32LE(8);
  return {
    typeStart,
    typeEnd: typeStart + data.readUInt32LE(12),
    stringStart: headerLength + data.readUInt32LE(16),
    stringLength: data.readUInt32LE(20),
  };
}

/** Only the string section of a large file: the types in front of it are megabytes nobody asked for. */
function baseStrings(path: string): Buffer {
  const fd = openSync(path, 'r');
  try {
    const head = Buffer.alloc(HEADER_SIZE);
    readSync(fd, head, 0, HEADER_SIZE, 0);
    const { stringStart, stringLength } = header(head, path);
    const strings = Buffer.alloc(stringLength);
    let done = 0;
    while (done < stringLength) {
      const length = readSync(fd, strings, done, stringLength - done, stringStart + done);
      if (length === 0) throw new Error(`${path} ends before its string section does`);
      done += length;
    }
    return strings;
  } finally {
    closeSync(fd);
  }
}

function cString(strings: Buffer, offset: number): string {
  return strings.toString('latin1', offset, strings.indexOf(0, offset));
}
