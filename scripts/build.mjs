// SPDX-License-Identifier: Apache-2.0
// Builds the addon (node-gyp), the guest images (cmake-js) and the TypeScript (tsc), each only when its
// sources changed, or somebody changed what was made of them. As a program: node scripts/build.mjs [--prebuild [FOLDER]]
import { createHash } from 'node:crypto';
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { nodeHeaders, ROOT, run, sayer, script } from './run.mjs';

const bin = (name) => join(ROOT, 'node_modules/.bin', name);

const PARTS = [
  {
    name: 'addon',
    sources: ['binding.gyp', 'native'],
    made: 'build/Release/nvmx.node',
    make: () =>
      run(bin('node-gyp'), ['rebuild', '--release', '-j', '2'], 'building the addon', nodeHeaders()),
  },
  {
    name: 'guest images',
    sources: ['CMakeLists.txt', 'guests'],
    made: 'out/cmake/guests/l1.elf',
    make: () =>
      run(bin('cmake-js'), ['compile', '--out', 'out/cmake'], 'building the guest images', nodeHeaders()),
  },
  {
    name: 'TypeScript',
    sources: ['tsconfig.json', 'lib'],
    made: 'dist',
    make: () => {
      rmSync(join(ROOT, 'dist'), { recursive: true, force: true });
      run(bin('tsc'), ['-p', 'tsconfig.json'], 'compiling TypeScript');
    },
  },
];

export function build(say) {
  for (const part of PARTS) {
    const stamp = join(ROOT, 'out/stamps', part.name.replace(/\W/g, '-'));
    const state = () =>
      existsSync(join(ROOT, part.made)) && digest(['package-lock.json', ...part.sources, part.made]);
    if (existsSync(stamp) && readFileSync(stamp, 'utf8') === state()) continue;
    say(`building the ${part.name}`);
    part.make();
    mkdirSync(dirname(stamp), { recursive: true });
    writeFileSync(stamp, state());
  }
}

/**
 * The stripped addon and the guest images, as they go into the package; into prebuilds/ unless told otherwise. Made
 * beside the build, which prebuildify would move away.
 */
export function prebuild(say, folder = join(ROOT, 'prebuilds')) {
  build(say);
  say('making prebuilds');
  const work = join(ROOT, 'out/prebuild');
  rmSync(work, { recursive: true, force: true });
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(work, { recursive: true });
  for (const part of ['package.json', 'binding.gyp', 'native']) {
    cpSync(join(ROOT, part), join(work, part), { recursive: true });
  }
  symlinkSync(join(ROOT, 'node_modules'), join(work, 'node_modules'));
  run(
    bin('prebuildify'),
    [
      '--napi',
      '--strip',
      '--name',
      'node.napi',
      '--artifacts',
      join(ROOT, 'out/cmake/guests'),
      '--out',
      dirname(folder),
    ],
    'prebuildify',
    // Its own temporary folder stays behind elsewhere.
    { ...nodeHeaders(), JOBS: 'max', TMPDIR: work },
    work,
  );
  rmSync(work, { recursive: true });
}

function digest(paths) {
  const hash = createHash('sha256').update(process.version);
  for (const path of paths.flatMap((path) => files(path))) {
    hash
      .update(path)
      .update('\0')
      .update(readFileSync(join(ROOT, path)))
      .update('\0');
  }
  return hash.digest('hex');
}

function files(path) {
  const full = join(ROOT, path);
  if (!existsSync(full)) throw new Error(`${path} is missing from this copy of the project`);
  const entries = readdirSync(dirname(full), { withFileTypes: true });
  const entry = entries.find((one) => join(dirname(full), one.name) === full);
  if (!entry?.isDirectory()) return [path];
  return readdirSync(full, { withFileTypes: true, recursive: true })
    .filter((one) => one.isFile())
    .map((one) => join(one.parentPath ?? one.path, one.name).slice(ROOT.length + 1))
    .sort();
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  const [what, folder] = process.argv.slice(2);
  await script(() => (what === '--prebuild' ? prebuild(sayer(), folder) : build(sayer())));
}
