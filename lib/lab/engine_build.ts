// SPDX-License-Identifier: Apache-2.0
import { copyFile, mkdir, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { Apt, lastWords } from './apt.ts';
import { cacheEntry, type Entry, type Progress, sha256File } from './cache.ts';
import {
  applyEdit,
  buildKey,
  COMPILER_FLAGS,
  CONFIGURE_OPTIONS,
  findTarball,
  SOURCE_EDITS,
  type SourceFile,
} from './engine_source.ts';
import { type Finished, run } from './process.ts';

const SUITE = 'trixie';
const UPSTREAM = '3.0+dfsg';
const REPORT_EVERY = 40;

/** Names of the Debian packages that building the engine needs beyond a plain system. */
export const BUILD_PACKAGES: readonly string[] = ['g++', 'make', 'xz-utils'];

/**
 * The emulator built from Debian's source package, from the cache or made now (one to two minutes).
 *
 * @throws any error that prevented the build; the caller may have another engine
 */
export function builtEngine(progress: Progress): Promise<Entry> {
  return cacheEntry(`engine/bochs-${UPSTREAM}-${buildKey()}`, progress, (folder) => build(folder, progress));
}

async function build(folder: string, progress: Progress): Promise<Record<string, unknown>> {
  const compiler = await findCompiler(progress);
  const work = join(folder, 'work');
  await mkdir(work);
  const tarball = await fetchSource(work, progress);
  await must(
    run('tar', ['-xf', tarball.name], { cwd: work, signal: progress.signal }),
    'unpacking the source',
  );
  const name = (await readdir(work, { withFileTypes: true })).find((entry) => entry.isDirectory())?.name;
  if (!name) throw new Error(`${tarball.name} holds no folder`);
  const source = join(work, name);
  for (const edit of SOURCE_EDITS) {
    const file = join(source, edit.file);
    await writeFile(file, applyEdit(await readFile(file, 'latin1'), edit), 'latin1');
  }
  await compile(source, progress);
  await copyFile(join(source, 'bochs'), join(folder, 'bochs'));
  await rm(work, { recursive: true });
  return {
    version: tarball.version,
    source: tarball,
    edits: SOURCE_EDITS.map(({ file, why }) => ({ file, why })),
    configure: CONFIGURE_OPTIONS,
    flags: COMPILER_FLAGS,
    compiler,
  };
}

async function findCompiler({ signal }: Progress): Promise<string> {
  const version = await must(run('g++', ['--version'], { signal }), 'looking for a C++ compiler');
  await must(run('make', ['--version'], { signal }), 'looking for make');
  return version.stdout.split('\n')[0] ?? '';
}

async function fetchSource(work: string, progress: Progress): Promise<SourceFile> {
  const apt = await Apt.open(`source-${SUITE}`, 'deb-src', () => [SUITE], progress);
  const index = await apt.run('apt-cache', ['showsrc', 'bochs']);
  const tarball = findTarball(index.stdout, UPSTREAM);
  if (!tarball) throw new Error(`the archive has no source of bochs ${UPSTREAM}`);
  progress.onProgress?.(`downloading the source of bochs ${tarball.version}`);
  // The archive may lack a part we do not need, and then apt's status says failure: the tarball is judged by its
  // own size and hash, which come from the signed index.
  const fetched = await apt.run('apt-get', ['source', '--download-only', `bochs=${tarball.version}`], {
    cwd: work,
  });
  const file = join(work, tarball.name);
  const seen = await stat(file).catch(() => undefined);
  if (!seen) throw new Error(`the source of bochs could not be downloaded: ${lastWords(fetched)}`);
  if (seen.size !== tarball.size || (await sha256File(file)) !== tarball.sha256) {
    throw new Error(`${tarball.name} is not what the signed index names (size or SHA-256)`);
  }
  return tarball;
}

async function compile(source: string, { signal, onProgress }: Progress): Promise<void> {
  onProgress?.('configuring the emulator');
  const env = { CFLAGS: COMPILER_FLAGS, CXXFLAGS: COMPILER_FLAGS };
  await must(run('./configure', CONFIGURE_OPTIONS, { cwd: source, env, signal }), 'configuring the emulator');
  let files = 0;
  const onLine = (line: string): void => {
    if (!/^(g\+\+|c\+\+|gcc|cc) /.test(line)) return;
    if (files++ % REPORT_EVERY === 0)
      onProgress?.(`building the emulator, once, 1-2 minutes (file ${files})`);
  };
  const jobs = String(Math.max(1, availableParallelism()));
  await must(
    run('make', ['-j', jobs], { cwd: source, onLine, signal, timeoutMs: 1_800_000 }),
    'building the emulator',
  );
  await must(run('strip', ['bochs'], { cwd: source, signal }), 'building the emulator');
}

async function must(finished: Promise<Finished>, what: string): Promise<Finished> {
  const done = await finished;
  if (done.status !== 0) throw new Error(`${what} failed: ${lastWords(done)}`);
  return done;
}
