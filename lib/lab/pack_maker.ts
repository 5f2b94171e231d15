// SPDX-License-Identifier: Apache-2.0
// Writes a pack: ROOT ENTRY PLACE FILE [ENTRY'S TEXT]. A program of its own, because it needs a flag of Node's.
import { readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { SourceTextModule } from 'node:vm';
import type { PackedModule } from './pack.ts';

const [root = '', entry = '', place = '', file = '', text = join(root, entry)] = process.argv.slice(2);
const index = new Map<string, PackedModule>();
const parts: Uint8Array[] = [];

/** What the types of Node 20 leave out. */
interface Compiled {
  createCachedData(): Uint8Array;
  readonly dependencySpecifiers: readonly string[];
}

function add(path: string): void {
  if (index.has(path)) return;
  const source = readFileSync(path === entry ? text : join(root, path));
  // It stays in the compiled code, whatever the loader says.
  const identifier = `file://${join(place, path)}`;
  // All functions at once: the machine would compile most of them anyway, and pays for it a hundredfold.
  setFlagsFromString('--no-lazy');
  const module = new SourceTextModule(source.toString(), { identifier }) as unknown as Compiled;
  // The flags under which it will run.
  setFlagsFromString('--lazy');
  setFlagsFromString('--hash-seed=0');
  const code = module.createCachedData();
  const imports = module.dependencySpecifiers.map((name) => [
    name,
    name.startsWith('.') ? join(dirname(path), name) : name,
  ]);
  index.set(path, [path, source.length, code.length, Object.fromEntries(imports)]);
  parts.push(source, code);
  for (const [name, target] of imports) if (name!.startsWith('.')) add(target!);
}

add(entry);
const head = Buffer.from(JSON.stringify([...index.values()]));
const length = Buffer.alloc(4);
length.writeUInt32LE(head.length);
writeFileSync(file, Buffer.concat([length, head, ...parts]));
