// SPDX-License-Identifier: Apache-2.0
// The addon under a sanitizer: a copy of the package with that addon in it, whose tests a Node runs that has the
// sanitizer's library preloaded.
import { execFile } from 'node:child_process';
import { cpSync, mkdirSync, readdirSync, readFileSync, rmSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const run = promisify(execFile);
const root = fileURLToPath(new URL('../..', import.meta.url));
const source = fileURLToPath(new URL('.', import.meta.url));
const output = join(root, 'out/native-tests');

export type Sanitizer = 'address' | 'thread';
/** A library for each, after which Node still finds the C++ exceptions of its own libstdc++. */
const LIBRARIES = {
  address: ['libasan.so', 'libubsan.so', 'libstdc++.so'],
  thread: ['libtsan.so', 'libstdc++.so'],
};

/** The folders of node.h and napi.h, as node-gyp found them. */
function includes(): string[] {
  const config = readFileSync(join(root, 'build/config.gypi'), 'utf8');
  const headers = /"nodedir": "(.*)"/.exec(config)![1]!;
  return [join(headers, 'include/node'), join(root, 'node_modules/node-addon-api')];
}

/** Builds a target of test/native; the folder it is in. */
export async function build(sanitizer: Sanitizer | 'plain', target: string): Promise<string> {
  const folder = join(output, sanitizer);
  const configure = () =>
    run('cmake', [
      '-S',
      source,
      '-B',
      folder,
      `-DNVMX_SANITIZE=${sanitizer === 'plain' ? '' : sanitizer}`,
      `-DNVMX_NODE_INCLUDES=${includes().join(';')}`,
    ]);
  try {
    await configure();
  } catch {
    // A cache from another source folder or compiler.
    rmSync(folder, { recursive: true, force: true });
    await configure();
  }
  await run('cmake', ['--build', folder, '-j', '2', '--target', target]);
  return folder;
}

/** Lays out a package around that folder's addon. */
function layOut(folder: string): string {
  const tree = join(folder, 'package');
  rmSync(tree, { recursive: true, force: true });
  mkdirSync(join(tree, 'build/Release'), { recursive: true });
  for (const part of ['lib', 'dist', 'test', 'package.json', 'tsconfig.json', 'vitest.config.ts']) {
    cpSync(join(root, part), join(tree, part), { recursive: true });
  }
  cpSync(join(folder, 'nvmx.node'), join(tree, 'build/Release/nvmx.node'));
  symlinkSync(join(root, 'node_modules'), join(tree, 'node_modules'));
  return tree;
}

async function preload(sanitizer: Sanitizer): Promise<string> {
  const paths = LIBRARIES[sanitizer].map(async (name) => {
    const { stdout } = await run('g++', [`-print-file-name=${name}`]);
    return stdout.trim();
  });
  return (await Promise.all(paths)).join(' ');
}

/** Whose code each stack of a report begins in; frames of a sanitizer and of the standard libraries are nobody's. */
function owners(report: string): ('ours' | 'other')[] {
  const stacks = report.split('\n\n').map((part) => part.split('\n').filter((line) => /^ +#\d+ /.test(line)));
  return stacks
    .filter((frames) => frames.length > 0)
    .map((frames) => {
      const first = frames.find(
        (line) => !/\(lib(asan|ubsan|tsan|c|stdc\+\+)\.so|libsanitizer|\/usr\/include\//.test(line),
      );
      return first && /nvmx\.node|native\/(kvm|binding)\/|node-addon-api/.test(first) ? 'ours' : 'other';
    });
}

/**
 * Node and its other addons are not instrumented. A race needs two accesses by this package's code; what the
 * sanitizer makes of one of Node's is guesswork. An error of memory or a leak needs one.
 */
function isOurs(report: string): boolean {
  const found = owners(report);
  if (/ThreadSanitizer: data race/.test(report)) return found[0] === 'ours' && found[1] === 'ours';
  return /Leak/.test(report) ? found.includes('ours') : found[0] === 'ours';
}

export interface Outcome {
  /** vitest's exit status and the end of what it printed. */
  status: number;
  said: string;
  /** What the sanitizer has to say of this package's code. */
  reports: string[];
}

function environment(tree: string, libraries: string, leaks: boolean): NodeJS.ProcessEnv {
  const log = `log_path=${join(tree, 'report')}`;
  const env: NodeJS.ProcessEnv = {
    ...process.env,
    LD_PRELOAD: libraries,
    ASAN_OPTIONS: `detect_leaks=${leaks ? 1 : 0}:${log}`,
    UBSAN_OPTIONS: `print_stacktrace=1:${log}`,
    // Node leaves memory behind, and its threads look like races.
    LSAN_OPTIONS: 'exitcode=0',
    TSAN_OPTIONS: `exitcode=0:${log}`,
    NVMX_ABUSE_CALLS: '10000',
  };
  for (const name of Object.keys(env)) if (/^VITEST|^TEST$|^NODE_OPTIONS$/.test(name)) delete env[name];
  return env;
}

/**
 * Runs test files of the package on the sanitized addon. Leaks are looked for in one process that leaves everything
 * to the garbage collector: listing those of Node takes longer than a test.
 */
export async function runSanitized(sanitizer: Sanitizer, args: string[]): Promise<Outcome> {
  const tree = layOut(await build(sanitizer, 'nvmx-addon'));
  const libraries = await preload(sanitizer);
  const vitest = [join(tree, 'node_modules/vitest/vitest.mjs'), 'run', '--testTimeout', '120000', ...args];
  const done = await run(process.execPath, vitest, {
    cwd: tree,
    env: environment(tree, libraries, false),
    maxBuffer: 1 << 26,
  }).catch((error) => error);
  if (sanitizer === 'address') {
    const child = ['--expose-gc', 'test/lifecycle/child.mjs', 'collected-without-close'];
    const env = environment(tree, libraries, true);
    await run(process.execPath, child, { cwd: tree, env });
  }
  const reports = readdirSync(tree)
    .filter((name) => name.startsWith('report.'))
    .flatMap((name) => readFileSync(join(tree, name), 'utf8').split(/^=+$|^(?=Direct leak|Indirect leak)/m))
    .filter(isOurs);
  const said = `${done.stdout}${done.stderr}`.trim().split('\n').slice(-60).join('\n');
  return { status: done.code ?? 0, said, reports };
}
