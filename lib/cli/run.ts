// SPDX-License-Identifier: Apache-2.0
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { consoleExcerpt, LabError, runInLab } from '../lab/index.ts';
import { probeHost } from '../probe/index.ts';
import {
  DAY_S,
  LAB_OPTIONS,
  labGiven,
  labMachine,
  labOnly,
  machineChoice,
  parse,
  progress,
  UsageError,
  wholeNumber,
} from './options.ts';
import { INSIDE, labFiles, type Script, stageScript } from './run/stage.ts';
import { STDERR_MARK } from './run/stdio_mark.ts';

/** Compiled, this file is dist/cli/run.js. */
const OWN = (name: string) => fileURLToPath(new URL(`./run/${name}`, import.meta.url));

/** nvmx run FILE [options] [-- ARGS]: the script's exit status. */
export async function runCommand(args: string[], signal: AbortSignal): Promise<number> {
  const end = args.indexOf('--');
  const [own, passed] = end < 0 ? [args, []] : [args.slice(0, end), args.slice(end + 1)];
  const { values, positionals } = parse(own, {
    machine: { type: 'string' },
    ...LAB_OPTIONS,
    folder: { type: 'string' },
    timeout: { type: 'string' },
    console: { type: 'boolean', default: false },
  });
  const [file, ...more] = positionals;
  if (file === undefined) throw new UsageError('run takes the script to run: nvmx run FILE.js');
  if (more.length > 0) {
    throw new UsageError(`run takes one script; what is for the script follows "--": -- ${more.join(' ')}`);
  }
  const machine = machineChoice(values.machine);
  labOnly(machine, labGiven(values));
  const lab = labMachine(values);
  const timeout = values.timeout === undefined ? undefined : wholeNumber('timeout', values.timeout, 1, DAY_S);
  const inLab = machine === 'lab' || (machine === 'auto' && !probeHost().nestedVmx.usable);

  const temporary = mkdtempSync(join(tmpdir(), 'nvmx-run-'));
  try {
    const script = stageScript(file, values.folder, temporary);
    if (!inLab) return await runOnHost(script, passed, timeout, signal);
    return await runInMachine(script, passed, temporary, { lab, console: values.console, timeout, signal });
  } finally {
    rmSync(temporary, { recursive: true, force: true });
  }
}

async function runOnHost(
  script: Script,
  args: readonly string[],
  timeout: number | undefined,
  signal: AbortSignal,
): Promise<number> {
  const argv = ['--enable-source-maps', ...script.nodeFlags, '--import', OWN('resolve_self.js')];
  const child = spawn(process.execPath, [...argv, script.entry, ...args], { stdio: 'inherit' });
  const stop = () => child.kill('SIGTERM');
  signal.addEventListener('abort', stop);
  let late = false;
  const limit =
    timeout === undefined
      ? undefined
      : setTimeout(() => {
          late = true;
          child.kill('SIGKILL');
        }, timeout * 1000);
  try {
    const [status, killer] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve, reject) => {
      child.on('error', reject);
      child.on('close', (code, name) => resolve([code, name]));
    });
    if (late) process.stderr.write(`nvmx: the script was stopped after ${timeout} s\n`);
    return status ?? 128 + (killer === null ? 0 : constants.signals[killer]);
  } finally {
    clearTimeout(limit);
    signal.removeEventListener('abort', stop);
  }
}

interface LabChoice {
  lab: ReturnType<typeof labMachine>;
  console: boolean;
  timeout: number | undefined;
  signal: AbortSignal;
}

async function runInMachine(
  script: Script,
  args: readonly string[],
  temporary: string,
  { lab, console, timeout, signal }: LabChoice,
): Promise<number> {
  const status = progress();
  const { files, entry } = labFiles(script, temporary);
  const argv = ['--enable-source-maps', ...script.nodeFlags, '--import', '/nvmx/dist/cli/run/lab_stdio.js'];
  const result = await runInLab([...argv, entry, ...args], {
    ...lab,
    files,
    env: { NVMX_RUN_FOLDER: INSIDE },
    signal,
    ...(timeout === undefined ? {} : { timeoutMs: timeout * 1000 }),
    onProgress: status.show,
    ...(console ? { onConsole: (text: string) => process.stderr.write(text) } : {}),
    onLine: (line) => {
      status.clear();
      const isError = line.startsWith(STDERR_MARK);
      (isError ? process.stderr : process.stdout).write(
        `${isError ? line.slice(STDERR_MARK.length) : line}\n`,
      );
    },
  });
  status.clear();
  signal.throwIfAborted();
  if (result.outcome === 'exited') return result.exitStatus ?? 1;
  throw new LabError(
    `the lab machine ended before the script did: ${result.outcome}${result.reason ? ` (${result.reason})` : ''}`,
    `its console says:\n${consoleExcerpt(result.console) || '(nothing)'}`,
    `read the whole console in ${result.consoleFile}`,
  );
}
