// SPDX-License-Identifier: Apache-2.0
// Loaded before the user's script in the lab machine, whose stderr is the kernel's console: what the script writes
// there goes over the line of its stdout instead, marked, a line at a time.
import { inspect } from 'node:util';
import { STDERR_MARK } from './stdio_mark.ts';

let rest = '';

function send(lines: readonly string[]): void {
  for (const line of lines) process.stdout.write(`${STDERR_MARK}${line}\n`);
}

process.stderr.write = (chunk: string | Uint8Array, ...more: unknown[]): boolean => {
  const lines = (rest + (typeof chunk === 'string' ? chunk : Buffer.from(chunk).toString())).split('\n');
  rest = lines.pop() ?? '';
  send(lines);
  const callback = more.find((argument) => typeof argument === 'function') as (() => void) | undefined;
  if (callback) process.nextTick(callback);
  return true;
};
process.on('exit', () => {
  if (rest !== '') send([rest]);
});
// Node writes the error of a dying process to the file descriptor itself: that text ends on the console only.
process.on('uncaughtExceptionMonitor', (error) => {
  if (process.listenerCount('uncaughtException') === 0) send(inspect(error).split('\n'));
});
process.chdir(process.env['NVMX_RUN_FOLDER'] ?? '/');
