// SPDX-License-Identifier: Apache-2.0
import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';

export interface Finished {
  /** Exit status, or 128 + signal number's stand-in when a signal ended it. */
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface RunOptions {
  readonly cwd?: string;
  readonly env?: Record<string, string>;
  readonly signal?: AbortSignal | undefined;
  readonly timeoutMs?: number;
  /** Each line of stdout and stderr as it comes. */
  readonly onLine?: (line: string) => void;
}

export class CommandMissingError extends Error {
  readonly command: string;
  constructor(command: string) {
    super(`the command ${command} is not installed`);
    this.command = command;
  }
}

const GRACE_MS = 2_000;

/**
 * Runs a command to its end. It gets a process group of its own, so that stopping it stops what it started too.
 *
 * @throws CommandMissingError when there is no such command; the signal's reason when aborted
 */
export async function run(
  command: string,
  args: readonly string[],
  options: RunOptions = {},
): Promise<Finished> {
  options.signal?.throwIfAborted();
  const child = spawn(command, args, {
    cwd: options.cwd,
    env: { ...process.env, LC_ALL: 'C.UTF-8', ...options.env },
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
  });
  const out: Buffer[] = [];
  const err: Buffer[] = [];
  child.stdout.on('data', (chunk: Buffer) => out.push(chunk));
  child.stderr.on('data', (chunk: Buffer) => err.push(chunk));
  if (options.onLine) {
    child.stdout.on('data', splitLines(options.onLine));
    child.stderr.on('data', splitLines(options.onLine));
  }
  const stop = (): void => void stopGroup(child);
  options.signal?.addEventListener('abort', stop, { once: true });
  let timedOut = false;
  const timer = setTimeout(() => {
    timedOut = true;
    stop();
  }, options.timeoutMs ?? 600_000);
  try {
    const status = await new Promise<number>((resolve, reject) => {
      child.once('error', (error: NodeJS.ErrnoException) => {
        reject(error.code === 'ENOENT' ? new CommandMissingError(command) : error);
      });
      child.once('close', (code) => resolve(code ?? 128));
    });
    options.signal?.throwIfAborted();
    const stderr = Buffer.concat(err).toString('utf8') + (timedOut ? '\n(stopped: it took too long)' : '');
    return { status, stdout: Buffer.concat(out).toString('utf8'), stderr };
  } finally {
    clearTimeout(timer);
    options.signal?.removeEventListener('abort', stop);
  }
}

/** Ends a child that was started with `detached`, and everything in its process group. */
export async function stopGroup(child: ChildProcess, graceMs = GRACE_MS): Promise<void> {
  const { pid } = child;
  if (pid === undefined) return;
  const ended = new Promise<void>((resolve) => {
    if (child.exitCode !== null || child.signalCode !== null) resolve();
    else child.once('exit', () => resolve());
  });
  signalGroup(pid, 'SIGTERM');
  const timer = setTimeout(() => signalGroup(pid, 'SIGKILL'), graceMs);
  await ended;
  clearTimeout(timer);
  signalGroup(pid, 'SIGKILL');
}

function signalGroup(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(-pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

/** A listener for chunks of bytes that passes on whole lines; a last line without an end waits for more. */
export function splitLines(onLine: (line: string) => void): (chunk: Buffer) => void {
  let rest: Buffer = Buffer.alloc(0);
  return (chunk) => {
    rest = rest.length === 0 ? chunk : Buffer.concat([rest, chunk]);
    for (let end = rest.indexOf(10); end >= 0; end = rest.indexOf(10)) {
      onLine(rest.subarray(0, end).toString('utf8').replace(/\r$/, ''));
      rest = rest.subarray(end + 1);
    }
  };
}

/** Identifies one life of a process: ids are used again, id and start time together are not. */
export function processIdentity(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    return fields[0] === 'Z' ? undefined : `${pid} ${fields[19]}`;
  } catch {
    return undefined;
  }
}

/** CPU time used so far by a process and its descendants that still run, in clock ticks. */
export function cpuTicks(pid: number): number {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    const own = Number(fields[11]) + Number(fields[12]);
    const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'latin1')
      .trim()
      .split(' ')
      .filter(Boolean);
    return children.reduce((sum, child) => sum + cpuTicks(Number(child)), own);
  } catch {
    return 0;
  }
}
