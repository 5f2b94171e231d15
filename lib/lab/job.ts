// SPDX-License-Identifier: Apache-2.0
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';
import type { Progress } from './cache.ts';
import { type InitJob, JOB_FOR_NODE, JOB_ROM, JOB_SCRIPT, jobScript, PACKAGE_FOLDER } from './init_script.ts';
import { packedArguments, type WaitingJob } from './pack.ts';
import { type Contents, contentsOf, type Files, writeArchive } from './payload.ts';

/** A program of the package's own, which starts from the pack where there is one. */
export interface PackedProgram {
  readonly entry: string;
  readonly args: readonly string[];
  /** Its text, when it is no file of the package. */
  readonly text?: string | undefined;
}

export interface Job extends InitJob {
  readonly files: Files;
  readonly program?: PackedProgram | undefined;
  /** A Node waits for the program in the machine. */
  readonly waiting: boolean;
}

/** Everything that makes one run in the machine differ from another: a compressed archive. */
export async function jobArchive(folder: string, job: Job, progress: Progress): Promise<Buffer> {
  const { program, waiting } = job;
  const contents: Record<string, Buffer | string> = { ...(await contentsOf(job.files, progress)) };
  if (program?.text !== undefined) contents[join(PACKAGE_FOLDER, program.entry)] = program.text;
  if (program && waiting) Object.assign(contents, forNode(program, job.env));
  contents[JOB_SCRIPT] = jobScript(waiting ? { ...job, command: undefined } : job);
  const file = join(folder, 'job.cpio');
  await writeArchive(file, contents);
  return gzipSync(await readFile(file));
}

function forNode({ entry, args }: PackedProgram, env: WaitingJob['env']): Contents {
  // Without Node's own flags and the loader.
  const argv = packedArguments(PACKAGE_FOLDER, entry, args).slice(-1 - args.length);
  return { [JOB_FOR_NODE]: JSON.stringify({ argv, env } satisfies WaitingJob) };
}

/** The job as init reads it where a ROM would be; undefined when there is not enough room. */
export function jobRom(archive: Buffer): Buffer | undefined {
  const head = Buffer.from(`${JOB_ROM.word} ${archive.length}\n`);
  if (head.length + archive.length > JOB_ROM.bytes) return undefined;
  const rom = Buffer.alloc(JOB_ROM.bytes, 0xff);
  head.copy(rom);
  archive.copy(rom, head.length);
  return rom;
}
