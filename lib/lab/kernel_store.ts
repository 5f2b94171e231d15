// SPDX-License-Identifier: Apache-2.0
import { readdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { cacheFolder, type Entry, existingEntry, type Progress } from './cache.ts';
import { LabError } from './errors.ts';

/** A kernel of the user's that `nvmx kernel build` made. */
export interface BuiltKernel {
  readonly name: string;
  /** As `uname -r` says. */
  readonly release: string;
  /** The source it was made from: a Debian package with its version, or a folder. */
  readonly source: string;
  /** Subjects of the applied patches, in order. */
  readonly patches: readonly string[];
  readonly btf: boolean;
  readonly builtAt: string;
  /** Stands for everything it was made from: the same contents are not built again. */
  readonly contents: string;
  readonly image: string;
}

const NAME = /^[A-Za-z0-9][A-Za-z0-9._+-]{0,39}$/;
export const IMAGE = 'bzImage';

export function builtEntryName(name: string): string {
  return `kernel/built/${name}`;
}

/** @throws LabError when the text cannot be a kernel's name */
export function checkKernelName(name: string): string {
  if (NAME.test(name)) return name;
  throw new LabError(
    'this is no name for a kernel',
    `"${name}"`,
    'up to 40 letters, digits and . _ + -, beginning with a letter or digit',
  );
}

/** The kernel of that name, checked; undefined when there is none. A damaged one is thrown away with a notice. */
export async function findBuiltKernel(
  name: string,
  progress: Progress = {},
): Promise<BuiltKernel | undefined> {
  if (!NAME.test(name)) return undefined;
  const entry = await existingEntry(builtEntryName(name), progress, 'build it again');
  return entry && describe(name, entry);
}

/** All kernels that were built here, newest last. */
export async function listKernels(progress: Progress = {}): Promise<BuiltKernel[]> {
  const names = await readdir(join(cacheFolder(), 'kernel/built')).catch(() => []);
  const found: BuiltKernel[] = [];
  for (const name of names) {
    const kernel = await findBuiltKernel(name, progress);
    if (kernel) found.push(kernel);
  }
  return found.sort((a, b) => (a.builtAt < b.builtAt ? -1 : 1));
}

/** @throws LabError when there is none of that name */
export async function removeKernel(name: string): Promise<void> {
  const names = await readdir(join(cacheFolder(), 'kernel/built')).catch(() => [] as string[]);
  if (!NAME.test(name) || !names.includes(name)) {
    throw new LabError('there is no such kernel', `"${name}" was not built here`, builtHere(names));
  }
  await rm(join(cacheFolder(), builtEntryName(name)), { recursive: true });
}

export function builtHere(names: readonly string[]): string {
  return names.length === 0 ? 'nvmx kernel build makes one' : `there are: ${names.join(', ')}`;
}

function describe(name: string, { folder, about }: Entry): BuiltKernel {
  return { ...(about as unknown as Omit<BuiltKernel, 'name' | 'image'>), name, image: join(folder, IMAGE) };
}
