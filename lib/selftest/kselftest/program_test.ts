// SPDX-License-Identifier: Apache-2.0
import { spawn } from 'node:child_process';
import { accessSync, constants } from 'node:fs';
import { dirname, join } from 'node:path';
import { selftest } from '../engine/define.ts';
import type { Observations, Selftest } from '../engine/model.ts';
import { SkipError } from '../engine/requirements.ts';
import type { Program, ProgramSet } from './discover.ts';
import { failedAssertion, parseTap, skipReason } from './output.ts';

/** Exit statuses of the kernel's selftests (tools/testing/selftests/kselftest.h, and KVM's assertions). */
const SKIP = 4;
const ASSERTION = 254;
const TIMED_OUT = 124;

const OUTPUT_LIMIT = 1 << 20;
const SHOWN_LINES = 20;

/** Kernel selftests as tests of ours: passed when they exit with 0 and none of their sub-tests fails. */
export function programTests({ folder, origin, programs }: ProgramSet): Selftest[] {
  return programs.map((program) =>
    selftest({
      id: program.id,
      title: [program.file, ...program.args].join(' '),
      command: `nvmx kselftest ${origin} ${program.id}`,
      requires: [{ name: program.file, missing: () => notThere(join(folder, program.file)) }],
      timeoutMs: 120_000,
      expectations: { any: { outcome: 'exit 0', failed: [] } },
      body: async ({ signal }) => await judge(await run(folder, program, signal)),
    }),
  );
}

function notThere(path: string): string | undefined {
  try {
    accessSync(path, constants.X_OK);
    return undefined;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    return code === 'ENOENT' ? `${path} was not built` : `${path} cannot be executed: ${code}`;
  }
}

interface Ended {
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

async function judge({ status, signal, stdout, stderr }: Ended): ReturnType<Selftest['body']> {
  const tap = parseTap(stdout);
  if (status === SKIP || (status === 0 && tap.skipped !== undefined && tap.subtests.length === 0)) {
    throw new SkipError(tap.skipped ?? skipReason(stdout || stderr));
  }
  const failed = tap.subtests.filter((one) => one.verdict === 'fail').map((one) => one.name);
  const observed: Observations = { outcome: describe(status, signal, stdout, stderr, tap.broken), failed };
  const good = observed['outcome'] === 'exit 0' && failed.length === 0;
  const tail = `${stdout.trimEnd()}\n${stderr.trimEnd()}`.trim().split('\n').slice(-SHOWN_LINES);
  return {
    observed,
    evidence: {
      ...(tap.subtests.length > 0 ? { subtests: tap.subtests.length } : {}),
      ...(good ? {} : { output: tail }),
    },
    subtests: tap.subtests,
  };
}

function describe(
  status: number | null,
  signal: NodeJS.Signals | null,
  stdout: string,
  stderr: string,
  broken: string | undefined,
): string {
  if (signal) return `killed by ${signal}`;
  const assertion = failedAssertion(`${stderr}\n${stdout}`);
  const more = [
    ...(status === ASSERTION && !assertion ? ['an assertion failed'] : []),
    ...(assertion ? [`assertion failed: ${assertion}`] : []),
    ...(status === TIMED_OUT ? ['its own time limit'] : []),
    ...(broken ? [broken] : []),
  ];
  return [`exit ${status}`, ...more].join(': ');
}

/** Runs it in its own folder and its own process group, which an abort ends. */
async function run(folder: string, { file, args }: Program, signal: AbortSignal): Promise<Ended> {
  const path = join(folder, file);
  const child = spawn(path, args, { cwd: dirname(path), detached: true, stdio: ['ignore', 'pipe', 'pipe'] });
  const end = (): void => {
    if (child.pid === undefined) return;
    try {
      process.kill(-child.pid, 'SIGKILL');
    } catch {
      // It has ended by itself.
    }
  };
  signal.addEventListener('abort', end, { once: true });
  const output = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (text: string) => {
      output[name] = (output[name] + text).slice(-OUTPUT_LIMIT);
    });
  }
  try {
    return await new Promise<Ended>((resolve, reject) => {
      child.once('error', (error) => reject(new Error(`${file} cannot be started: ${error.message}`)));
      child.once('close', (status, by) => resolve({ status, signal: by, ...output }));
    });
  } finally {
    signal.removeEventListener('abort', end);
    // Children it left behind.
    end();
  }
}
