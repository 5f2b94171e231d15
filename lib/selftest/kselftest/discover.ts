// SPDX-License-Identifier: Apache-2.0
import { closeSync, existsSync, openSync, readdirSync, readFileSync, readSync, statSync } from 'node:fs';
import { basename, dirname, join, relative } from 'node:path';

/** One command line of a folder of kernel selftests. Paths are relative to that folder. */
export interface Program {
  readonly id: string;
  readonly file: string;
  readonly args: readonly string[];
}

export interface ProgramSet {
  /** As the user named it, for command lines. */
  readonly origin: string;
  readonly folder: string;
  readonly programs: readonly Program[];
}

/** A folder of selftests cannot be read, or holds none. */
export class KselftestError extends Error {
  override readonly name = 'KselftestError';
}

const LIST = 'kselftest-list.txt';

/**
 * Finds the programs to run: those of kselftest-list.txt (what `make install` of the kernel's selftests leaves),
 * else the command lines of `.test` files, else every ELF program and shell script of the folder that may be
 * executed. A path to one of these files does too.
 *
 * @throws KselftestError
 */
export function discover(path: string): ProgramSet {
  if (!existsSync(path)) throw new KselftestError(`${path} is not there`);
  const set = { origin: path, ...(statSync(path).isDirectory() ? inFolder(path) : oneFile(path)) };
  if (set.programs.length === 0) {
    throw new KselftestError(`${path} holds no ${LIST}, no .test file and no program that may be executed`);
  }
  return set;
}

type Found = Omit<ProgramSet, 'origin'>;

function inFolder(folder: string): Found {
  if (existsSync(join(folder, LIST))) return { folder, programs: listed(folder) };
  const files = readdirSync(folder, { recursive: true, encoding: 'utf8' }).sort();
  const commands = files.filter((file) => file.endsWith('.test'));
  const programs =
    commands.length > 0
      ? commands.map((file) => commandFile(folder, file))
      : files.filter((file) => isProgram(join(folder, file))).map((file) => program(file));
  return { folder, programs };
}

function oneFile(path: string): Found {
  const folder = dirname(path);
  const file = basename(path);
  if (file === LIST) return { folder, programs: listed(folder) };
  if (file.endsWith('.test')) return { folder, programs: [commandFile(folder, file)] };
  return { folder, programs: isProgram(path) ? [program(file)] : [] };
}

function program(file: string): Program {
  return { id: file.replace(/\.sh$/, ''), file, args: [] };
}

/** Lines are `collection:test`, the program being collection/test. */
function listed(folder: string): Program[] {
  return readFileSync(join(folder, LIST), 'utf8')
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '')
    .map((line) => {
      const [, collection, test] = /^([\w.-]+):([\w./-]+)$/.exec(line) ?? [];
      if (!collection || !test) {
        throw new KselftestError(`${join(folder, LIST)}: "${line}" is not COLLECTION:TEST`);
      }
      return program(`${collection}/${test}`);
    });
}

/** A `.test` file holds one command line; its program is looked for beside it and upward to the folder. */
function commandFile(folder: string, file: string): Program {
  const lines = readFileSync(join(folder, file), 'utf8')
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '' && !line.startsWith('#'));
  if (lines.length !== 1) {
    throw new KselftestError(`${join(folder, file)} holds ${lines.length} command lines instead of one`);
  }
  const [name = '', ...args] = words(lines[0]!, join(folder, file));
  let at = dirname(file);
  while (at !== '.' && !existsSync(join(folder, at, name))) at = dirname(at);
  return { id: file.slice(0, -'.test'.length), file: relative('.', join(at, name)), args };
}

function words(line: string, file: string): string[] {
  const found = [...line.matchAll(/((?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+)|(\S)/g)];
  const odd = found.find((match) => match[2] !== undefined);
  if (odd) throw new KselftestError(`${file}: a quote is not closed in "${line}"`);
  return found.map(([word]) =>
    word.replace(
      /\\(.)|'([^']*)'|"((?:[^"\\]|\\.)*)"/g,
      (_, escaped: string | undefined, single: string | undefined, double: string | undefined) =>
        escaped ?? single ?? double?.replace(/\\(.)/g, '$1') ?? '',
    ),
  );
}

function isProgram(path: string): boolean {
  const stat = statSync(path);
  if (!stat.isFile() || (stat.mode & 0o111) === 0 || /\.so(\.\d+)*$/.test(path)) return false;
  const head = Buffer.alloc(18);
  const fd = openSync(path, 'r');
  try {
    readSync(fd, head);
  } finally {
    closeSync(fd);
  }
  // An ELF file of type EXEC or DYN, not an object file.
  const isElf = head.toString('latin1', 0, 4) === '\x7fELF' && [2, 3].includes(head.readUInt16LE(16));
  return isElf || (path.endsWith('.sh') && head.toString('latin1', 0, 2) === '#!');
}
