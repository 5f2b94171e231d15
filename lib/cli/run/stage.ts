// SPDX-License-Identifier: Apache-2.0
import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import * as nodeModule from 'node:module';
import { dirname, join, relative, resolve, sep } from 'node:path';
import { fileURLToPath } from 'node:url';
import { UsageError } from '../options.ts';

/** Where the script's folder is inside the lab machine. */
export const INSIDE = '/run-script';
const PACKAGE_INSIDE = '/nvmx';
const ROOT = fileURLToPath(new URL('../../..', import.meta.url));
const LIMIT_BYTES = 200 * 1024 * 1024;
const SKIPPED = new Set(['.git', '.hg', 'node_modules/nvmx', 'node_modules/.cache']);

/** A script that Node can run, and the folder it may import from and read. */
export interface Script {
  /** Absolute path. */
  readonly entry: string;
  readonly folder: string;
  readonly nodeFlags: readonly string[];
}

/**
 * Finds the script and makes JavaScript of TypeScript, in `temporary`.
 * @throws UsageError
 */
export function stageScript(file: string, folder: string | undefined, temporary: string): Script {
  const entry = resolve(file);
  if (!existsSync(entry) || !statSync(entry).isFile()) throw new UsageError(`there is no script ${file}`);
  const root = resolve(folder ?? dirname(entry));
  if (!entry.startsWith(root + sep)) throw new UsageError(`${file} is not in the folder ${root}`);
  if (/\.(js|mjs|cjs)$/.test(entry)) return { entry, folder: root, nodeFlags: [] };
  if (!/\.m?ts$/.test(entry)) throw new UsageError(`${file} is neither JavaScript nor TypeScript`);
  const compiler = findCompiler(entry);
  if (compiler) return compile(compiler, entry, root, join(temporary, 'script'));
  const flags = ownTypeScriptFlags();
  if (flags) return { entry, folder: root, nodeFlags: flags };
  throw new UsageError(
    `${file} is TypeScript, which Node ${process.version} cannot run by itself: install typescript beside it (npm install typescript), or use Node 22.13 or newer`,
  );
}

/** What makes this Node strip types, if it can. */
function ownTypeScriptFlags(): string[] | undefined {
  if (!('stripTypeScriptTypes' in nodeModule)) return undefined;
  const isDefault = Boolean((process.features as { typescript?: unknown }).typescript);
  return isDefault ? [] : ['--experimental-strip-types'];
}

/** The tsc of the script's own project, or ours. */
function findCompiler(entry: string): string | undefined {
  for (const from of [entry, join(ROOT, 'package.json')]) {
    try {
      const path = nodeModule.createRequire(from).resolve('typescript/package.json');
      const { bin } = JSON.parse(readFileSync(path, 'utf8')) as { bin?: { tsc?: string } };
      if (bin?.tsc) return join(dirname(path), bin.tsc);
    } catch {
      // not there
    }
  }
  return undefined;
}

/** A copy of the folder in which ES modules stand beside the TypeScript that the script reaches. */
function compile(compiler: string, entry: string, folder: string, temporary: string): Script {
  // Under its own absolute path: what the script imports from elsewhere must not be compiled beside its source.
  const out = join(temporary, folder);
  for (const file of filesOf(folder)) {
    mkdirSync(dirname(join(out, file)), { recursive: true });
    cpSync(join(folder, file), join(out, file));
  }
  const options = [
    '--module esnext --moduleResolution bundler --target es2023 --noCheck --skipLibCheck --inlineSourceMap',
  ];
  options.push('--rewriteRelativeImportExtensions --ignoreConfig --listEmittedFiles');
  const argv = [entry, '--rootDir', '/', '--outDir', temporary, ...options.join(' ').split(' ')];
  const { status, stdout, error } = spawnSync(process.execPath, [compiler, ...argv], { encoding: 'utf8' });
  const made = join(out, relative(folder, entry)).replace(/ts$/, 'js');
  if (status !== 0 || !existsSync(made)) {
    throw new UsageError(`${entry} does not compile:\n${(error?.message ?? stdout).trim()}`);
  }
  const emitted = [...stdout.matchAll(/^TSFILE: (.*)$/gm)].map(([, file]) => file!);
  const outside = emitted.find((file) => relative(out, file).startsWith('..'));
  if (outside !== undefined) {
    const source = `/${relative(temporary, outside).replace(/js$/, 'ts')}`;
    throw new UsageError(
      `${entry} imports ${source}, which is not in ${folder}: name a folder that holds both with --folder`,
    );
  }
  const manifest = join(out, 'package.json');
  const own = existsSync(manifest) ? (JSON.parse(readFileSync(manifest, 'utf8')) as object) : {};
  writeFileSync(manifest, JSON.stringify({ ...own, type: 'module' }));
  return { entry: made, folder: out, nodeFlags: [] };
}

/** Files below a folder, relative to it. @throws UsageError when they are too much for the machine */
function filesOf(folder: string): string[] {
  const found: string[] = [];
  let bytes = 0;
  const walk = (below: string) => {
    for (const entry of readdirSync(join(folder, below), { withFileTypes: true })) {
      const path = join(below, entry.name);
      if (SKIPPED.has(path)) continue;
      if (entry.isDirectory()) {
        walk(path);
        continue;
      }
      const stat = statSync(join(folder, path), { throwIfNoEntry: false });
      if (!stat?.isFile()) continue;
      bytes += stat.size;
      if (bytes > LIMIT_BYTES) {
        throw new UsageError(
          `${folder} holds more than ${LIMIT_BYTES >> 20} MiB: put the script into a folder of its own, or name one with --folder`,
        );
      }
      found.push(path);
    }
  };
  walk('');
  return found;
}

/** What the machine gets: the folder, and an `nvmx` that leads to the package it already has. */
export function labFiles(
  script: Script,
  temporary: string,
): { files: Record<string, string>; entry: string } {
  const files: Record<string, string> = {};
  for (const file of filesOf(script.folder)) files[join(INSIDE, file)] = join(script.folder, file);
  const { exports } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as {
    exports: Record<string, string | { default: string }>;
  };
  const stub = join(temporary, 'nvmx');
  mkdirSync(stub);
  const entries: Record<string, string> = {};
  for (const [name, target] of Object.entries(exports)) {
    if (typeof target === 'string') continue;
    const file = `${name === '.' ? 'index' : name.slice(2).replaceAll('/', '-')}.js`;
    writeFileSync(join(stub, file), `export * from '${join(PACKAGE_INSIDE, target.default)}';\n`);
    files[`/node_modules/nvmx/${file}`] = join(stub, file);
    entries[name] = `./${file}`;
  }
  writeFileSync(join(stub, 'package.json'), JSON.stringify({ type: 'module', exports: entries }));
  files['/node_modules/nvmx/package.json'] = join(stub, 'package.json');
  return { files, entry: join(INSIDE, relative(script.folder, script.entry)) };
}
