// SPDX-License-Identifier: Apache-2.0
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Progress } from './cache.ts';
import { run } from './process.ts';

/**
 * Node spends most of a short run in the machine on finding, reading and compiling a hundred modules. A pack holds a
 * program's modules one after the other, each with what it imports and V8's compiled code of it, which is the same
 * in the machine because the same Node runs there. Compiled code cannot import() anything: V8 forgets who asks.
 *
 * Layout: u32 length of the index, the index (JSON, {@link PackedModule}[]), then source and code of each module.
 */
export type PackedModule = [
  /** Relative to the package's folder. */
  path: string,
  sourceLength: number,
  codeLength: number,
  /** By specifier: the module's path, or a module of Node's. */
  imports: Record<string, string>,
];

/** The modules are linked by hand, which is an experimental part of Node's. */
const PACK_FLAGS: readonly string[] = ['--experimental-vm-modules', '--no-warnings'];
/**
 * The same sources give the same pack, byte for byte. Only for the maker: V8 takes no code that was compiled under
 * other flags, and with a flag of V8's the machine's Node would compile its own modules again.
 */
const MAKER_FLAGS: readonly string[] = [...PACK_FLAGS, '--hash-seed=1'];

const LOADER_NAME = 'start.cjs';
const PACK_NAME = 'start.pack';

/** Arguments for Node that run `entry` from its pack, in a folder with the files of packModules. */
export function packedArguments(folder: string, entry: string, args: readonly string[]): string[] {
  return [...PACK_FLAGS, join(folder, LOADER_NAME), join(folder, entry), ...args];
}

/**
 * @param root the package's folder, with dist
 * @param entry program in it, such as dist/probe/agent.js
 * @param program its text, when it is no file
 * @param place the package's folder where it runs
 * @param folder where files may be written meanwhile
 * @returns what packedArguments needs, by name; undefined when this Node cannot make a pack
 */
export async function packModules(
  root: string,
  { entry, program }: { readonly entry: string; readonly program?: string | undefined },
  place: string,
  folder: string,
  { signal }: Progress,
): Promise<Record<string, Buffer | string> | undefined> {
  const maker = join(root, 'dist/lab/pack_maker.js');
  const file = join(folder, PACK_NAME);
  const text = join(folder, 'program.js');
  if (program !== undefined) await writeFile(text, program);
  const args = [maker, root, entry, place, file, ...(program === undefined ? [] : [text])];
  const made = await run(process.execPath, [...MAKER_FLAGS, ...args], { signal });
  return made.status === 0 ? { [PACK_NAME]: await readFile(file), [LOADER_NAME]: LOADER } : undefined;
}

/** CommonJS, so that Node's own loader of modules is not started. Code that V8 does not take is compiled again. */
const LOADER = `'use strict';
const { readFileSync } = require('node:fs');
const { dirname, join } = require('node:path');
const { SourceTextModule, SyntheticModule } = require('node:vm');
const pack = readFileSync(join(__dirname, '${PACK_NAME}'));
let at = 4 + pack.readUInt32LE(0);
const index = new Map();
for (const [path, source, code, imports] of JSON.parse(pack.toString('utf8', 4, at))) {
  index.set(path, { source: [at, at + source], code: [at + source, at + source + code], imports });
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
function own(path, { source, code, imports }) {
  const filename = join(__dirname, path);
  const text = pack.toString('utf8', ...source);
  const options = {
    identifier: 'file://' + filename,
    initializeImportMeta: (meta) => Object.assign(meta, { url: 'file://' + filename, filename, dirname: dirname(filename) }),
  };
  let module;
  try {
    module = new SourceTextModule(text, { ...options, cachedData: pack.subarray(...code) });
  } catch {
    module = new SourceTextModule(text, options);
  }
  module.imports = imports;
  return module;
}
function get(path) {
  let module = made.get(path);
  if (module === undefined) made.set(path, (module = index.has(path) ? own(path, index.get(path)) : builtin(path)));
  return module;
}
async function load(path) {
  const module = get(path);
  if (module.status === 'unlinked') await module.link((specifier, from) => get(from.imports[specifier]));
  await module.evaluate();
  return module.namespace;
}
// For a process that another program of the package starts.
process.env.NVMX_START = __filename;
process.argv.splice(1, 1);
load(process.argv[1].slice(__dirname.length + 1));
`;
