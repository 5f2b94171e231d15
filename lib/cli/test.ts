// SPDX-License-Identifier: Apache-2.0
import { randomInt } from 'node:crypto';
import {
  MachineError,
  parseMatrix,
  parseSetting,
  SettingError,
  type Settings,
  select,
  suites,
  testsOf,
} from '../selftest/index.ts';
import { DAY_S, labMachine, oneOf, parse, shard, UsageError, wholeNumber } from './options.ts';
import { list, RUN_OPTIONS, runAndReport, runChoices } from './report.ts';

export async function testCommand(args: string[], signal: AbortSignal): Promise<number> {
  const { values, positionals } = parse(args, {
    ...RUN_OPTIONS,
    seed: { type: 'string' },
    expect: { type: 'string', default: 'auto' },
    set: { type: 'string', multiple: true, default: [] },
    repeat: { type: 'string' },
    duration: { type: 'string' },
    shard: { type: 'string' },
    matrix: { type: 'string', multiple: true, default: [] },
    disposable: { type: 'boolean', default: false },
  });
  const { machine, reporter, limits } = runChoices(values);
  const expect = oneOf('expect', values.expect, ['auto', 'stock', 'patched']);
  const durationMs =
    values.duration === undefined ? undefined : 1000 * wholeNumber('duration', values.duration, 1, DAY_S);
  const repeat = values.repeat === undefined ? undefined : wholeNumber('repeat', values.repeat, 1, 1e6);
  const seed =
    values.seed === undefined ? randomInt(2 ** 32) : wholeNumber('seed', values.seed, 0, 2 ** 32 - 1);
  if (repeat !== undefined && durationMs !== undefined) {
    throw new UsageError('--repeat and --duration exclude each other');
  }

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
      ...limits,
      ...(repeat === undefined ? {} : { repeat }),
      ...(durationMs === undefined ? {} : { durationMs }),
      ...(variants === undefined ? {} : { variants }),
      lab: labMachine(values),
    },
    {
      reporter,
      output: values.output,
      evidence: values.evidence,
      console: values.console,
      total: durationMs === undefined ? tests.length * rounds : undefined,
    },
  );
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
