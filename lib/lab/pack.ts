// SPDX-License-Identifier: Apache-2.0
import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { cacheEntry, keepNewest, listFiles, type Progress } from './cache.ts';
import { run } from './process.ts';

/**
 * Node spends most of a short run in the machine on finding, reading and compiling a hundred modules. A pack holds
 * the package's modules one after the other, each with V8's compiled code of it, which is the same in the machine
 * because the same Node runs there. Compiled code cannot import() anything: V8 forgets who asks.
 *
 * Layout: u32 length of the index, the index (JSON, {@link PackedModule}[]), then source and code of each module.
 */
export type PackedModule = [
  /** Relative to the package's folder. */
  path: string,
  sourceLength: number,
  codeLength: number,
];

/** The modules are linked by hand, which is an experimental part of Node's. */
const PACK_FLAGS: readonly string[] = ['--experimental-vm-modules', '--no-warnings'];
/**
 * The same sources give the same pack, byte for byte. Only for the maker: V8 takes no code that was compiled under
 * other flags, and with a flag of V8's the machine's Node would compile its own modules again.
 */
const MAKER_FLAGS: readonly string[] = [...PACK_FLAGS, '--hash-seed=1'];

/** Folders under dist with what runs in the machine. */
const FOLDERS: readonly string[] = ['kvm', 'guest', 'probe', 'selftest', 'bench'];
const LOADER_NAME = 'start.cjs';
const PACK_NAME = 'start.pack';
const KEPT = 4;

/** Arguments for Node that run `entry` from the pack, in a folder with the files of packModules. */
export function packedArguments(folder: string, entry: string, args: readonly string[]): string[] {
  return [...PACK_FLAGS, join(folder, LOADER_NAME), join(folder, entry), ...args];
}

/**
 * The same for a Node that loads `modules` and then waits for a job: it writes a line to file 3 when it is through, and reads
 * a {@link WaitingJob} from the file that NVMX_WAIT names.
 */
export function waitingArguments(folder: string, modules: readonly string[]): string[] {
  return [...PACK_FLAGS, join(folder, LOADER_NAME), ...modules];
}

export interface WaitingJob {
  /** The entry and its arguments, as in packedArguments. */
  readonly argv: readonly string[];
  readonly env: Readonly<Record<string, string>>;
}

/**
 * @param root the package's folder, with dist
 * @param place the package's folder where it runs
 * @returns files for that folder by their name, from the cache or made now; undefined when this Node cannot
 */
export async function packModules(
  root: string,
  place: string,
  progress: Progress,
): Promise<Record<string, Buffer | string> | undefined> {
  const modules = (await Promise.all(FOLDERS.map((name) => modulesIn(join(root, 'dist', name))))).flat();
  const maker = join(root, 'dist/lab/pack_maker.js');
  const hash = createHash('sha256').update(JSON.stringify([process.version, process.arch, place]));
  for (const file of [maker, ...modules])
    hash.update(`\0${relative(root, file)}\0`).update(readFileSync(file));
  const key = hash.digest('hex').slice(0, 12);
  try {
    const { folder } = await cacheEntry(`pack/${process.version}-${key}`, progress, async (made) => {
      const list = modules.map((file) => relative(root, file));
      const args = [maker, root, place, join(made, PACK_NAME), ...list];
      const done = await run(process.execPath, [...MAKER_FLAGS, ...args], { signal: progress.signal });
      if (done.status !== 0) throw new UnpackableError();
      return { modules: list.length };
    });
    await keepNewest('pack', KEPT);
    return { [PACK_NAME]: readFileSync(join(folder, PACK_NAME)), [LOADER_NAME]: LOADER };
  } catch (error) {
    if (error instanceof UnpackableError) return undefined;
    throw error;
  }
}

class UnpackableError extends Error {}

async function modulesIn(folder: string): Promise<string[]> {
  return existsSync(folder) ? (await listFiles(folder)).filter((file) => file.endsWith('.js')) : [];
}

/**
 * CommonJS, so that Node's own loader of modules is not started. Code that V8 does not take is compiled again; a
 * module that is not in the pack is a file.
 */
const LOADER = `'use strict';
const { closeSync, readFileSync, writeSync } = require('node:fs');
const { dirname, join } = require('node:path');
const { SourceTextModule, SyntheticModule } = require('node:vm');
const pack = readFileSync(join(__dirname, '${PACK_NAME}'));
let at = 4 + pack.readUInt32LE(0);
const index = new Map();
for (const [path, source, code] of JSON.parse(pack.toString('utf8', 4, at))) {
  index.set(path, { source: [at, at + source], code: [at + source, at + source + code] });
  at += source + code;
}
const made = new Map();
function builtin(name) {
  const exports = require(name);
  return new SyntheticModule([...Object.keys(exports).filter((key) => key !== 'default'), 'default'], function () {
    for (const key of Object.keys(exports)) this.setExport(key, exports[key]);
    this.setExport('default', exports);
  });
}
function own(path) {
  const filename = join(__dirname, path);
  const packed = index.get(path);
  const text = packed ? pack.toString('utf8', ...packed.source) : readFileSync(filename, 'utf8');
  const options = {
    identifier: 'file://' + filename,
    initializeImportMeta: (meta) => Object.assign(meta, { url: 'file://' + filename, filename, dirname: dirname(filename) }),
  };
  let module;
  try {
    module = new SourceTextModule(text, { ...options, cachedData: packed && pack.subarray(...packed.code) });
  } catch {
    module = new SourceTextModule(text, options);
  }
  module.path = path;
  return module;
}
function get(path, make) {
  let module = made.get(path);
  if (module === undefined) made.set(path, (module = make(path)));
  return module;
}
const imported = (specifier, from) =>
  specifier.startsWith('.') ? get(join(dirname(from.path), specifier), own) : get(specifier, builtin);
async function load(path) {
  const module = get(path, own);
  if (module.status === 'unlinked') await module.link(imported);
  await module.evaluate();
}
async function start() {
  process.argv.splice(1, 1);
  const { NVMX_WAIT: pipe } = process.env;
  if (pipe !== undefined) {
    for (const path of process.argv.slice(1)) await load(path);
    writeSync(3, '\\n');
    closeSync(3);
    const { argv, env } = JSON.parse(readFileSync(pipe, 'utf8'));
    delete process.env.NVMX_WAIT;
    Object.assign(process.env, env);
    process.argv = [process.argv[0], ...argv];
  }
  // For a process that another program of the package starts.
  process.env.NVMX_START = __filename;
  await load(process.argv[1].slice(__dirname.length + 1));
}
start();
`;
