// SPDX-License-Identifier: Apache-2.0
import { createHash } from 'node:crypto';
import {
  closeSync,
  existsSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  realpathSync,
  statSync,
} from 'node:fs';
import { readFile } from 'node:fs/promises';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { cacheEntry, listFiles, type Progress } from './cache.ts';
import { CpioWriter } from './cpio.ts';
import { LabError } from './errors.ts';
import { PACKAGE_FOLDER } from './init_script.ts';
import { type KernelModule, splitSignature } from './modules.ts';
import { packageFile } from './packages.ts';
import { run } from './process.ts';

/** Root of the installed package: this file is lib/lab/payload.ts or dist/lab/payload.js. */
export const PACKAGE_ROOT = dirname(dirname(dirname(fileURLToPath(import.meta.url))));

/** What goes into the machine of the package itself, where it is there: code, addon, guest images. */
const PACKAGE_PARTS: readonly (readonly [folder: string, wanted: RegExp])[] = [
  ['dist', /\.(js|json)$/],
  ['prebuilds', /./],
  ['build/Release', /\.node$/],
  ['out/cmake/guests', /\.elf$/],
];

export type Files = Readonly<Record<string, string>>;

/** Files of the package by their place inside the machine. */
export async function packageFiles(root = PACKAGE_ROOT): Promise<Files> {
  const files: Record<string, string> = {};
  for (const [folder, wanted] of PACKAGE_PARTS) {
    if (!existsSync(join(root, folder))) continue;
    for (const file of await listFiles(join(root, folder))) {
      if (wanted.test(file)) files[join(PACKAGE_FOLDER, relative(root, file))] = file;
    }
  }
  files[join(PACKAGE_FOLDER, 'package.json')] = join(root, 'package.json');
  return files;
}

