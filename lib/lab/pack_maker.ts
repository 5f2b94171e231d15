// SPDX-License-Identifier: Apache-2.0
// Writes a pack: ROOT PLACE FILE MODULE... A program of its own, because it needs a flag of Node's.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { SourceTextModule } from 'node:vm';
import type { PackedModule } from './pack.ts';

/** What the types of Node 20 leave out. */
interface Compiled {
  createCachedData(): Uint8Array;
}

const [root = '', place = '', file = '', ...paths] = process.argv.slice(2);
const index: PackedModule[] = [];
const parts: Uint8Array[] = [];
for (const path of paths) {
  const source = readFileSync(join(root, path));
  // It stays in the compiled code, whatever the loader says.
  const identifier = `file://${join(place, path)}`;
  // All functions at once: the machine would compile most of them anyway, and pays for it a hundredfold.
  setFlagsFromString('--no-lazy');
  const module = new SourceTextModule(source.toString(), { identifier }) as unknown as Compiled;
  // The flags under which it will run.
  setFlagsFromString('--lazy');
  setFlagsFromString('--hash-seed=0');
  const code = module.createCachedData();
  index.push([path, source.length, code.length]);
  parts.push(source, code);
}
const head = Buffer.from(JSON.stringify(index));
const length = Buffer.alloc(4);
length.writeUInt32LE(head.length);
writeFileSync(file, Buffer.concat([length, head, ...parts]));
