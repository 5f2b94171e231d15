// SPDX-License-Identifier: Apache-2.0
import { execFile } from 'node:child_process';
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { release, tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { whyNoKvm } from '../kvm/machine.ts';

const run = promisify(execFile);
const root = fileURLToPath(new URL('../..', import.meta.url));
const addon = 'prebuilds/linux-x64/node.napi.node';

describe('the packed package', () => {
  let folder: string;
  /** What npm pack would see: the files of the package and fresh prebuilds. */
  let stage: string;

  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), 'nvmx-package-'));
    stage = join(folder, 'stage');
    const { files } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
    for (const name of [...files, 'package.json', 'README.md', 'LICENSE']) {
      if (name !== 'prebuilds') cpSync(join(root, name), join(stage, name), { recursive: true });
    }
    await run(process.execPath, ['scripts/build.mjs', '--prebuild', join(stage, 'prebuilds')], { cwd: root });
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  async function pack(name: string): Promise<{ tarball: string; paths: string[] }> {
    const target = join(folder, name);
    mkdirSync(target);
    const args = ['pack', '--json', '--ignore-scripts', '--pack-destination', target];
    const { stdout } = await run('npm', args, { cwd: stage });
    const [{ filename, files }] = JSON.parse(stdout);
    return {
      tarball: join(target, filename),
      paths: (files as { path: string }[]).map(({ path }) => path).sort(),
    };
  }

  /** A PATH with nothing but Node, npm and a shell. */
  function bareEnvironment(): NodeJS.ProcessEnv {
    const bin = join(folder, 'bin');
    if (!existsSync(bin)) {
      mkdirSync(bin);
      symlinkSync(process.execPath, join(bin, 'node'));
      symlinkSync('/bin/sh', join(bin, 'sh'));
      const npm = process.env['PATH']!.split(delimiter)
        .map((part) => join(part, 'npm'))
        .find(existsSync)!;
      writeFileSync(join(bin, 'npm'), `#!/bin/sh\nexec "${npm}" "$@"\n`, { mode: 0o755 });
    }
    return { ...process.env, PATH: bin, CC: undefined, CXX: undefined };
  }

  async function install(tarball: string, options: string[], env: NodeJS.ProcessEnv): Promise<string> {
    const project = mkdtempSync(join(folder, 'project-'));
    const args = ['install', '--prefer-offline', '--no-audit', '--no-fund', '--foreground-scripts'];
    await run('npm', [...args, ...options, tarball], { cwd: project, env });
    return project;
  }

  async function probe(project: string, env: NodeJS.ProcessEnv) {
    const { stdout } = await run(join(project, 'node_modules/.bin/nvmx'), ['probe', '--json'], { env });
    return JSON.parse(stdout);
  }

  /** Loads the addon and both guest images of the installed package; the file that became the addon. */
  async function loadAll(project: string, env: NodeJS.ProcessEnv): Promise<string> {
    const source = `
      import { readFileSync } from 'node:fs';
      import { timestamp } from 'nvmx';
      import { loadImage } from './node_modules/nvmx/dist/guest/elf.js';
      loadImage('l1.elf'), loadImage('l2.elf'), timestamp();
      console.log(/\\S+\\.node$/m.exec(readFileSync('/proc/self/maps', 'utf8'))[0]);`;
    const args = ['--input-type=module', '-e', source];
    const { stdout } = await run(process.execPath, args, { cwd: project, env });
    return stdout.trim().slice(join(project, 'node_modules/nvmx/').length);
  }

  test('installs and probes where there is no compiler, install scripts on or off', {
    timeout: 120_000,
  }, async () => {
    const { tarball, paths } = await pack('shipped');
    expect(paths.filter((path) => path.startsWith('prebuilds/'))).toEqual([
      'prebuilds/linux-x64/l1.elf',
      'prebuilds/linux-x64/l2.elf',
      addon,
    ]);
    expect(paths.filter((path) => !/^(dist|lib|native|guests|scripts|prebuilds)\//.test(path))).toEqual([
      'CHANGELOG.md',
      'CMakeLists.txt',
      'LICENSE',
      'README.md',
      'binding.gyp',
      'package.json',
    ]);
    const env = bareEnvironment();
    for (const tool of ['gcc', 'g++', 'cc', 'make', 'cmake', 'python3']) {
      await expect(run(tool, ['--version'], { env })).rejects.toThrow('ENOENT');
    }
    for (const options of [[], ['--ignore-scripts']]) {
      const project = await install(tarball, options, env);
      expect(await loadAll(project, env)).toBe(addon);
      const answer = await probe(project, env);
      expect(answer.kernel.release).toBe(release());
      expect(answer.kvm.apiVersion).toBe(whyNoKvm() === undefined ? 12 : undefined);
    }
  });

  test('is built from source at installation where no prebuild fits', { timeout: 400_000 }, async ({
    skip,
  }) => {
    for (const tool of ['g++', 'make', 'cmake', 'python3']) {
      await run(tool, ['--version']).catch(() => skip(`${tool} is not installed`));
    }
    // e_machine: this addon is for another processor. And no images at all.
    const shipped = readFileSync(join(stage, addon));
    const foreign = Buffer.from(shipped);
    foreign.writeUInt16LE(183, 18);
    writeFileSync(join(stage, addon), foreign);
    for (const image of ['l1.elf', 'l2.elf']) rmSync(join(stage, 'prebuilds/linux-x64', image));
    const { tarball } = await pack('foreign');
    const unbuilt = await install(tarball, ['--ignore-scripts'], process.env);
    await expect(loadAll(unbuilt, process.env)).rejects.toThrow(/l1\.elf is not built/);
    const project = await install(tarball, [], { ...process.env, CXXFLAGS: '-O0' });
    expect(await loadAll(project, process.env)).toBe('build/Release/nvmx.node');
    expect((await probe(project, process.env)).kernel.release).toBe(release());
  });

  test('without a compiler and without a fitting prebuild npm says what to install', {
    timeout: 60_000,
  }, async () => {
    rmSync(join(stage, 'prebuilds'), { recursive: true });
    const { tarball } = await pack('nothing');
    const failed = install(tarball, [], bareEnvironment());
    await expect(failed).rejects.toThrow(
      'nvmx: the addon must be built, which needs g++, make, python3: apt-get install g++ make python3',
    );
  });
});
