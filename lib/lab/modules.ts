// SPDX-License-Identifier: Apache-2.0

import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { basename } from 'node:path';
import { LabError } from './errors.ts';
import { CommandMissingError } from './process.ts';

export interface KernelModule {
  /** As the kernel names it: underscores, never dashes. */
  readonly name: string;
  readonly data: Buffer;
}

const SIGNED = '~Module signature appended~\n';
/** struct module_signature, in front of that line. */
const SIGNATURE_HEADER = 12;

const SUFFIX = /\.ko(\.xz|\.zst|\.gz)?$/;

/** The kernel's name of a module file. */
export function moduleName(path: string): string {
  return basename(path).replace(SUFFIX, '').replaceAll('-', '_');
}

/** The section .modinfo of a module: what it depends on. */
export function moduleDepends(elf: Buffer): string[] {
  const table = Number(elf.readBigUInt64LE(0x28));
  const size = elf.readUInt16LE(0x3a);
  const count = elf.readUInt16LE(0x3c);
  const section = (index: number): { name: number; offset: number; size: number } => ({
    name: elf.readUInt32LE(table + index * size),
    offset: Number(elf.readBigUInt64LE(table + index * size + 0x18)),
    size: Number(elf.readBigUInt64LE(table + index * size + 0x20)),
  });
  const names = section(elf.readUInt16LE(0x3e));
  for (let index = 0; index < count; index++) {
    const { name, offset, size: length } = section(index);
    const start = names.offset + name;
    if (elf.toString('latin1', start, elf.indexOf(0, start)) !== '.modinfo') continue;
    const line = elf
      .toString('latin1', offset, offset + length)
      .split('\0')
      .find((text) => text.startsWith('depends='));
    return (
      line
        ?.slice(8)
        .split(',')
        .filter(Boolean)
        .map((text) => text.replaceAll('-', '_')) ?? []
    );
  }
  return [];
}

/**
 * A module and the signature at its end (empty when it has none). A kernel checks one that is there, and that is a
 * quarter of the boot on an emulated CPU.
 */
export function splitSignature(file: Buffer): { readonly module: Buffer; readonly signature: Buffer } {
  const magic = file.length - SIGNED.length;
  const header = magic - SIGNATURE_HEADER;
  if (header < 0 || file.toString('latin1', magic) !== SIGNED)
    return { module: file, signature: file.subarray(0, 0) };
  const lengths = file.readUInt8(header + 3) + file.readUInt8(header + 4) + file.readUInt32BE(header + 8);
  const end = header - lengths;
  if (end < 0) return { module: file, signature: file.subarray(0, 0) };
  return { module: file.subarray(0, end), signature: file.subarray(end) };
}

/**
 * The wanted modules and what they depend on, in the order of loading. A name without a file is built into the
 * kernel.
 */
export function loadModules(
  wanted: readonly string[],
  files: readonly string[],
  read: (path: string) => Buffer = readModule,
): KernelModule[] {
  const byName = new Map(files.filter((file) => SUFFIX.test(file)).map((file) => [moduleName(file), file]));
  const order = new Map<string, KernelModule>();
  const visit = (name: string): void => {
    const file = byName.get(name);
    if (file === undefined || order.has(name)) return;
    byName.delete(name);
    const data = read(file);
    for (const dependency of moduleDepends(data)) visit(dependency);
    order.set(name, { name, data });
  };
  for (const name of wanted) visit(name);
  return [...order.values()];
}

function readModule(path: string): Buffer {
  const tool = { xz: 'xz', zst: 'zstd', gz: 'gzip' }[/\.(xz|zst|gz)$/.exec(path)?.[1] ?? ''];
  if (tool === undefined) return readFileSync(path);
  const done = spawnSync(tool, ['-d', '-c', path], { maxBuffer: 64 << 20 });
  if ((done.error as NodeJS.ErrnoException | undefined)?.code === 'ENOENT') {
    throw new LabError(
      'a kernel module cannot be unpacked',
      new CommandMissingError(tool).message,
      `apt-get install ${tool === 'xz' ? 'xz-utils' : tool}`,
    );
  }
  if (done.status !== 0)
    throw new LabError('a kernel module is damaged', `${path}: ${done.stderr}`, 'get the kernel again');
  return done.stdout;
}
