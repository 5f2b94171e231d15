// SPDX-License-Identifier: Apache-2.0
import { createHash, randomBytes } from 'node:crypto';
import {
  createReadStream,
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { lstat, mkdir, readdir, readFile, rename, rm, unlink, writeFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import { basename, dirname, join, relative, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { explainDisk, LabError } from './errors.ts';
import { processIdentity } from './process.ts';
import { type Contents, contentsOfFile, sha256OfRanges } from './sparse.ts';

/** Where everything the lab keeps lies: NVMX_CACHE, else nvmx in XDG_CACHE_HOME, else ~/.cache/nvmx. */
export function cacheFolder(env: NodeJS.ProcessEnv = process.env): string {
  if (env['NVMX_CACHE']) return resolve(env['NVMX_CACHE']);
  const base = env['XDG_CACHE_HOME'];
  return join(base?.startsWith('/') ? base : join(homedir(), '.cache'), 'nvmx');
}

/**
 * Makes the cache folder. Folder by folder: where none can be made at all, as under /proc, Node's own recursive
 * mkdir tries for ever.
 *
 * @throws LabError when it cannot be made
 */
export function makeCacheFolder(): string {
  const folder = cacheFolder();
  const missing: string[] = [];
  for (let at = folder; !existsSync(at); at = dirname(at)) missing.unshift(at);
  for (const at of missing) {
    try {
      mkdirSync(at);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EEXIST') continue;
      const full = explainDisk(error, folder);
      if (full instanceof LabError) throw full;
      const advice = 'set NVMX_CACHE to a folder you can write to';
      throw new LabError('the cache folder cannot be used', (error as Error).message, advice, {
        cause: error,
      });
    }
  }
  return folder;
}

export interface Progress {
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((text: string) => void) | undefined;
}

interface FileRecord extends Contents {
  readonly size: number;
}
interface Manifest {
  readonly files: Record<string, FileRecord>;
  readonly about: Record<string, unknown>;
}

const MANIFEST = 'manifest.json';

export interface Entry {
  readonly folder: string;
  /** What `make` said about how the entry came to be. */
  readonly about: Record<string, unknown>;
}

/**
 * A folder of the cache that is made once and checked (size and SHA-256 of every file) before each use. One whose
 * files are damaged is thrown away, with a notice, and made again. `make` fills a temporary folder, which then
 * takes the entry's name in one step: an interrupted run leaves nothing half made.
 */
export async function cacheEntry(
  name: string,
  progress: Progress,
  make: (folder: string) => Promise<Record<string, unknown>>,
): Promise<Entry> {
  const folder = join(makeCacheFolder(), name);
  try {
    await mkdir(dirname(folder), { recursive: true });
    const found = await openEntry(folder, progress);
    if (found) return found;
    const lock = await acquireLock(`${folder}.lock`, basename(name), progress);
    try {
      const meanwhile = await openEntry(folder, progress);
      if (meanwhile) return meanwhile;
      return await makeEntry(folder, make);
    } finally {
      lock.release();
    }
  } catch (error) {
    throw explainDisk(error, cacheFolder());
  }
}

/** An entry that only its user can make: checked as ever, undefined when it is not there. */
export async function existingEntry(
  name: string,
  progress: Progress,
  advice: string,
): Promise<Entry | undefined> {
  try {
    return await openEntry(join(cacheFolder(), name), progress, advice);
  } catch (error) {
    throw explainDisk(error, cacheFolder());
  }
}

/** Makes an entry whether or not there is one; the old one serves until the new one is whole. */
export async function replaceEntry(
  name: string,
  progress: Progress,
  make: (folder: string) => Promise<Record<string, unknown>>,
): Promise<Entry> {
  const folder = join(makeCacheFolder(), name);
  try {
    await mkdir(dirname(folder), { recursive: true });
    const locks = join(cacheFolder(), 'tmp');
    await mkdir(locks, { recursive: true });
    const lock = await acquireLock(
      join(locks, `${name.replaceAll('/', '-')}.lock`),
      basename(name),
      progress,
    );
    try {
      return await makeEntry(folder, make);
    } finally {
      lock.release();
    }
  } catch (error) {
    throw explainDisk(error, cacheFolder());
  }
}

/** Of entries that replace each other only the newest stay. */
export async function keepNewest(kind: string, count: number): Promise<void> {
  const parent = join(cacheFolder(), kind);
  const entries = (await readdir(parent, { withFileTypes: true })).filter((entry) => entry.isDirectory());
  const aged = await Promise.all(
    entries.map(async ({ name }) => ({ name, at: (await lstat(join(parent, name))).mtimeMs })),
  );
  for (const { name } of aged.sort((a, b) => b.at - a.at).slice(count)) {
    await rm(join(parent, name), { recursive: true, force: true });
  }
}

async function openEntry(
  folder: string,
  { onProgress }: Progress,
  remedy = 'making it again',
): Promise<Entry | undefined> {
  const about = await checkEntry(folder);
  if (typeof about !== 'string') return about && { folder, about };
  onProgress?.(`${folder} is damaged (${about}); ${remedy}`);
  await rm(folder, { recursive: true, force: true });
  return undefined;
}

async function makeEntry(
  folder: string,
  make: (folder: string) => Promise<Record<string, unknown>>,
): Promise<Entry> {
  const work = await temporaryFolder('make');
  try {
    const about = await make(work);
    const files: Record<string, FileRecord> = {};
    for (const file of await listFiles(work)) files[relative(work, file)] = await recordOf(file);
    const manifest: Manifest = { files, about };
    await writeFile(join(work, MANIFEST), `${JSON.stringify(manifest, null, 1)}\n`);
    await rm(folder, { recursive: true, force: true });
    await rename(work, folder);
    return { folder, about };
  } catch (error) {
    await rm(work, { recursive: true, force: true });
    throw error;
  }
}

/** What the manifest says about the entry; undefined when there is no entry; a text when it is damaged. */
export async function checkEntry(folder: string): Promise<Record<string, unknown> | string | undefined> {
  if (!(await lstat(folder).catch(() => undefined))) return undefined;
  let manifest: Manifest;
  try {
    manifest = JSON.parse(await readFile(join(folder, MANIFEST), 'utf8')) as Manifest;
    if (typeof manifest.files !== 'object' || manifest.files === null) return 'its manifest names no files';
  } catch {
    return 'its manifest cannot be read';
  }
  for (const [name, wanted] of Object.entries(manifest.files)) {
    const file = join(folder, name);
    const seen = await lstat(file).catch(() => undefined);
    if (!seen) return `${name} is missing`;
    if (seen.size !== wanted.size) return `${name} has ${seen.size} bytes instead of ${wanted.size}`;
    const found = wanted.data ? await sha256OfRanges(file, wanted.data) : await sha256File(file);
    if (found !== wanted.sha256) return `${name} has other contents`;
  }
  return manifest.about;
}

async function recordOf(file: string): Promise<FileRecord> {
  return { size: (await lstat(file)).size, ...(await contentsOfFile(file)) };
}

export async function sha256File(file: string): Promise<string> {
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(file, { highWaterMark: 1 << 20 })) hash.update(chunk as Buffer);
  return hash.digest('hex');
}

/** Every plain file under a folder, by full path. */
export async function listFiles(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { withFileTypes: true, recursive: true });
  return entries
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name))
    .sort();
}

