// SPDX-License-Identifier: Apache-2.0
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { Apt } from './apt.ts';
import { cacheEntry, type Progress } from './cache.ts';

/** Suites of the release this machine runs. */
export function runningSuites(codename: string): string[] {
  return [codename, `${codename}-updates`, `security:${codename}-security`];
}

/** A file of a Debian package that is unpacked into the cache; `paths` are the places it may have there. */
export async function packageFile(
  name: string,
  paths: readonly string[],
  progress: Progress,
): Promise<string> {
  const entry = await cacheEntry(`package/${name}`, progress, async (folder) => {
    const apt = await Apt.open('running', 'deb', runningSuites, progress);
    await apt.unpack([name], folder);
    return { package: name };
  });
  const found = paths.map((path) => join(entry.folder, path)).find((path) => existsSync(path));
  if (!found) throw new Error(`the package ${name} has none of ${paths.join(', ')}`);
  return found;
}

/** A file that a Debian package brings: the installed one, else from the cache. */
export async function debianFile(path: string, name: string, progress: Progress): Promise<string> {
  return existsSync(path) ? path : await packageFile(name, [path], progress);
}
