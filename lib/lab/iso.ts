// SPDX-License-Identifier: Apache-2.0
import { existsSync } from 'node:fs';
import { appendFile, copyFile, mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { lastWords } from './apt.ts';
import type { Progress } from './cache.ts';
import { fallbackDebianPackages } from './engine.ts';
import { LabError } from './errors.ts';
import { CommandMissingError, run } from './process.ts';

const ISOLINUX = '/usr/lib/ISOLINUX/isolinux.bin';
const LDLINUX = '/usr/lib/syslinux/modules/bios/ldlinux.c32';

/** Makes a CD that boots the kernel, for an engine that cannot place images in memory. */
export async function writeBootCd(
  folder: string,
  kernel: Uint8Array,
  archives: readonly string[],
  commandLine: string,
  { signal }: Progress,
): Promise<string> {
  const missing = [ISOLINUX, LDLINUX].find((file) => !existsSync(file));
  if (missing) throw missingTools(`${missing} is missing`);
  const tree = join(folder, 'cd');
  const image = join(folder, 'boot.iso');
  await mkdir(tree);
  await copyFile(ISOLINUX, join(tree, 'isolinux.bin'));
  await copyFile(LDLINUX, join(tree, 'ldlinux.c32'));
  await writeFile(join(tree, 'linux'), kernel);
  for (const archive of archives) await appendFile(join(tree, 'initrd'), await readFile(archive));
  const config = `default nvmx\nprompt 0\nlabel nvmx\n kernel /linux\n append initrd=/initrd ${commandLine}\n`;
  await writeFile(join(tree, 'isolinux.cfg'), config);
  const boot = [
    '-b',
    'isolinux.bin',
    '-c',
    'boot.cat',
    '-no-emul-boot',
    '-boot-load-size',
    '4',
    '-boot-info-table',
  ];
  try {
    const done = await run('xorriso', ['-as', 'mkisofs', '-quiet', '-r', '-o', image, ...boot, tree], {
      signal,
    });
    if (done.status !== 0) throw new Error(`xorriso could not write the boot CD: ${lastWords(done)}`);
  } catch (error) {
    throw error instanceof CommandMissingError ? missingTools(error.message) : error;
  }
  await rm(tree, { recursive: true });
  return image;
}

function missingTools(why: string): LabError {
  const advice = `apt-get install ${fallbackDebianPackages.join(' ')}`;
  return new LabError('this emulator needs a boot CD, which cannot be made', why, advice);
}
