// SPDX-License-Identifier: Apache-2.0
import { writeFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { type LabOptions, type LabResult, runCommandInLab } from '../lab/index.ts';
import {
  type Command,
  DAY_S,
  LAB_OPTIONS,
  labMachine,
  parse,
  progress,
  runVerb,
  STATUS,
  UsageError,
  wholeNumber,
} from './options.ts';

export const labCommand: Command = (args, signal) => runVerb('lab', { run, shell }, args, signal);

async function run(args: string[], signal: AbortSignal): Promise<number> {
  const { values, positionals } = parse(args, {
    ...LAB_OPTIONS,
    file: { type: 'string', multiple: true, default: [] },
    fetch: { type: 'string', multiple: true, default: [] },
    timeout: { type: 'string' },
  });
  if (positionals.length === 0)
    throw new UsageError('lab run needs a command: nvmx lab run -- COMMAND [ARGUMENT...]');
  const inward = values.file.map((text) => pair('file', text));
  const outward = values.fetch.map((text) => pair('fetch', text));
  const timeout = values.timeout === undefined ? undefined : wholeNumber('timeout', values.timeout, 1, DAY_S);
  const status = progress();
  const result = await runCommandInLab(positionals, {
    ...labMachine(values),
    files: Object.fromEntries(
      inward.map(([outside, inside]) => [absolute('file', inside), resolve(outside)]),
    ),
    fetch: outward.map(([inside]) => absolute('fetch', inside)),
    ...(timeout === undefined ? {} : { timeoutMs: timeout * 1000 }),
    signal,
    onProgress: status.show,
    onLine: (line) => {
      status.clear();
      process.stdout.write(`${line}\n`);
    },
    onConsole: (text) => {
      status.clear();
      process.stderr.write(text);
    },
  });
  status.clear();
  signal.throwIfAborted();
  let missing = 0;
  for (const [inside, outside] of outward) {
    const bytes = result.fetched.get(inside);
    if (bytes) writeFileSync(outside, bytes);
    else {
      missing++;
      process.stderr.write(`nvmx: ${inside} was not brought out: it is no file in the machine\n`);
    }
  }
  const ended = endStatus(result);
  return ended === STATUS.ok && missing > 0 ? STATUS.failed : ended;
}

async function shell(args: string[], signal: AbortSignal): Promise<number> {
  const { values, positionals } = parse(args, {
    ...LAB_OPTIONS,
    file: { type: 'string', multiple: true, default: [] },
  });
  const { stdin, stdout } = process;
  const status = progress();
  const terminal: LabOptions['terminal'] = {
    input: stdin,
    output: stdout,
    ...(stdout.rows ? { rows: stdout.rows, columns: stdout.columns } : {}),
  };
  const inward = values.file.map((text) => pair('file', text));
  try {
    const result = await runCommandInLab(positionals.length > 0 ? positionals : ['/bin/sh', '-l'], {
      ...labMachine(values),
      files: Object.fromEntries(
        inward.map(([outside, inside]) => [absolute('file', inside), resolve(outside)]),
      ),
      terminal,
      timeoutMs: DAY_S * 1000,
      // Nobody types all the time.
      silenceMs: DAY_S * 1000,
      signal,
      onProgress: (text) => {
        // From here on the keys belong to the machine, Ctrl-C too.
        if (text.startsWith('Linux is up')) {
          status.clear();
          if (stdin.isTTY) stdin.setRawMode(true);
          process.stderr.write('a shell in the lab machine; "exit" ends it\r\n');
        } else status.show(text);
      },
    });
    signal.throwIfAborted();
    return endStatus(result);
  } finally {
    if (stdin.isTTY) stdin.setRawMode(false);
    status.clear();
  }
}

/** The command's status; a machine that ended otherwise could not be used, and says why. */
function endStatus(result: LabResult): number {
  if (result.outcome === 'exited') return result.exitStatus ?? STATUS.failed;
  const why = result.reason ? `: ${result.reason}` : '';
  process.stderr.write(`nvmx: the machine ended (${result.outcome}${why}); console: ${result.consoleFile}\n`);
  return STATUS.machine;
}

function pair(option: string, text: string): [string, string] {
  const at = text.lastIndexOf(':');
  const [from, to] = [text.slice(0, at), text.slice(at + 1)];
  if (at < 0 || from === '' || to === '') throw new UsageError(`--${option} is "${text}"; it takes FROM:TO`);
  return [from, to];
}

function absolute(option: string, inside: string): string {
  if (inside.startsWith('/')) return inside;
  throw new UsageError(`--${option}: "${inside}" is inside the machine, where paths begin with /`);
}
