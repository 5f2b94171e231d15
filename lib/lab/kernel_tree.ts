// SPDX-License-Identifier: Apache-2.0
import { createHash } from 'node:crypto';
import { existsSync, lstatSync, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';
import {
  chmod,
  copyFile,
  mkdir,
  readdir,
  readFile,
  rename,
  rm,
  symlink,
  utimes,
  writeFile,
} from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { Apt, lastWords } from './apt.ts';
import { cacheFolder, type Progress, temporaryFolder } from './cache.ts';
import { explainDisk, LabError } from './errors.ts';
import { allSuites, parseMadison } from './kernel.ts';
import type { Patch } from './mbox.ts';
import { applyPatches, type TreeChanges, type TreeFile } from './patch.ts';
import { run } from './process.ts';

/** A kernel source, in a copy of ours that patches are applied to and kernels are built from. */
export interface KernelTree {
  /** Everything that belongs to this source: `source/`, and a build folder for each configuration. */
  readonly folder: string;
  readonly source: string;
  /** For the reader: the Debian package with its version, or the folder. */
  readonly origin: string;
  /** Stands for the contents of the unpatched source. */
  readonly identity: string;
}

const STATE = 'state.json';
const DEBIAN = 'debian:';

interface TreeState {
  readonly origin: string;
  /** Of a copied folder: size and modification time of each file when it was copied. */
  readonly index: Record<string, string>;
  /** Of patched files: true when the unpatched one lies in `unpatched/`, false when there was none. */
  readonly patched: Record<string, boolean>;
}

/** Which tree `--source` means, without making it. */
export async function locateTree(
  source: string,
  progress: Progress,
): Promise<{ folder: string; origin: string; debian: { name: string; version: string } | undefined }> {
  if (source.startsWith(DEBIAN)) {
    const found = await findSource(source.slice(DEBIAN.length), progress);
    const name = `${found.name}_${found.version}`;
    return {
      folder: join(cacheFolder(), 'build', name),
      origin: `Debian ${found.name} ${found.version}`,
      debian: found,
    };
  }
  const path = resolve(source);
  if (!existsSync(join(path, 'Kbuild')) || !existsSync(join(path, 'arch/x86/Kconfig'))) {
    throw new LabError(
      'this is not a kernel source',
      `${path} has no Kbuild and arch/x86/Kconfig`,
      'give the top folder of a kernel source, or debian:linux-source-VERSION',
    );
  }
  const key = createHash('sha256').update(path).digest('hex').slice(0, 12);
  return {
    folder: join(cacheFolder(), 'build', `${basename(path)}-${key}`),
    origin: path,
    debian: undefined,
  };
}

/** Makes our copy, or brings it up to date with the folder it is a copy of. Patched files are left to patchTree. */
export async function openTree(
  where: Awaited<ReturnType<typeof locateTree>>,
  progress: Progress,
): Promise<KernelTree> {
  const { folder, origin, debian } = where;
  const source = join(folder, 'source');
  try {
    if (debian) {
      if (!existsSync(join(folder, STATE))) await unpackSource(debian, folder, origin, progress);
      return { folder, source, origin, identity: `${debian.name} ${debian.version}` };
    }
    return { folder, source, origin, identity: await mirror(origin, folder, progress) };
  } catch (error) {
    throw explainDisk(error, cacheFolder());
  }
}

async function findSource(name: string, progress: Progress): Promise<{ name: string; version: string }> {
  const [wanted, version] = name.split('=', 2);
  const apt = await Apt.open('all', 'deb', allSuites, progress);
  const names = (await apt.run('apt-cache', ['pkgnames', 'linux-source-'])).stdout.trim().split('\n');
  const known = names.filter((one) => /^linux-source-\d/.test(one)).sort();
  if (wanted === undefined || !known.includes(wanted)) {
    throw new LabError(
      `Debian has no ${wanted || 'such source'}`,
      `there are: ${known.join(', ')}`,
      'name one of these',
    );
  }
  const all = parseMadison((await apt.run('apt-cache', ['madison', wanted])).stdout);
  const found = all.filter((one) => version === undefined || one.version === version).at(-1);
  if (found) return found;
  throw new LabError(
    `Debian has no ${name}`,
    `there are: ${all.map((one) => one.version).join(', ')}`,
    `name one of these as debian:${wanted}=VERSION`,
  );
}

async function unpackSource(
  { name, version }: { name: string; version: string },
  folder: string,
  origin: string,
  progress: Progress,
): Promise<void> {
  const work = await temporaryFolder('source');
  try {
    const apt = await Apt.open('all', 'deb', allSuites, progress);
    await apt.unpack([`${name}=${version}`], join(work, 'package'));
    const archive = join(work, 'package/usr/src', `${name}.tar.xz`);
    progress.onProgress?.(`unpacking ${name} (1.8 GB)`);
    await mkdir(join(work, 'tree/source'), { recursive: true });
    const args = ['-xf', archive, '-C', join(work, 'tree/source'), '--strip-components=1'];
    const done = await run('tar', args, { signal: progress.signal });
    if (done.status !== 0) throw new Error(`${name} could not be unpacked: ${lastWords(done)}`);
    await writeState(join(work, 'tree'), { origin, index: {}, patched: {} });
    await mkdir(dirname(folder), { recursive: true });
    await rm(folder, { recursive: true, force: true });
    await rename(join(work, 'tree'), folder);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/** Build products that lie in a source folder somebody builds in. */
const NOT_SOURCE =
  /(^|\/)(\.git|\.tmp_versions)(\/|$)|\.(o|ko|a|cmd|mod|order|symvers|dwo)$|^(vmlinux.*|System\.map|\.config.*)$|^(arch\/\w+\/)?include\/(generated|config)\//;

/** The source files of a folder: what git knows or would take, where it is a git tree; else all but build products. */
async function sourceFiles(origin: string, { signal }: Progress): Promise<string[]> {
  if (existsSync(join(origin, '.git'))) {
    const args = ['-C', origin, 'ls-files', '-z', '--cached', '--others', '--exclude-standard'];
    const done = await run('git', args, { signal }).catch(() => undefined);
    if (done?.status === 0) return [...new Set(done.stdout.split('\0').filter(Boolean))];
  }
  const entries = readdirSync(origin, { withFileTypes: true, recursive: true });
  return entries
    .filter((entry) => !entry.isDirectory())
    .map((entry) => join(entry.parentPath, entry.name).slice(origin.length + 1))
    .filter((path) => !NOT_SOURCE.test(path));
}

/** Copies what is new or changed; the copies are as new as now, so that make sees them. */
async function mirror(origin: string, folder: string, progress: Progress): Promise<string> {
  const state = (await readState(folder)) ?? { origin, index: {}, patched: {} };
  progress.onProgress?.(`reading ${origin}`);
  const index: Record<string, string> = {};
  for (const path of (await sourceFiles(origin, progress)).sort()) {
    const stat = lstatSync(join(origin, path), { throwIfNoEntry: false });
    if (stat && !stat.isDirectory()) index[path] = `${stat.size} ${stat.mtimeMs} ${stat.mode}`;
  }
  const fresh = Object.keys(index).filter((path) => state.index[path] !== index[path]);
  const gone = Object.keys(state.index).filter((path) => index[path] === undefined);
  // Said before the work: an interrupted copy is looked at again.
  const keep = Object.fromEntries(Object.entries(state.index).filter(([path, sum]) => index[path] === sum));
  await writeState(folder, { ...state, index: keep });
  let done = 0;
  for (const path of fresh) {
    if (done++ % 2000 === 0) {
      progress.signal?.throwIfAborted();
      progress.onProgress?.(`copying the source (${done} of ${fresh.length} files)`);
    }
    const isPatched = state.patched[path] !== undefined;
    await copyEntry(join(origin, path), join(folder, isPatched ? 'unpatched' : 'source', path));
  }
  const patched = { ...state.patched };
  for (const path of fresh) if (patched[path] === false) patched[path] = true;
  for (const path of gone) {
    if (patched[path] !== undefined) patched[path] = false;
    else await rm(join(folder, 'source', path), { force: true });
  }
  await writeState(folder, { origin, index, patched });
  return createHash('sha256')
    .update(JSON.stringify(Object.entries(index)))
    .digest('hex');
}

async function copyEntry(from: string, to: string): Promise<void> {
  await mkdir(dirname(to), { recursive: true });
  await rm(to, { force: true });
  if (lstatSync(from).isSymbolicLink()) return await symlink(readlinkSync(from), to);
  await copyFile(from, to);
  await chmod(to, (statSync(from).mode & 0o777) | 0o600);
  const now = new Date();
  await utimes(to, now, now);
}

/**
 * Makes the tree what the patches make of the unpatched source. Only files whose contents change are written, so
 * that a rebuild compiles those and no others.
 *
 * @returns the files written or removed
 * @throws LabError when a patch does not apply; then nothing was written
 */
export async function patchTree(tree: KernelTree, patches: readonly Patch[]): Promise<string[]> {
  const state = await readState(tree.folder);
  if (!state) throw new Error(`${tree.folder} has no ${STATE}`);
  const unpatched = (path: string): TreeFile | undefined => {
    const kept = state.patched[path];
    if (kept === false) return undefined;
    return readTreeFile(join(tree.folder, kept ? 'unpatched' : 'source', path));
  };
  const changes = applyPatches(patches, unpatched);
  const wanted = new Map<string, TreeFile | undefined>(changes);
  for (const path of Object.keys(state.patched)) if (!changes.has(path)) wanted.set(path, unpatched(path));
  const patched = await keepUnpatched(tree, state, changes);
  const written: string[] = [];
  for (const [path, file] of wanted) {
    const place = join(tree.source, path);
    const seen = readTreeFile(place);
    if (seen?.text === file?.text && seen?.executable === file?.executable) continue;
    written.push(path);
    await rm(place, { force: true });
    if (file) {
      await mkdir(dirname(place), { recursive: true });
      await writeFile(place, file.text, { encoding: 'latin1', mode: file.executable ? 0o755 : 0o644 });
    }
  }
  // Files that are no longer patched are in order again, and need no second copy.
  const still = Object.fromEntries(Object.entries(patched).filter(([path]) => changes.has(path)));
  await writeState(tree.folder, { ...state, patched: still });
  return written.sort();
}

async function keepUnpatched(
  tree: KernelTree,
  state: TreeState,
  changes: TreeChanges,
): Promise<Record<string, boolean>> {
  const patched: Record<string, boolean> = { ...state.patched };
  for (const path of changes.keys()) {
    if (patched[path] !== undefined) continue;
    const place = join(tree.source, path);
    patched[path] = existsSync(place);
    if (!patched[path]) continue;
    const kept = join(tree.folder, 'unpatched', path);
    await mkdir(dirname(kept), { recursive: true });
    await copyFile(place, kept);
  }
  // Known before the first file is written: an interrupted run can always go back.
  await writeState(tree.folder, { ...state, patched });
  return patched;
}

function readTreeFile(path: string): TreeFile | undefined {
  const stat = statSync(path, { throwIfNoEntry: false });
  if (!stat?.isFile()) return undefined;
  return { text: readFileSync(path, 'latin1'), executable: (stat.mode & 0o100) !== 0 };
}

async function readState(folder: string): Promise<TreeState | undefined> {
  return await readFile(join(folder, STATE), 'utf8')
    .then((text) => JSON.parse(text) as TreeState)
    .catch(() => undefined);
}

async function writeState(folder: string, state: TreeState): Promise<void> {
  await mkdir(folder, { recursive: true });
  const file = join(folder, STATE);
  await writeFile(`${file}.new`, JSON.stringify(state));
  await rename(`${file}.new`, file);
}

/** Sources kept for rebuilding, with what they are copies of. */
export async function keptTrees(): Promise<{ folder: string; origin: string }[]> {
  const parent = join(cacheFolder(), 'build');
  const names = await readdir(parent).catch(() => []);
  const trees = await Promise.all(
    names.map(async (name) => ({ folder: join(parent, name), state: await readState(join(parent, name)) })),
  );
  return trees.flatMap(({ folder, state }) => (state ? [{ folder, origin: state.origin }] : []));
}
