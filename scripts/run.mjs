// SPDX-License-Identifier: Apache-2.0
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const ROOT = fileURLToPath(new URL('..', import.meta.url)).replace(/\/$/, '');

/**
 * Runs a program, in the project folder unless told otherwise, quietly; what it printed is shown only when it fails.
 */
export function run(command, args, what, env = {}, cwd = ROOT) {
  const done = spawnSync(command, args, {
    cwd,
    env: { ...process.env, ...env },
    encoding: 'utf8',
    maxBuffer: 64 * 1024 * 1024,
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  if (done.error) throw new Error(`${what}: ${command} does not start: ${done.error.message}`);
  if (done.status !== 0) {
    const text = `${done.stdout}${done.stderr}`.trim().split('\n').slice(-40).join('\n');
    const how = done.signal ? `was ended by ${done.signal}` : `failed with status ${done.status}`;
    throw new Error(`${what} ${how}:\n${text}`);
  }
  return done.stdout;
}

/** node-gyp and cmake-js download headers unless told that this Node's own are beside it. */
export function nodeHeaders() {
  const prefix = dirname(dirname(process.execPath));
  const there = existsSync(join(prefix, 'include/node/node.h'));
  return there ? { npm_config_nodedir: prefix } : {};
}

/** Runs the main function of a script: a failure is one message and exit status 3, not a stack trace. */
export async function script(main) {
  try {
    process.exitCode = (await main()) ?? 0;
  } catch (error) {
    process.stderr.write(`nvmx: ${error.message}\n`);
    process.exitCode = 3;
  }
}

/** One line of progress with the time since the start. */
export function sayer() {
  const begin = Date.now();
  return (text) =>
    process.stderr.write(`[${((Date.now() - begin) / 1000).toFixed(0).padStart(3)} s] ${text}\n`);
}
