// SPDX-License-Identifier: Apache-2.0
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach } from 'vitest';

/** A folder of each test's own, with NVMX_CACHE in it: `cache`, or itself. */
export function ownCache(take: (folder: string) => void, cache = ''): void {
  const before = process.env['NVMX_CACHE'];
  let folder: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'nvmx-lab-'));
    process.env['NVMX_CACHE'] = join(folder, cache);
    take(folder);
  });
  afterEach(() => {
    rmSync(folder, { recursive: true, force: true });
    if (before === undefined) delete process.env['NVMX_CACHE'];
    else process.env['NVMX_CACHE'] = before;
  });
}

/** A file with the header of a kernel image (boot protocol 2.15) and one setup sector beyond the first. */
export function bzImage(release: string): Buffer {
  const bytes = Buffer.alloc(0x10000);
  bytes[0x1f1] = 2;
  bytes.write('HdrS', 0x202, 'latin1');
  bytes.writeUInt16LE(0x20f, 0x206);
  bytes.writeUInt16LE(0x100, 0x20e);
  bytes.write(`${release} (someone) #1\0`, 0x300, 'latin1');
  bytes.writeUInt32LE(0x7fffffff, 0x22c);
  bytes.writeUInt32LE(2047, 0x238);
  bytes.write('kernel', 3 * 512, 'latin1');
  return bytes;
}

/** An ELF file that has only the sections a module's dependencies are read from. */
export function moduleFile(depends: string): Buffer {
  const names = '\0.shstrtab\0.modinfo\0';
  const info = `license=x\0depends=${depends}\0name=y\0`;
  const table = 64;
  const bytes = Buffer.alloc(table + 3 * 64 + names.length + info.length);
  bytes.write('\x7fELF', 0, 'latin1');
  bytes.writeBigUInt64LE(BigInt(table), 0x28);
  bytes.writeUInt16LE(64, 0x3a);
  bytes.writeUInt16LE(3, 0x3c);
  bytes.writeUInt16LE(1, 0x3e);
  const section = (index: number, name: number, offset: number, text: string): void => {
    bytes.writeUInt32LE(name, table + index * 64);
    bytes.writeBigUInt64LE(BigInt(offset), table + index * 64 + 0x18);
    bytes.writeBigUInt64LE(BigInt(text.length), table + index * 64 + 0x20);
    bytes.write(text, offset, 'latin1');
  };
  const start = table + 3 * 64;
  section(1, 1, start, names);
  section(2, 11, start + names.length, info);
  return bytes;
}
