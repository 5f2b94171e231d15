// SPDX-License-Identifier: Apache-2.0
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
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
import type { Readable } from 'node:stream';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type PackedModule, packedArguments, packModules, waitingArguments } from '../../lib/lab/pack.ts';

const root = mkdtempSync(join(tmpdir(), 'nvmx-pack-'));
const work = mkdtempSync(join(tmpdir(), 'nvmx-pack-work-'));
const cache = process.env['NVMX_CACHE'];
process.env['NVMX_CACHE'] = work;
const repository = new URL('../..', import.meta.url).pathname;
afterAll(() => {
  if (cache === undefined) delete process.env['NVMX_CACHE'];
  else process.env['NVMX_CACHE'] = cache;
  for (const folder of [root, work]) rmSync(folder, { recursive: true, force: true });
});

function sources(): void {
  mkdirSync(join(root, 'dist/kvm/sub'), { recursive: true });
  if (!existsSync(join(root, 'dist/lab'))) symlinkSync(join(repository, 'dist/lab'), join(root, 'dist/lab'));
  const files = {
    'package.json': '{ "type": "module" }',
    'dist/kvm/entry.js': `import { sep } from 'node:path';
      import fs, * as all from 'node:fs';
      import { later, twice as double } from './sub/other.js';
      console.log(process.argv.slice(1).join(' '), sep, fs.readFileSync === all.readFileSync, double(21));
      console.log(import.meta.url, import.meta.dirname);
      console.log(await later());
      function uncalled() { return 'never in a lazy one'; }
      throw new Error('the end');`,
    'dist/kvm/sub/other.js': `import './cycle.js';
      export const twice = (n) => 2 * n;
      import { EOL } from 'node:os';
      export const later = async () => EOL.length;`,
    'dist/kvm/sub/cycle.js': `import { twice } from './other.js'; export const four = () => twice(2);`,
  };
  for (const [path, text] of Object.entries(files)) writeFileSync(join(root, path), text);
}

const start = () =>
  spawnSync(process.execPath, packedArguments(root, 'dist/kvm/entry.js', ['a', 'b c']), { encoding: 'utf8' });

const seen = [
  `${root}/dist/kvm/entry.js a b c / true 42`,
  `file://${root}/dist/kvm/entry.js ${root}/dist/kvm`,
  '1',
  '',
].join('\n');

describe('a pack of modules', () => {
  let files: Record<string, Buffer | string>;

  beforeAll(async () => {
    sources();
    files = (await packModules(root, root, {})) ?? {};
    for (const [name, data] of Object.entries(files)) writeFileSync(join(root, name), data);
    // What runs from now on comes out of the pack.
    for (const path of ['dist/kvm/entry.js', 'dist/kvm/sub/other.js', 'dist/kvm/sub/cycle.js'])
      rmSync(join(root, path));
  });

  test('runs as the modules would: arguments, imports, import.meta, top-level await, an error of its own', () => {
    const done = start();
    expect(done.stdout).toBe(seen);
    expect(done.stderr).toContain('Error: the end');
    expect(done.stderr).toContain(`${root}/dist/kvm/entry.js:8`);
    expect(done.status).toBe(1);
  });

  test('is the same bytes each time', async () => {
    sources();
    expect(await packModules(root, root, {})).toEqual(files);
  });

  test('a program that is not in it is a file, and may import what is', () => {
    writeFileSync(
      join(root, 'dist/kvm/own.js'),
      `import { twice } from './sub/other.js'; console.log(twice(4), process.env.NVMX_START);`,
    );
    const done = spawnSync(process.execPath, packedArguments(root, 'dist/kvm/own.js', []), {
      encoding: 'utf8',
    });
    expect(done.stdout).toBe(`8 ${join(root, 'start.cjs')}\n`);
  });

  test('waits for a job with all of it loaded', async () => {
    writeFileSync(join(root, 'dist/kvm/ready.js'), `console.log('loaded');`);
    const [entry, ready] = ['dist/kvm/own.js', 'dist/kvm/ready.js'];
    writeFileSync(
      join(root, entry),
      `import './ready.js';
       console.log(process.argv.slice(1).join(' '), process.env.WORD, process.env.NVMX_WAIT);`,
    );
    const pipe = join(work, 'job');
    spawnSync('mkfifo', [pipe]);
    const child = spawn(process.execPath, waitingArguments(root, [ready]), {
      env: { ...process.env, NVMX_WAIT: pipe },
      stdio: ['ignore', 'pipe', 'inherit', 'pipe'],
    });
    let said = '';
    child.stdout?.on('data', (chunk: Buffer) => {
      said += chunk.toString();
    });
    const [line] = (await once(child.stdio[3] as Readable, 'data')) as [Buffer];
    expect(line.toString()).toBe('\n');
    await expect.poll(() => said).toBe('loaded\n');
    writeFileSync(pipe, JSON.stringify({ argv: [join(root, entry), 'a', 'b c'], env: { WORD: 'w' } }));
    expect(await once(child, 'close')).toEqual([0, null]);
    expect(said).toBe(`loaded\n${join(root, entry)} a b c w undefined\n`);
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

  test('of modules that Node cannot compile is none', async () => {
    writeFileSync(join(root, 'dist/kvm/wrong.js'), 'import {');
    expect(await packModules(root, root, {})).toBeUndefined();
  });
});
