// SPDX-License-Identifier: Apache-2.0
import { randomInt } from 'node:crypto';
import {
  MachineError,
  parseMatrix,
  parseSetting,
  type Selftest,
  SettingError,
  type Settings,
  select,
  suites,
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
  STATUS,
  shard,
  UsageError,
  wholeNumber,
} from './options.ts';

import { REPORTER_NAMES, runAndReport } from './report.ts';

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

  const rounds = (repeat ?? 1) * (variants?.length ?? 1);
  return await runAndReport(
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
      lab: labMachine(values),
    },
    {
      reporter: reporterName,
      output: values.output,
      evidence: values.evidence,
      console: values.console,
      total: durationMs === undefined ? tests.length * rounds : undefined,
    },
  );
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