/** The shared libraries a program needs, by the paths it looks for. */
export async function librariesOf(programs: readonly string[], signal?: AbortSignal): Promise<string[]> {
  const listed = await run('ldd', programs, { signal });
  const missing = /^\s*(\S+) => not found/m.exec(listed.stdout)?.[1];
  if (missing)
    throw new LabError('the lab cannot run this program', `${missing} is not installed`, 'install it');
  return [
    ...new Set([...listed.stdout.matchAll(/(?:=> |^\s*)(\/\S+) \(0x/gm)].map((found) => found[1]!)),
  ].sort();
}

let ownLibraries: Promise<string[]> | undefined;

/** Of this Node; asked once. */
function nodeLibraries(): Promise<string[]> {
  ownLibraries ??= librariesOf([realpathSync(process.execPath)]);
  return ownLibraries;
}

/**
 * Node and its libraries, which are the same in every run: by what they are told from others, and the part of the
 * initramfs with them. About 90 MB, in the cache.
 */
export async function nodeArchive(): Promise<{ key: string; file: (progress: Progress) => Promise<string> }> {
  const node = realpathSync(process.execPath);
  const files = [node, ...(await nodeLibraries())];
  const identity = files.map((file) => {
    const { size, mtimeMs } = statSync(file);
    return [file, size, mtimeMs];
  });
  const hash = createHash('sha256').update(JSON.stringify(identity)).digest('hex').slice(0, 12);
  const key = `${process.version}-${hash}-loaded`;
  const make = async (folder: string, progress: Progress) => {
    progress.onProgress?.(`packing Node ${process.version} for the machine`);
    await writing(join(folder, 'node.cpio'), async (archive) => {
      for (const [index, file] of files.entries()) {
        const data = await readFile(file);
        await archive.file(index === 0 ? '/usr/bin/node' : file, index === 0 ? loadedPart(data) : data);
      }
    });
    return { node: process.version, files };
  };
  const file = async (progress: Progress) => {
    const entry = await cacheEntry(`node/${key}`, progress, (folder) => make(folder, progress));
    return join(entry.folder, 'node.cpio');
  };
  return { key, file };
}

const PROGRAM_HEADER = 56;
const LOADED = 1;

/** A 64-bit program without what only debuggers read, which lies behind everything that is loaded. */
export function loadedPart(program: Buffer): Buffer {
  const [table, entrySize, entries] = [
    Number(program.readBigUInt64LE(0x20)),
    program.readUInt16LE(0x36),
    program.readUInt16LE(0x38),
  ];
  if (entrySize !== PROGRAM_HEADER) return program;
  const headers = Array.from({ length: entries }, (_, index) => table + index * entrySize);
  const ends = headers
    .filter((at) => program.readUInt32LE(at) === LOADED)
    .map((at) => Number(program.readBigUInt64LE(at + 8) + program.readBigUInt64LE(at + 32)));
  const part = Buffer.from(program.subarray(0, Math.max(...ends)));
  // No table of sections, and so no number of them and of their names'.
  part.writeBigUInt64LE(0n, 0x28);
  part.fill(0, 0x3c, 0x40);
  return part;
}

/** Contents of files by their absolute place in the machine. */
export type Contents = Readonly<Record<string, Buffer | string>>;

/** Reads files, what is in folders, and the libraries that Node does not bring along. */
export async function contentsOf(files: Files, progress: Progress): Promise<Contents> {
  const all = await withLibraries(expandFolders(files), progress);
  return Object.fromEntries(Object.entries(all).map(([inside, outside]) => [inside, readFileSync(outside)]));
}

/** An archive that `fill` fills. @returns bytes */
async function writing(path: string, fill: (archive: CpioWriter) => Promise<void>): Promise<number> {
  const archive = await CpioWriter.create(path);
  try {
    await fill(archive);
    return await archive.end();
  } catch (error) {
    await archive.abandon();
    throw error;
  }
}

async function addAll(archive: CpioWriter, contents: Contents): Promise<void> {
  for (const [inside, data] of Object.entries(contents)) await archive.file(inside, data);
}

/** Writes an archive of files. @returns bytes */
export async function writeArchive(path: string, contents: Contents): Promise<number> {
  return await writing(path, (archive) => addAll(archive, contents));
}

/** The part of the initramfs that the machine starts with: init, busybox, modules. */
export async function writeBase(
  path: string,
  init: string,
  modules: readonly KernelModule[],
  contents: Contents,
  progress: Progress,
): Promise<number> {
  const busybox = await staticBusybox(progress);
  return await writing(path, async (archive) => {
    for (const folder of ['dev', 'proc', 'sys', 'tmp', 'root', 'bin', 'modules', PACKAGE_FOLDER]) {
      await archive.folder(folder);
    }
    await archive.console();
    await archive.file('/init', init);
    await archive.file('/bin/busybox', await readFile(busybox));
    for (const { name, data } of modules) {
      const { module, signature } = splitSignature(data);
      await archive.file(`/modules/${name}.ko`, module);
      if (signature.length > 0) await archive.file(`/modules/${name}.signature`, signature);
    }
    await archive.file('/modules/order', modules.map((module) => `${module.name}\n`).join(''));
    await addAll(archive, contents);
  });
}

/** A busybox without shared libraries: nothing else is there yet when it starts. */
async function staticBusybox(progress: Progress): Promise<string> {
  const paths = ['/bin/busybox', '/usr/bin/busybox'];
  const installed = paths.find((path) => existsSync(path));
  if (installed && !/=>/.test((await run('ldd', [installed])).stdout)) return installed;
  return await packageFile('busybox-static', paths, progress);
}

function expandFolders(files: Files): Record<string, string> {
  const all: Record<string, string> = {};
  for (const [inside, outside] of Object.entries(files)) {
    if (!existsSync(outside)) throw new LabError('a file for the lab is missing', outside, 'check its path');
    if (!statSync(outside).isDirectory()) all[inside] = outside;
    else
      for (const name of readdirSync(outside))
        Object.assign(all, expandFolders({ [join(inside, name)]: join(outside, name) }));
  }
  return all;
}

/** Adds the shared libraries of addons and programs that Node itself does not bring along. */
async function withLibraries(
  files: Record<string, string>,
  { signal }: Progress,
): Promise<Record<string, string>> {
  const programs = Object.values(files).filter((file) => file.endsWith('.node') || isProgram(file));
  if (programs.length === 0) return files;
  const known = new Set(await nodeLibraries());
  const more = (await librariesOf(programs, signal)).filter((library) => !known.has(library));
  return { ...files, ...Object.fromEntries(more.map((library) => [library, library])) };
}

function isProgram(path: string): boolean {
  if ((statSync(path).mode & 0o111) === 0) return false;
  const file = openSync(path, 'r');
  try {
    const magic = Buffer.alloc(4);
    return readSync(file, magic) === 4 && magic.toString('latin1') === '\x7fELF';
  } finally {
    closeSync(file);
  }
}
