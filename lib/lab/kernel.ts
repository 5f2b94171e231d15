// SPDX-License-Identifier: Apache-2.0
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { Apt, lastWords } from './apt.ts';
import { cacheEntry, cacheFolder, listFiles, type Progress } from './cache.ts';
import { explainDisk, LabError } from './errors.ts';
import { builtHere, findBuiltKernel, listKernels } from './kernel_store.ts';
import { type LinuxImage, readLinuxImage } from './linux_image.ts';
import { type KernelModule, loadModules, moduleName } from './modules.ts';
import { runningSuites } from './packages.ts';

export interface LabKernel {
  readonly release: string;
  /** What was asked for and where it came from, for the reader of a result. */
  readonly source: string;
  readonly image: LinuxImage;
  /** In the order of loading; none when KVM is built in. */
  readonly modules: readonly KernelModule[];
}

export type KernelSpec =
  | { kind: 'running' }
  | { kind: 'debian'; version: string; flavour: string }
  | { kind: 'name'; name: string }
  | { kind: 'path'; path: string };

const ADVICE =
  'give a bzImage with KVM built in, the folder of an unpacked Debian kernel package, debian:VERSION, or the name ' +
  'of a kernel that nvmx kernel build made';
/** kvm_intel brings kvm along; brd is a block device to swap to. */
const WANTED_MODULES = ['kvm', 'kvm_intel', 'brd'];
const CLOUD = 'cloud-amd64';

/** @throws LabError when the text can mean no kernel */
export function parseKernelSpec(text: string | undefined): KernelSpec {
  if (text === undefined) return { kind: 'running' };
  if (!text.startsWith('debian:')) {
    if (text === '') throw new LabError('no kernel is named', 'the name is empty', ADVICE);
    return text.includes('/') || text === '.' || text === '..'
      ? { kind: 'path', path: resolve(text) }
      : { kind: 'name', name: text };
  }
  const version = text.slice('debian:'.length);
  if (version === '') return { kind: 'running' };
  const parts = /^([0-9][0-9A-Za-z.+~-]*?)(?:-((?:[a-z]+-)?amd64))?$/.exec(version);
  if (!parts) {
    throw new LabError(
      'this is no kernel version',
      `"${version}"`,
      'such as debian:6.12, debian:6.12.107-1, or debian:6.12-amd64 for the image that is not the cloud image',
    );
  }
  return { kind: 'debian', version: parts[1]!, flavour: parts[2] ?? CLOUD };
}

/**
 * Gets a kernel ready: a file or a folder is read, a Debian package is fetched into the cache.
 *
 * @throws LabError when it is not there, not a kernel, or has no KVM for Intel
 */
export async function prepareKernel(text: string | undefined, progress: Progress = {}): Promise<LabKernel> {
  const spec = parseKernelSpec(text);
  if (spec.kind === 'path') return await kernelAt(spec.path);
  if (spec.kind === 'name') return await namedKernel(spec.name, progress);
  const { name, version } = await resolvePackage(spec, progress);
  const entry = await cacheEntry(`kernel/${entryName({ name, version })}`, progress, async (folder) => {
    const apt = await openApt(spec.kind, progress);
    const tree = join(folder, 'tree');
    await apt.unpack(await withParts(apt, name, version), tree);
    await keepNeeded(await kernelTree(tree), folder);
    await rm(tree, { recursive: true });
    return { package: name, version };
  });
  return { ...(await kernelTree(entry.folder)), source: `Debian ${name} ${version}` };
}

/** The wanted modules are all that is kept of a package, so they are part of the name. */
function entryName({ name, version }: Package): string {
  return `${name}_${version}_${WANTED_MODULES.join('+')}`;
}

/** A plain word is a kernel that was built here, else a file or folder beside us. */
async function namedKernel(name: string, progress: Progress): Promise<LabKernel> {
  const built = await findBuiltKernel(name, progress);
  if (!built) {
    if (existsSync(resolve(name))) return await kernelAt(resolve(name));
    const names = (await listKernels(progress)).map((kernel) => kernel.name);
    const why = `"${name}" is no file here, and no kernel of that name was built`;
    throw new LabError('there is no such kernel', why, `${builtHere(names)}; else ${ADVICE}`);
  }
  const image = readLinuxImage(readFileSync(built.image), built.image);
  const patched = built.patches.length === 0 ? '' : `, ${built.patches.length} patches`;
  return { release: image.release, source: `${name} (${built.source}${patched})`, image, modules: [] };
}

