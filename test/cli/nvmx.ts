// SPDX-License-Identifier: Apache-2.0
import { type ChildProcess, spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';

export const MAIN = fileURLToPath(new URL('../../dist/cli/main.js', import.meta.url));

export interface Finished {
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Starts the built command line; `finished` resolves when it has ended and its output is closed. */
export function start(
  args: readonly string[],
  options: { env?: NodeJS.ProcessEnv; wrap?: readonly string[] } = {},
): { child: ChildProcess; finished: Promise<Finished>; stderr: () => string } {
  const [program, ...rest] = [...(options.wrap ?? []), process.execPath, MAIN, ...args];
  const child = spawn(program!, rest, {
    env: { ...process.env, NO_COLOR: '1', ...options.env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout!.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr!.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  const finished = new Promise<Finished>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (status, signal) => resolve({ status, signal, stdout, stderr }));
  });
  return { child, finished, stderr: () => stderr };
}

export function nvmx(
  args: readonly string[],
  options: { env?: NodeJS.ProcessEnv; wrap?: readonly string[] } = {},
): Promise<Finished> {
  return start(args, options).finished;
}
