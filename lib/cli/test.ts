// SPDX-License-Identifier: Apache-2.0
import { randomInt } from 'node:crypto';
import { closeSync, mkdirSync, openSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
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
  MachineError,
  parseMatrix,
  parseSetting,
  type RunReport,
  runSelftests,
  type Selftest,
  SettingError,
  type Settings,
  select,
  suites,
  type TestResult,
  testsOf,
} from '../selftest/index.ts';
import {
  LAB_OPTIONS,
  labGiven,
  labMachine,
  labOnly,
  machineChoice,
  oneOf,
  parse,
  progress,
  STATUS,
  shard,
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

export async function testCommand(args: string[], signal: AbortSignal): Promise<number> {
  const { values, positionals } = parse(args, {
    machine: { type: 'string' },
    ...LAB_OPTIONS,
    reporter: { type: 'string', default: 'spec' },
    output: { type: 'string' },
    evidence: { type: 'string' },
    list: { type: 'boolean', default: false },
    timeout: { type: 'string' },
    seed: { type: 'string' },
    expect: { type: 'string', default: 'auto' },
    set: { type: 'string', multiple: true, default: [] },
    repeat: { type: 'string' },
    duration: { type: 'string' },
    jobs: { type: 'string' },
    shard: { type: 'string' },
    matrix: { type: 'string', multiple: true, default: [] },
    'fail-fast': { type: 'boolean', default: false },
    disposable: { type: 'boolean', default: false },
    console: { type: 'boolean', default: false },
  });
  const machine = machineChoice(values.machine);
  const reporterName = oneOf('reporter', values.reporter, REPORTER_NAMES);
  const expect = oneOf('expect', values.expect, ['auto', 'stock', 'patched']);
  const seconds = (option: 'timeout' | 'duration'): number | undefined => {
    const text = values[option];
    return text === undefined ? undefined : 1000 * wholeNumber(option, text, 1, 86_400);
  };
  const timeoutMs = seconds('timeout');
  const durationMs = seconds('duration');
  const repeat = values.repeat === undefined ? undefined : wholeNumber('repeat', values.repeat, 1, 1e6);
  const jobs = values.jobs === undefined ? undefined : wholeNumber('jobs', values.jobs, 1, 64);
  const seed =
    values.seed === undefined ? randomInt(2 ** 32) : wholeNumber('seed', values.seed, 0, 2 ** 32 - 1);
  if (repeat !== undefined && durationMs !== undefined) {
    throw new UsageError('--repeat and --duration exclude each other');
  }
  labOnly(machine, { ...labGiven(values), jobs: values.jobs });

  const settings = readSettings(values.set);
  const variants = values.matrix.length > 0 ? readMatrix(values.matrix) : undefined;
  const selected = select(testsOf(suites, settings), positionals);
  if (selected.length === 0) {
    throw new UsageError(
      `no test matches ${positionals.map((p) => `"${p}"`).join(' ')}; --list prints their ids`,
    );
  }
  const tests = values.shard === undefined ? selected : shard(selected, values.shard);
  if (values.list) return list(tests);

  using output = values.output === undefined ? undefined : openOutput(values.output);
  const status = progress();
  const terminal: Write = (text) => {
    status.clear();
    process.stdout.write(text);
  };
  const spec = (): Reporter => specReporter(terminal, { color: colors() });
  const make = REPORTERS[reporterName];
  const reporters: Reporter[] = output
    ? [make(output.write), spec()]
    : [reporterName === 'spec' ? spec() : make(terminal)];

  const rounds = (repeat ?? 1) * (variants?.length ?? 1);
  for (const reporter of reporters)
    reporter.begin(durationMs === undefined ? tests.length * rounds : undefined);
  const report = await runSelftests(
    tests,
    {
      machine,
      settings,
      seed,
      expect,
      disposable: values.disposable,
      failFast: values['fail-fast'],
      signal,
      ...(timeoutMs === undefined ? {} : { timeoutMs }),
      ...(repeat === undefined ? {} : { repeat }),
      ...(durationMs === undefined ? {} : { durationMs }),
      ...(jobs === undefined ? {} : { jobs }),
      ...(variants === undefined ? {} : { variants }),
      lab: {
        ...labMachine(values),
        onProgress: status.show,
        ...(values.console ? { onConsole: (text: string) => process.stderr.write(text) } : {}),
      },
    },
    (event) => {
      if (event.event === 'result' && values.evidence !== undefined)
        keepEvidence(values.evidence, event.result);
      for (const reporter of reporters) reporter.event(event);
    },
  );
  for (const reporter of reporters) reporter.end(report);
  return exitStatus(report);
}

export function exitStatus({ summary }: Pick<RunReport, 'summary'>): number {
  if (summary.failed > 0) return STATUS.failed;
  return summary.passed === 0 ? STATUS.nothingRan : STATUS.ok;
}

function list(tests: readonly Selftest[]): number {
  for (const test of tests) process.stdout.write(`${test.id}\t${test.title}\n`);
  return STATUS.ok;
}

function readSettings(texts: readonly string[]): Settings {
  try {
    return Object.assign({}, ...texts.map((text) => parseSetting(suites, text))) as Settings;
  } catch (error) {
    if (error instanceof SettingError) throw new UsageError(`--set: ${error.message}`);
    throw error;
  }
}

function readMatrix(texts: readonly string[]): ReturnType<typeof parseMatrix> {
  try {
    return parseMatrix(texts.flatMap((text) => text.split(/\s+/).filter((part) => part !== '')));
  } catch (error) {
    if (error instanceof MachineError) throw new UsageError(`--matrix: ${error.message}`);
    throw error;
  }
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