/** A package is 100 MB, of which a run needs 20: less to keep, and less to check before each use. */
async function keepNeeded({ release, image, modules }: LabKernel, folder: string): Promise<void> {
  const place = join(folder, 'lib/modules', release);
  await mkdir(place, { recursive: true });
  await mkdir(join(folder, 'boot'));
  await writeFile(join(folder, 'boot', `vmlinuz-${release}`), image.bytes);
  for (const module of modules) await writeFile(join(place, `${module.name}.ko`), module.data);
}

async function kernelAt(path: string): Promise<LabKernel> {
  let isFolder: boolean;
  try {
    isFolder = statSync(path).isDirectory();
  } catch (error) {
    throw new LabError('there is no such kernel', (error as Error).message, ADVICE, { cause: error });
  }
  if (isFolder) return await kernelTree(path);
  const image = readLinuxImage(readFileSync(path), path);
  return { release: image.release, source: path, image, modules: [] };
}

const MODULE_FOLDERS = ['lib/modules', 'usr/lib/modules'];

async function kernelTree(folder: string): Promise<LabKernel> {
  // Since Debian's 7.x kernels the image lies beside its modules.
  const beside = MODULE_FOLDERS.flatMap((part) => {
    const place = join(folder, part);
    return existsSync(place) ? readdirSync(place).map((release) => join(part, release)) : [];
  });
  const boot = ['boot', 'usr/lib/kernel', '.', ...beside]
    .map((part) => join(folder, part))
    .filter((part) => existsSync(part) && statSync(part).isDirectory());
  const images = boot.flatMap((part) =>
    readdirSync(part)
      .filter((name) => /^vmlinuz/.test(name))
      .map((name) => join(part, name)),
  );
  const path = images.sort().at(-1);
  if (!path)
    throw new LabError(
      'there is no kernel here',
      `${folder} has no boot/vmlinuz-* and no usr/lib/modules/*/vmlinuz`,
      ADVICE,
    );
  const image = readLinuxImage(readFileSync(path), path);
  const trees = MODULE_FOLDERS.map((part) => join(folder, part, image.release));
  const tree = trees.find((part) => existsSync(part));
  if (!tree) return { release: image.release, source: folder, image, modules: [] };
  const files = await listFiles(tree);
  const modules = loadModules(WANTED_MODULES, files);
  const builtin = join(tree, 'modules.builtin');
  const inside = existsSync(builtin) ? readFileSync(builtin, 'utf8').split('\n').map(moduleName) : [];
  if (![...modules.map((module) => module.name), ...inside].includes('kvm_intel')) {
    throw new LabError('this kernel has no KVM for Intel', `${tree} has no kvm-intel module`, ADVICE);
  }
  return { release: image.release, source: folder, image, modules };
}

interface Package {
  readonly name: string;
  readonly version: string;
}

const LATER_SUITES = ['trixie', 'trixie-updates', 'trixie-backports', 'sid', 'security:trixie-security'];

/** The running release's suites and later ones, where newer kernels and their sources are. */
export function allSuites(codename: string): string[] {
  return [...new Set([...runningSuites(codename), ...LATER_SUITES])];
}

function openApt(kind: 'running' | 'debian', progress: Progress): Promise<Apt> {
  if (kind === 'running') return Apt.open('running', 'deb', runningSuites, progress);
  return Apt.open('all', 'deb', allSuites, progress);
}

const RESOLVE_AFTER_MS = 24 * 3600_000;

/**
 * Which package a spec means. The answer is remembered for a day, and for longer when the archive cannot be asked:
 * asking costs seconds, and a machine without network can go on with the kernel it has.
 */
