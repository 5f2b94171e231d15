// SPDX-License-Identifier: Apache-2.0
import { spawnSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type PackedModule, packedArguments, packModules } from '../../lib/lab/pack.ts';

const root = mkdtempSync(join(tmpdir(), 'nvmx-pack-'));
const work = mkdtempSync(join(tmpdir(), 'nvmx-pack-work-'));
const repository = new URL('../..', import.meta.url).pathname;
afterAll(() => {
  for (const folder of [root, work]) rmSync(folder, { recursive: true, force: true });
});

function sources(): void {
  mkdirSync(join(root, 'dist/sub'), { recursive: true });
  if (!existsSync(join(root, 'dist/lab'))) symlinkSync(join(repository, 'dist/lab'), join(root, 'dist/lab'));
  const files = {
    'package.json': '{ "type": "module" }',
    'dist/entry.js': `import { sep } from 'node:path';
      import fs, * as all from 'node:fs';
      import { later, twice as double } from './sub/other.js';
      console.log(process.argv.slice(1).join(' '), sep, fs.readFileSync === all.readFileSync, double(21));
      console.log(import.meta.url, import.meta.dirname);
      console.log(await later());
      function uncalled() { return 'never in a lazy one'; }
      throw new Error('the end');`,
    'dist/sub/other.js': `import './cycle.js';
      export const twice = (n) => 2 * n;
      import { EOL } from 'node:os';
      export const later = async () => EOL.length;`,
    'dist/sub/cycle.js': `import { twice } from './other.js'; export const four = () => twice(2);`,
  };
  for (const [path, text] of Object.entries(files)) writeFileSync(join(root, path), text);
}

const start = () =>
  spawnSync(process.execPath, packedArguments(root, 'dist/entry.js', ['a', 'b c']), { encoding: 'utf8' });

const seen = [
  `${root}/dist/entry.js a b c / true 42`,
  `file://${root}/dist/entry.js ${root}/dist`,
  '1',
  '',
].join('\n');

describe('a pack of modules', () => {
  let files: Record<string, Buffer | string>;

  beforeAll(async () => {
    sources();
    files = (await packModules(root, { entry: 'dist/entry.js' }, root, work, {})) ?? {};
    for (const [name, data] of Object.entries(files)) writeFileSync(join(root, name), data);
    // What runs from now on comes out of the pack.
    for (const path of ['dist/entry.js', 'dist/sub/other.js', 'dist/sub/cycle.js']) rmSync(join(root, path));
  });

  test('runs as the modules would: arguments, imports, import.meta, top-level await, an error of its own', () => {
    const done = start();
    expect(done.stdout).toBe(seen);
    expect(done.stderr).toContain('Error: the end');
    expect(done.stderr).toContain(`${root}/dist/entry.js:8`);
    expect(done.status).toBe(1);
  });

  test('is the same bytes each time', async () => {
    sources();
    expect(await packModules(root, { entry: 'dist/entry.js' }, root, work, {})).toEqual(files);
  });

  test('may begin with a program that is no file', async () => {
    sources();
    const program = `import { twice } from './sub/other.js'; console.log(twice(4));`;
    const own = await packModules(root, { entry: 'dist/own.js', program }, root, work, {});
    for (const [name, data] of Object.entries(own!)) writeFileSync(join(root, name), data);
    const done = spawnSync(process.execPath, packedArguments(root, 'dist/own.js', []), { encoding: 'utf8' });
    for (const [name, data] of Object.entries(files)) writeFileSync(join(root, name), data);
    expect(done.stdout).toBe('8\n');
  });

  test('holds the code of functions that nobody has called yet', () => {
    const pack = Object.values(files).find((one) => typeof one !== 'string')!;
    const start = 4 + pack.readUInt32LE(0);
    const [, source, code] = (JSON.parse(pack.toString('utf8', 4, start)) as PackedModule[])[0]!;
    expect(pack.subarray(start + source, start + source + code).includes('never in a lazy one')).toBe(true);
  });

  test('compiles again what V8 does not take', () => {
    const [name, data] = Object.entries(files).find(
      (one): one is [string, Buffer] => typeof one[1] !== 'string',
    )!;
    const damaged = Buffer.from(data);
    const index = 4 + damaged.readUInt32LE(0);
    const [, source, code] = JSON.parse(data.toString('utf8', 4, index))[0] as [string, number, number];
    damaged.fill(0xff, index + source, index + source + code);
    writeFileSync(join(root, name), damaged);
    expect(start().stdout).toBe(seen);
  });

  test('cannot import() later, and nothing of ours that is ever packed does', () => {
    const lib = join(repository, 'lib');
    const files = readdirSync(lib, { recursive: true, encoding: 'utf8' }).filter((name) =>
      name.endsWith('.ts'),
    );
    expect(files.length).toBeGreaterThan(100);
    expect(files.filter((name) => /\bimport\(/.test(readFileSync(join(lib, name), 'utf8')))).toEqual([
      'cli/main.ts',
      'lab/pack.ts',
    ]);
  });

  test('of a program that is not there is none', async () => {
    expect(await packModules(root, { entry: 'dist/none.js' }, root, work, {})).toBeUndefined();
  });
});
