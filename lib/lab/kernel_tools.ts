// SPDX-License-Identifier: Apache-2.0
import { accessSync, constants, existsSync } from 'node:fs';
import { join } from 'node:path';
import { lastWords } from './apt.ts';
import type { Progress } from './cache.ts';
import { LabError } from './errors.ts';
import { run } from './process.ts';

interface Tool {
  readonly package: string;
  readonly isThere: () => boolean;
}

const program = (name: string, from = name): Tool => ({ package: from, isThere: () => inPath(name) });

const TOOLS: readonly Tool[] = [
  program('gcc'),
  program('make'),
  program('flex'),
  program('bison'),
  program('bc'),
  program('perl'),
  program('xz', 'xz-utils'),
  program('lz4'),
  { package: 'libelf-dev', isThere: () => existsSync('/usr/include/gelf.h') },
];
const PAHOLE = program('pahole', 'dwarves');

function inPath(name: string): boolean {
  return (process.env['PATH'] ?? '').split(':').some((folder) => {
    try {
      accessSync(join(folder || '.', name), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** Debian packages that building a kernel needs and that are not here. */
export function missingBuildPackages(btf: boolean, tools = btf ? [...TOOLS, PAHOLE] : TOOLS): string[] {
  return tools.filter((tool) => !tool.isThere()).map((tool) => tool.package);
}

/**
 * @returns the compiler's name and version
 * @throws LabError with the line to run when something is missing and may not be installed
 */
export async function checkBuildTools(
  { btf, install }: { btf: boolean; install: boolean },
  { signal, onProgress }: Progress,
): Promise<string> {
  let missing = missingBuildPackages(btf);
  if (missing.length > 0 && install && process.getuid?.() === 0) {
    onProgress?.(`installing ${missing.join(', ')}`);
    const env = { DEBIAN_FRONTEND: 'noninteractive' };
    const args = ['install', '-y', '--no-install-recommends', ...missing];
    let done = await run('apt-get', args, { env, signal });
    if (done.status !== 0) {
      await run('apt-get', ['update'], { signal });
      done = await run('apt-get', args, { env, signal });
    }
    if (done.status !== 0) throw needed(missing, lastWords(done));
    missing = missingBuildPackages(btf);
  }
  if (missing.length > 0) throw needed(missing, `not installed: ${missing.join(', ')}`);
  const version = await run('gcc', ['--version'], { signal });
  return version.stdout.split('\n')[0] ?? '';
}

function needed(missing: readonly string[], why: string): LabError {
  const line = `apt-get install --no-install-recommends ${missing.join(' ')}`;
  return new LabError(
    'a kernel cannot be built here yet',
    why,
    process.getuid?.() === 0 ? `${line} (or let --install do it)` : `sudo ${line}`,
  );
}