async function resolvePackage(
  spec: Extract<KernelSpec, { kind: 'running' | 'debian' }>,
  progress: Progress,
): Promise<Package> {
  const folder = join(cacheFolder(), 'kernel');
  const file = join(
    folder,
    `resolved-${spec.kind === 'running' ? 'running' : `${spec.version}-${spec.flavour}`}.json`,
  );
  const known = await readFile(file, 'utf8')
    .then((text) => JSON.parse(text) as Package)
    .catch(() => undefined);
  const usable = known !== undefined && existsSync(join(folder, entryName(known)));
  if (usable && Date.now() - statSync(file).mtimeMs < RESOLVE_AFTER_MS) return known;
  try {
    const found = await (spec.kind === 'running' ? runningImage(progress) : findVersion(spec, progress));
    await mkdir(folder, { recursive: true });
    await writeFile(file, JSON.stringify(found));
    return found;
  } catch (error) {
    progress.signal?.throwIfAborted();
    if (!usable) throw explainDisk(error, folder);
    progress.onProgress?.(
      `${(error as Error).message.split('\n')[0]}; going on with ${known.name} ${known.version}`,
    );
    return known;
  }
}

async function runningImage(progress: Progress): Promise<Package> {
  const apt = await openApt('running', progress);
  const shown = await apt.run('apt-cache', ['depends', '--important', 'linux-image-cloud-amd64']);
  const name = /Depends: (linux-image-\S+)/.exec(shown.stdout)?.[1];
  if (!name) {
    throw new LabError(
      'the kernel could not be found',
      `Debian's lists name no cloud image: ${lastWords(shown)}`,
      ADVICE,
    );
  }
  const version = (await versionsOf(apt, [name])).at(-1);
  if (!version) throw new LabError('the kernel could not be found', `${name} has no version`, ADVICE);
  return version;
}

async function findVersion(
  { version: prefix, flavour }: Extract<KernelSpec, { kind: 'debian' }>,
  progress: Progress,
): Promise<Package> {
  const apt = await openApt('debian', progress);
  const names = (await apt.run('apt-cache', ['pkgnames', 'linux-image-'])).stdout.split('\n');
  const all = await versionsOf(
    apt,
    names.filter((name) => isImage(name, flavour)),
  );
  const found = all.filter((one) => matchesVersion(one.version, prefix)).at(-1);
  if (found) return found;
  throw new LabError(
    `Debian has no kernel ${prefix} of the flavour ${flavour}`,
    `there are: ${all.map((one) => one.version).join(', ') || 'none'}`,
    'name one of these as debian:VERSION; the beginning of a version will do',
  );
}

/** `linux-image-RELEASE-FLAVOUR`, signed and without debug information. */
export function isImage(name: string, flavour: string): boolean {
  const release = name.startsWith('linux-image-') && name.endsWith(`-${flavour}`);
  return release && /^\d+\.\d+\.\d[^-]*(-\d[^-]*)?$/.test(name.slice(12, -flavour.length - 1));
}

/** A prefix ends where a number ends: 6.1 is not the beginning of 6.12. */
export function matchesVersion(version: string, prefix: string): boolean {
  return version.startsWith(prefix) && !/^\d/.test(/\d$/.test(prefix) ? version.slice(prefix.length) : '');
}

async function versionsOf(apt: Apt, names: readonly string[]): Promise<Package[]> {
  if (names.length === 0) return [];
  const table = (await apt.run('apt-cache', ['madison', ...names])).stdout;
  return parseMadison(table);
}

/** Packages and versions of `apt-cache madison`, oldest first. */
export function parseMadison(table: string): Package[] {
  const rows = table.split('\n').map((line) => line.split('|').map((field) => field.trim()));
  const unique = new Map(
    rows
      .filter((row) => row[0] && row[1])
      .map(([name, version]) => [`${name} ${version}`, { name: name!, version: version! }]),
  );
  const order = new Intl.Collator('en', { numeric: true });
  return [...unique.values()].sort((a, b) => order.compare(a.version, b.version));
}

/** Since Debian's 7.x kernels, image and modules are packages of their own that the image package depends on. */
async function withParts(apt: Apt, name: string, version: string): Promise<string[]> {
  const shown = await apt.run('apt-cache', ['show', `${name}=${version}`]);
  const depends = /^Depends: (.+)$/m.exec(shown.stdout)?.[1] ?? '';
  const parts = depends.split(',').map((text) => text.trim().split(/[\s(:]/)[0] ?? '');
  const wanted = parts.filter((part) => /^linux-(binary|modules)-/.test(part));
  return [name, ...wanted].map((part) => `${part}=${version}`);
}
