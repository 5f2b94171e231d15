// SPDX-License-Identifier: Apache-2.0
import { accessSync, constants, existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { cacheFolder, type Progress } from './cache.ts';
import { BUILD_PACKAGES, builtEngine } from './engine_build.ts';
import { LabError } from './errors.ts';
import { run } from './process.ts';

export interface Engine {
  /** Where it comes from: the environment, our own build, or the distribution's package. */
  readonly kind: 'NVMX_BOCHS' | 'built' | 'distribution';
  readonly path: string;
  readonly version: string;
  /** Posted interrupts and the rest of APICv can be used. */
  readonly apicv: boolean;
  /** It can place kernel and initramfs in memory itself; else they are booted from a CD. */
  readonly memoryImages: boolean;
  /** It insists on a terminal, and stops in its debugger first. */
  readonly needsTerminal: boolean;
}

/** Debian packages that `npm start` installs for the lab; everything else is fetched into the cache. */
export const requiredDebianPackages: readonly string[] = BUILD_PACKAGES;
/** What the distribution's emulator needs besides, when our own cannot be built. */
export const fallbackDebianPackages: readonly string[] = [
  'bochs',
  'bochs-term',
  'xorriso',
  'isolinux',
  'syslinux-common',
];

const SYSTEM_BOCHS = '/usr/bin/bochs';

/**
 * The emulator to use: $NVMX_BOCHS, else our build of Debian's source (made now when the cache has none), else
 * the distribution's package.
 *
 * @param sources for tests: another way to build, another place of the packaged program
 * @throws LabError when there is none, with what to do
 */
export async function prepareEngine(
  progress: Progress = {},
  { build = builtEngine, system = SYSTEM_BOCHS } = {},
): Promise<Engine> {
  const named = process.env['NVMX_BOCHS'];
  if (named) return await namedEngine(resolve(named), progress);
  try {
    const entry = await build(progress);
    const version = `bochs ${String(entry.about['version'])}`;
    const path = join(entry.folder, 'bochs');
    return { kind: 'built', path, version, apicv: true, memoryImages: true, needsTerminal: false };
  } catch (error) {
    progress.signal?.throwIfAborted();
    const why = error instanceof LabError ? `${error.what}: ${error.why}` : (error as Error).message;
    const unusable = ['the disk is full', 'the cache folder cannot be used'];
    if (error instanceof LabError && unusable.includes(error.what)) throw error;
    if (!existsSync(system)) {
      throw new LabError(
        'there is no emulator for the lab',
        `it could not be built (${why}), and the package bochs is not installed`,
        `apt-get install ${requiredDebianPackages.join(' ')} and run it again; or ` +
          `apt-get install ${fallbackDebianPackages.join(' ')} for the slower packaged one; or set NVMX_BOCHS`,
        { cause: error },
      );
    }
    progress.onProgress?.(`the emulator could not be built (${why}); using the slower package`);
    return await foreignEngine('distribution', system, progress);
  }
}

async function namedEngine(path: string, progress: Progress): Promise<Engine> {
  try {
    accessSync(path, constants.X_OK);
  } catch (error) {
    const advice = 'set NVMX_BOCHS to the bochs program itself, or unset it';
    throw new LabError('NVMX_BOCHS cannot be used', (error as Error).message, advice, { cause: error });
  }
  return await foreignEngine('NVMX_BOCHS', path, progress);
}

/** An engine that we did not build: it may have a debugger, and lacks our corrections. */
async function foreignEngine(kind: Engine['kind'], path: string, { signal }: Progress): Promise<Engine> {
  const help = await run(path, ['--help'], { signal, timeoutMs: 10_000 });
  const text = help.stdout + help.stderr;
  const version = /Bochs x86 Emulator (\d+\.\d+[\w.+~-]*)/.exec(text)?.[1];
  if (!version) {
    throw new LabError(
      'this emulator cannot be used',
      `${path} does not say it is Bochs`,
      'name a Bochs 2.7 or later',
    );
  }
  // After 3.0 a posted-interrupt descriptor may lie where KVM puts it.
  const apicv = Number.parseFloat(version) > 3.0;
  return {
    kind,
    path,
    version: `bochs ${version}`,
    apicv,
    memoryImages: false,
    needsTerminal: /^\s*-rc /m.test(text),
  };
}

export const DEFAULT_CPU = 'corei7_skylake_x';

/** @throws LabError when the engine has no such CPU model; it names those it has */
export async function checkCpuModel(engine: Engine, model: string, { signal }: Progress): Promise<string> {
  if (model === DEFAULT_CPU) return model;
  const help = await run(engine.path, ['--help', 'cpu'], { signal, timeoutMs: 10_000 });
  const models = parseCpuModels(help.stdout + help.stderr);
  if (models.includes(model)) return model;
  throw new LabError(
    'the emulator has no such CPU',
    `"${model}" is not among ${models.join(', ')}`,
    'name one of these; nested VMX needs an Intel model with VMX and EPT (corei5_arrandale_m520 and later)',
  );
}

/** The names between "Supported CPU models:" and the emulator's farewell, one a line. */
export function parseCpuModels(help: string): string[] {
  const list = help.slice(help.indexOf('Supported CPU models'));
  return [...list.matchAll(/^([a-z0-9_]+)\s*$/gm)].map((found) => found[1]!);
}

/**
 * What can be told about the lab without trying it: whether it can be used here at all, and why.
 */
export function describeLab(): { possible: boolean; why: string } {
  if (process.env['NVMX_BOCHS']) return { possible: true, why: `NVMX_BOCHS is ${process.env['NVMX_BOCHS']}` };
  if (existsSync(join(cacheFolder(), 'engine')))
    return { possible: true, why: 'an emulator is in the cache' };
  if (existsSync('/usr/bin/g++') && existsSync('/usr/bin/make')) {
    return { possible: true, why: 'its emulator will be built on first use (1-2 minutes)' };
  }
  if (existsSync(SYSTEM_BOCHS)) return { possible: true, why: 'the distribution package bochs is installed' };
  return { possible: false, why: `apt-get install ${requiredDebianPackages.join(' ')}` };
}