/** A new folder for this process; those of processes that no longer run are removed on the way. */
export async function temporaryFolder(kind: string): Promise<string> {
  const parent = join(makeCacheFolder(), 'tmp');
  try {
    await mkdir(parent, { recursive: true });
    for (const name of await readdir(parent)) {
      const owner = /^(\d+)-(\d+)-/.exec(name);
      if (owner && processIdentity(Number(owner[1])) !== `${owner[1]} ${owner[2]}`) {
        await rm(join(parent, name), { recursive: true, force: true });
      }
    }
    const self = (processIdentity(process.pid) ?? `${process.pid} 0`).replace(' ', '-');
    const folder = join(parent, `${self}-${kind}-${randomBytes(4).toString('hex')}`);
    await mkdir(folder);
    return folder;
  } catch (error) {
    throw explainDisk(error, cacheFolder());
  }
}

export interface Lock {
  release(): void;
}

/** Waits until no other living process holds the lock file, then holds it. */
export async function acquireLock(
  file: string,
  what: string,
  { signal, onProgress }: Progress,
): Promise<Lock> {
  const self = processIdentity(process.pid) ?? String(process.pid);
  const mine = `${file}.${process.pid}-${randomBytes(4).toString('hex')}`;
  writeFileSync(mine, self);
  try {
    for (let told = false; ; ) {
      signal?.throwIfAborted();
      try {
        linkSync(mine, file);
        return { release: () => rmSync(file, { force: true }) };
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
      }
      const owner = readOwner(file);
      if (owner !== undefined && processIdentity(Number(owner.split(' ')[0])) !== owner) {
        rmSync(file, { force: true });
        continue;
      }
      if (!told)
        onProgress?.(`waiting for another nvmx (process ${owner?.split(' ')[0]}) that is making ${what}`);
      told = true;
      await sleep(250, undefined, signal ? { signal } : undefined).catch(() => signal?.throwIfAborted());
    }
  } finally {
    await unlink(mine).catch(() => undefined);
  }
}

function readOwner(file: string): string | undefined {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return undefined;
  }
}

const CONSOLES_KEPT = 30;

/** Keeps a console text for the reader of a result; only the newest ones stay. */
export function keepConsole(text: string): string {
  const folder = join(cacheFolder(), 'consoles');
  const name = `${new Date().toISOString().replaceAll(':', '-')}-${process.pid}-${randomBytes(2).toString('hex')}.log`;
  const file = join(folder, name);
  try {
    mkdirSync(folder, { recursive: true });
    writeFileSync(file, text);
    for (const old of readdirSync(folder).sort().slice(0, -CONSOLES_KEPT))
      rmSync(join(folder, old), { force: true });
  } catch (error) {
    throw explainDisk(error, folder);
  }
  return file;
}
