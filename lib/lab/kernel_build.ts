// SPDX-License-Identifier: Apache-2.0
import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { copyFile, mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { basename, join } from 'node:path';
import { lastWords } from './apt.ts';
import { acquireLock, makeCacheFolder, type Progress, replaceEntry } from './cache.ts';
import { LabError } from './errors.ts';
import {
  BTF_CONFIG,
  checkRequired,
  type KernelConfig,
  LAB_CONFIG,
  mergeConfigs,
  parseConfig,
  renderConfig,
  unmetOptions,
} from './kernel_config.ts';
import { type BuiltKernel, builtEntryName, checkKernelName, findBuiltKernel, IMAGE } from './kernel_store.ts';
import { checkBuildTools } from './kernel_tools.ts';
import { type KernelTree, locateTree, openTree, patchTree } from './kernel_tree.ts';
import { readLinuxImage } from './linux_image.ts';
import { type Patch, readPatches } from './mbox.ts';
import { run } from './process.ts';

export interface KernelBuildOptions extends Progress {
  /** Folder of a kernel source, or `debian:linux-source-VERSION`. */
  readonly source: string;
  /** Files with patches (mbox, git format-patch, diffs), applied in this order. */
  readonly patches?: readonly string[];
  /** Files with configuration lines that are added to the lab's own; the last one wins. */
  readonly configs?: readonly string[];
  /** Default: the source's version, and a digest of the patches where there are any. */
  readonly name?: string;
  /** Default: as many as this machine has processors. */
  readonly jobs?: number;
  /** With BTF types; needs pahole, and makes each build longer. */
  readonly btf?: boolean;
  /** Install missing Debian packages; needs root. */
  readonly install?: boolean;
  /** One line for the user: an applied patch, an option that Kconfig did not take. */
  readonly onNotice?: (text: string) => void;
}

export interface KernelBuildResult {
  readonly kernel: BuiltKernel;
  /** False when a kernel with these contents and this name was there already. */
  readonly built: boolean;
  /** Steps of make that were run (compilations and links). */
  readonly steps: number;
  readonly wallMs: number;
}

const STEP = /^ {2}(CC|AS|LD|AR|OBJCOPY|BTF|SORTTAB|GZIP|HOSTCC|HOSTLD|GEN|UPD|BUILD) /;
const BUILD_LIMIT_MS = 6 * 3600_000;

/**
 * Builds a small kernel for the lab, and keeps it under a name that `--kernel` takes. The source, our copy of it
 * and the build folder of the configuration stay in the cache: after a change only what depends on it is compiled.
 *
 * @throws LabError when something is missing, a patch does not apply or the compiler refuses
 */
export async function buildKernel(options: KernelBuildOptions): Promise<KernelBuildResult> {
  const began = performance.now();
  const patches = readPatches(options.patches ?? []);
  if (options.name !== undefined) checkKernelName(options.name);
  const own = (options.configs ?? []).map((path) => readConfig(path));
  const config = mergeConfigs(LAB_CONFIG, options.btf ? BTF_CONFIG : new Map(), ...own);
  const compiler = await checkBuildTools(
    { btf: options.btf ?? false, install: options.install ?? false },
    options,
  );
  const where = await locateTree(options.source, options);
  makeCacheFolder();
  await mkdir(where.folder, { recursive: true });
  const lock = await acquireLock(`${where.folder}.lock`, basename(where.folder), options);
  try {
    const tree = await openTree(where, options);
    const version = sourceVersion(tree.source);
    const name = options.name ?? checkKernelName(defaultName(version, patches));
    const contents = digest([tree.identity, patches.map(({ diff }) => diff), renderConfig(config), compiler]);
    const known = await findBuiltKernel(name, options);
    if (known?.contents === contents) {
      return { kernel: known, built: false, steps: 0, wallMs: performance.now() - began };
    }
    for (const { subject } of patches) options.onNotice?.(`Applying: ${subject}`);
    const changed = await patchTree(tree, patches);
    const build = join(tree.folder, digest([renderConfig(config)]).slice(0, 12));
    await configure(tree, build, config, own, changed, options);
    const steps = await compile(tree, build, name, options);
    const made = join(build, 'arch/x86/boot', IMAGE);
    const { release } = readLinuxImage(await readFile(made), made);
    const about = {
      release,
      source: tree.origin,
      patches: patches.map(({ subject }) => subject),
      btf: options.btf ?? false,
      builtAt: new Date().toISOString(),
      contents,
      compiler,
    };
    await replaceEntry(builtEntryName(name), options, async (folder) => {
      await copyFile(made, join(folder, IMAGE));
      await copyFile(join(build, '.config'), join(folder, 'config'));
      await copyFile(join(build, 'System.map'), join(folder, 'System.map'));
      return about;
    });
    const kernel = await findBuiltKernel(name, options);
    if (!kernel) throw new Error(`${name} was built and is not in the cache`);
    return { kernel, built: true, steps, wallMs: performance.now() - began };
  } finally {
    lock.release();
  }
}

function readConfig(path: string): KernelConfig {
  try {
    return parseConfig(readFileSync(path, 'utf8'), path);
  } catch (error) {
    if (error instanceof LabError) throw error;
    throw new LabError('a configuration cannot be read', (error as Error).message, 'check --config');
  }
}

function digest(parts: unknown): string {
  return createHash('sha256').update(JSON.stringify(parts)).digest('hex');
}

/** VERSION, PATCHLEVEL, SUBLEVEL and EXTRAVERSION of the top Makefile. */
function sourceVersion(source: string): string {
  const text = readFileSync(join(source, 'Makefile'), 'utf8');
  const value = (name: string): string => new RegExp(`^${name} *= *(.*)$`, 'm').exec(text)?.[1]?.trim() ?? '';
  return `${value('VERSION')}.${value('PATCHLEVEL')}.${value('SUBLEVEL') || '0'}${value('EXTRAVERSION')}`;
}

function defaultName(version: string, patches: readonly Patch[]): string {
  return patches.length === 0
    ? version
    : `${version}-p${digest(patches.map(({ diff }) => diff)).slice(0, 6)}`;
}

function makeArguments(tree: KernelTree, build: string): string[] {
  return ['-C', tree.source, `O=${build}`];
}

/** The same contents give the same bytes, whoever builds them and when. */
const MAKE_ENVIRONMENT = {
  KBUILD_BUILD_TIMESTAMP: '@1',
  KBUILD_BUILD_USER: 'nvmx',
  KBUILD_BUILD_HOST: 'lab',
  KBUILD_BUILD_VERSION: '1',
  MAKEFLAGS: '',
};

async function configure(
  tree: KernelTree,
  build: string,
  config: KernelConfig,
  own: readonly KernelConfig[],
  changed: readonly string[],
  options: KernelBuildOptions,
): Promise<void> {
  const stamp = join(build, 'nvmx-config');
  const configured = existsSync(stamp) && existsSync(join(build, '.config'));
  const menus = changed.some((path) => basename(path).startsWith('Kconfig'));
  if (!configured || menus) {
    options.onProgress?.('configuring Linux');
    await mkdir(build, { recursive: true });
    const wanted = join(build, 'nvmx-wanted');
    await writeFile(wanted, renderConfig(config));
    await make(tree, build, ['allnoconfig'], 'configuring Linux', options, { KCONFIG_ALLCONFIG: wanted });
    await writeFile(stamp, '');
  }
  const made = parseConfig(await readFile(join(build, '.config'), 'utf8'), 'the made configuration');
  checkRequired(made);
  for (const unmet of own.flatMap((one) => unmetOptions(one, made)))
    options.onNotice?.(`Kconfig did not take ${unmet}`);
}

/** Compiles, and tells how far it is from what the last whole build of this folder took. */
async function compile(
  tree: KernelTree,
  build: string,
  name: string,
  options: KernelBuildOptions,
): Promise<number> {
  const file = join(build, 'nvmx-steps');
  const before = Number(await readFile(file, 'utf8').catch(() => '0'));
  const isFirst = before === 0;
  const expected = isFirst ? FIRST_BUILD_STEPS : 0;
  const begin = performance.now();
  let steps = 0;
  let told = 0;
  options.onProgress?.('building Linux');
  const onLine = (line: string): void => {
    if (!STEP.test(line)) return;
    steps++;
    const now = performance.now();
    if (now - told < 1000) return;
    told = now;
    const share = isFirst
      ? `about ${Math.min(99, Math.floor((100 * steps) / expected))} %`
      : `${steps} files`;
    const minutes = ((now - begin) / 60_000).toFixed(1);
    options.onProgress?.(`building Linux: ${share}, ${minutes} min, ${line.trim().split(/\s+/)[1] ?? ''}`);
  };
  const jobs = options.jobs ?? availableParallelism();
  const targets = ['-j', String(jobs), `LOCALVERSION=-${name}`, IMAGE];
  await make(tree, build, targets, 'building Linux', options, {}, onLine);
  if (isFirst) await writeFile(file, String(steps));
  return steps;
}

/** What a build from nothing takes with the lab's configuration of a 7.x kernel. */
const FIRST_BUILD_STEPS = 1900;

async function make(
  tree: KernelTree,
  build: string,
  targets: readonly string[],
  what: string,
  { signal }: Progress,
  env: Record<string, string> = {},
  onLine?: (line: string) => void,
): Promise<void> {
  const done = await run('make', [...makeArguments(tree, build), ...targets], {
    env: { ...MAKE_ENVIRONMENT, ...env },
    signal,
    timeoutMs: BUILD_LIMIT_MS,
    ...(onLine ? { onLine } : {}),
  });
  if (done.status === 0) return;
  const shown = errorLines(`${done.stdout}\n${done.stderr}`);
  if (/No space left on device/.test(shown)) throw new Error('No space left on device');
  throw new LabError(
    `${what} failed`,
    shown || lastWords(done, 12),
    'correct the source, the patches or --config',
  );
}

const ERROR_LINES = 25;

/** What the compiler said, without make's own last words; the patched files keep their names in the tree. */
export function errorLines(text: string): string {
  const lines = text.split('\n');
  const first = lines.findIndex((line) =>
    /(: (fatal )?error: |undefined reference|^Error: |: Error: )/.test(line),
  );
  if (first < 0) return '';
  const rest = lines.slice(Math.max(0, first - 1)).filter((line) => !STEP.test(line) && !/^make/.test(line));
  return rest.slice(0, ERROR_LINES).join('\n').trim();
}

/** Removes the build folders and our copy of a source; built kernels stay. */
export async function forgetTree(folder: string): Promise<void> {
  await rm(folder, { recursive: true, force: true });
}
