// SPDX-License-Identifier: Apache-2.0
// npm run check: types, Biome, clang-format, publint, attw, the layer check. npm run format: rewrites what it can.
import { mkdirSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { ROOT, run, sayer, script } from './run.mjs';

const bin = (name) => join(ROOT, 'node_modules/.bin', name);
const write = process.argv.includes('--write');

const sources = ['native', 'guests', 'test/native'].flatMap((folder) =>
  readdirSync(join(ROOT, folder), { recursive: true })
    .filter((name) => /\.(cc|h|c)$/.test(name))
    .map((name) => join(folder, name)),
);

/** What attw reads: the package without its prebuilds, which say nothing of types. */
function tarball() {
  mkdirSync(join(ROOT, 'out'), { recursive: true });
  run('npm', ['pack', '--ignore-scripts', '--pack-destination', 'out'], 'npm pack');
  const { name, version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'));
  return join('out', `${name}-${version}.tgz`);
}

const steps = write
  ? [
      ['Biome', 'biome', ['check', '--write', '.']],
      ['clang-format', 'clang-format', ['-i', ...sources]],
    ]
  : [
      ['types', 'tsc', ['-p', 'tsconfig.json', '--noEmit']],
      ['types of tests', 'tsc', ['-p', 'test/tsconfig.json', '--noEmit']],
      ['Biome', 'biome', ['check', '--error-on-warnings', '.']],
      ['clang-format', 'clang-format', ['--dry-run', '--Werror', ...sources]],
      ['publint', 'publint', ['--strict']],
      ['attw', 'attw', ['--profile', 'esm-only', '--format', 'ascii', tarball()]],
      ['layers', 'vitest', ['run', 'test/unit/layers.test.ts']],
    ];

const say = sayer();
await script(() => {
  for (const [what, program, args] of steps) {
    say(what);
    run(bin(program), args, what);
  }
});
