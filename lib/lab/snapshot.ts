// SPDX-License-Identifier: Apache-2.0
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readdir, readFile, rename, rm, utimes, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { cacheFolder, checkEntry, keepNewest, type Progress, replaceEntry } from './cache.ts';
import { SNAPSHOT_FOLDER, SNAPSHOT_PART } from './engine_source.ts';

/** So many stay in the cache; the one that was not used for longest goes first. */
const KEPT = 6;
const CONSOLE = 'boot-console';
const LOOK_MS = 100;

/** A booted machine in the cache: it continues where init asks for its job. */
export interface Snapshot {
  readonly key: string;
  /** Of the emulator's files, with its configuration. */
  readonly folder: string;
  /** What the console said until then. */
  readonly console: string;
}

/** Stands for all that a machine is made from before it has a job. */
export function snapshotKey(parts: readonly (string | Uint8Array)[]): string {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(`${part.length}\0`).update(part);
  return hash.digest('hex').slice(0, 16);
}

const nameOf = (key: string): string => `snapshot/${key}`;

/** One from the cache, checked; a damaged one is thrown away with a notice. */
export async function findSnapshot(key: string, progress: Progress): Promise<Snapshot | undefined> {
  const folder = join(cacheFolder(), nameOf(key));
  const about = await checkEntry(folder);
  if (about === undefined) return undefined;
  if (typeof about === 'string') {
    await dropSnapshot({ key }, about, progress);
    return undefined;
  }
  await utimes(folder, new Date(), new Date());
  return { key, folder, console: await readFile(join(folder, CONSOLE), 'utf8') };
}

export async function dropSnapshot({ key }: { key: string }, why: string, progress: Progress): Promise<void> {
  progress.onProgress?.(`the snapshot ${key} is of no use (${why}); booting`);
  await rm(join(cacheFolder(), nameOf(key)), { recursive: true, force: true });
}

/** Being made by this process: two machines of one run need it once. */
const making = new Set<string>();

/** Follows a machine that boots, and keeps the snapshot that its emulator leaves in the run's folder. */
export class SnapshotKeeper {
  readonly #folder: string;
  readonly #key: string;
  readonly #config: string;
  readonly #kept: Promise<void>;
  #console: string | undefined;
  #over = false;

  private constructor(folder: string, key: string, config: string) {
    this.#folder = folder;
    this.#key = key;
    this.#config = config;
    this.#kept = this.#keep().catch(() => undefined);
  }

  /** @param config the emulator's configuration for a machine that continues from it */
  static async start(folder: string, key: string, config: string): Promise<SnapshotKeeper | undefined> {
    if (making.has(key)) {
      await refuseSnapshot(folder);
      return undefined;
    }
    making.add(key);
    return new SnapshotKeeper(folder, key, config);
  }

  /** Init has its job: what the console said until then belongs to the boot. */
  booted(console: string): void {
    this.#console = console;
  }

  /** The machine has ended: what is not written yet never will be. */
  async end(): Promise<void> {
    this.#over = true;
    await this.#kept;
    making.delete(this.#key);
  }

  async #keep(): Promise<void> {
    const whole = join(this.#folder, SNAPSHOT_FOLDER);
    while (!existsSync(whole) || this.#console === undefined) {
      if (this.#over) return;
      await sleep(LOOK_MS);
    }
    const console = this.#console;
    await replaceEntry(nameOf(this.#key), {}, async (folder) => {
      for (const name of await readdir(whole)) await rename(join(whole, name), join(folder, name));
      await writeFile(join(folder, 'config'), this.#config);
      await writeFile(join(folder, CONSOLE), console);
      return {};
    });
    await keepNewest('snapshot', KEPT);
  }
}

/** The emulator of this run shall leave none. */
export async function refuseSnapshot(folder: string): Promise<void> {
  await mkdir(join(folder, SNAPSHOT_PART), { recursive: true });
}
