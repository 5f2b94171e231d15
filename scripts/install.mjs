// SPDX-License-Identifier: Apache-2.0
// The install script of the package: nothing where a shipped addon loads, else a build from the shipped sources.
// npm install --build-from-source builds in any case. In a clone scripts/build.mjs does all of it.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { nodeHeaders, ROOT, run, script } from './run.mjs';

const SHIPPED = join(ROOT, 'prebuilds/linux-x64');

/** Why the shipped addon cannot be used, or undefined. */
function whyNotShipped() {
  if (process.env.npm_config_build_from_source === 'true') return '--build-from-source was asked for';
  try {
    createRequire(import.meta.url)(join(SHIPPED, 'node.napi.node'));
    return undefined;
  } catch (error) {
    return error.message.split('\n')[0];
  }
}

function need(tools, packages, what) {
  const missing = tools.filter((tool) => spawnSync(tool, ['--version'], { stdio: 'ignore' }).error);
  if (missing.length === 0) return;
  throw new Error(
    `${what} must be built, which needs ${missing.join(', ')}: apt-get install ${packages.join(' ')}`,
  );
}

function buildAddon(why) {
  process.stderr.write(`nvmx: building the addon from source: ${why}\n`);
  need(['g++', 'make', 'python3'], ['g++', 'make', 'python3'], 'the addon');
  // npm names the node-gyp it brings.
  const gyp = process.env.npm_config_node_gyp;
  const [command, first] = gyp ? [process.execPath, [gyp]] : ['node-gyp', []];
  run(command, [...first, 'rebuild', '--release', '-j', '2'], 'node-gyp', nodeHeaders());
}

function buildImages() {
  process.stderr.write('nvmx: building the guest images from source: none are shipped\n');
  need(['gcc', 'make', 'cmake'], ['gcc', 'make', 'cmake'], 'the guest images');
  run('cmake', ['-S', '.', '-B', 'out/cmake'], 'cmake');
  run('cmake', ['--build', 'out/cmake'], 'the build of the guest images');
}

await script(() => {
  if (existsSync(join(ROOT, 'tsconfig.json'))) return;
  const why = whyNotShipped();
  if (why !== undefined) buildAddon(why);
  if (!existsSync(join(SHIPPED, 'l1.elf')) || !existsSync(join(SHIPPED, 'l2.elf'))) buildImages();
});
