// SPDX-License-Identifier: Apache-2.0
import { closeSync, mkdirSync, openSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import type { ParseArgsConfig } from 'node:util';
import {
  githubReporter,
  jsonReporter,
  junitReporter,
  ktapReporter,
  type Reporter,
  specReporter,
  type Write,
} from '../report/index.ts';
import {
  type MachineChoice,
  type RunReport,
  type RunRequest,
  runSelftests,
  type Selftest,
  type TestResult,
} from '../selftest/index.ts';
import {
  DAY_S,
  LAB_OPTIONS,
  type LabValues,
  labGiven,
  labOnly,
  machineChoice,
  oneOf,
  progress,
  STATUS,
  UsageError,
  wholeNumber,
} from './options.ts';

export const REPORTERS = {
  spec: specReporter,
  ktap: ktapReporter,
  json: jsonReporter,
  junit: junitReporter,
  github: githubReporter,
} as const;
export const REPORTER_NAMES = Object.keys(REPORTERS) as (keyof typeof REPORTERS)[];

/** Options of every command that runs tests. */
export const RUN_OPTIONS = {
  machine: { type: 'string' },
  ...LAB_OPTIONS,
  reporter: { type: 'string', default: 'spec' },
  output: { type: 'string' },
  evidence: { type: 'string' },
  list: { type: 'boolean', default: false },
  timeout: { type: 'string' },
  jobs: { type: 'string' },
  'fail-fast': { type: 'boolean', default: false },
  console: { type: 'boolean', default: false },
} as const satisfies ParseArgsConfig['options'];

type RunValues = LabValues & { readonly [K in 'machine' | 'timeout' | 'jobs']?: string | undefined } & {
  readonly reporter: string;
};

/** What these options say, checked. @throws UsageError */
export function runChoices(values: RunValues): {
  machine: MachineChoice;
  reporter: keyof typeof REPORTERS;
  limits: { timeoutMs?: number; jobs?: number };
} {
  const machine = machineChoice(values.machine);
  const reporter = oneOf('reporter', values.reporter, REPORTER_NAMES);
  const { timeout, jobs } = values;
  const limits = {
    ...(timeout === undefined ? {} : { timeoutMs: 1000 * wholeNumber('timeout', timeout, 1, DAY_S) }),
    ...(jobs === undefined ? {} : { jobs: wholeNumber('jobs', jobs, 1, 64) }),
  };
  labOnly(machine, { ...labGiven(values), jobs });
  return { machine, reporter, limits };
}

export function list(tests: readonly Selftest[]): number {
  for (const test of tests) process.stdout.write(`${test.id}\t${test.title}\n`);
  return STATUS.ok;
}

/** How a command that runs tests shows them. */
export interface ReportOptions {
  readonly reporter: keyof typeof REPORTERS;
  readonly output: string | undefined;
  readonly evidence: string | undefined;
  readonly console: boolean;
  /** How many results there will be, where that is known. */
  readonly total: number | undefined;
}

/** Runs tests, shows what happens as it happens, and returns the exit status. */
export async function runAndReport(
  tests: readonly Selftest[],
  request: RunRequest,
  options: ReportOptions,
): Promise<number> {
  using output = options.output === undefined ? undefined : openOutput(options.output);
  const status = progress();
  const terminal: Write = (text) => {
    status.clear();
    process.stdout.write(text);
  };
  const spec = (): Reporter => specReporter(terminal, { color: colors() });
  const make = REPORTERS[options.reporter];
  const reporters: Reporter[] = output
    ? [make(output.write), spec()]
    : [options.reporter === 'spec' ? spec() : make(terminal)];
  for (const reporter of reporters) reporter.begin(options.total);
  const lab = {
    ...request.lab,
    onProgress: status.show,
    ...(options.console ? { onConsole: (text: string) => process.stderr.write(text) } : {}),
  };
  const report = await runSelftests(tests, { ...request, lab }, (event) => {
    if (event.event === 'result' && options.evidence !== undefined)
      keepEvidence(options.evidence, event.result);
    for (const reporter of reporters) reporter.event(event);
  });
  for (const reporter of reporters) reporter.end(report);
  return exitStatus(report);
}

export function exitStatus({ summary }: Pick<RunReport, 'summary'>): number {
  if (summary.failed > 0) return STATUS.failed;
  return summary.passed === 0 ? STATUS.nothingRan : STATUS.ok;
}

/** One folder a test: what it saw as JSON, and what the kernel said meanwhile. */
function keepEvidence(folder: string, result: TestResult): void {
  const round = result.iteration === undefined ? [] : [`round-${result.iteration}`];
  const path = join(folder, ...(result.variant === undefined ? [] : [result.variant]), result.id, ...round);
  mkdirSync(path, { recursive: true });
  writeFileSync(join(path, 'result.json'), `${JSON.stringify(result, null, 2)}\n`);
  if (result.kernelLog) writeFileSync(join(path, 'kernel.log'), `${result.kernelLog.join('\n')}\n`);
}

/** Opened before the run: a report that cannot be written should not cost a run first. */
export function openOutput(path: string): { write: Write } & Disposable {
  let fd: number;
  try {
    fd = openSync(path, 'w');
  } catch (error) {
    throw new UsageError(`--output ${path} cannot be written: ${(error as Error).message}`);
  }
  return { write: (text) => writeSync(fd, text), [Symbol.dispose]: () => closeSync(fd) };
}

function colors(): boolean {
  return process.stdout.isTTY === true && !process.env['NO_COLOR'];
}
