// SPDX-License-Identifier: Apache-2.0
import {
  discover,
  KselftestError,
  matchesPattern,
  namesOf,
  type ProgramSet,
  programTests,
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
  UsageError,
  wholeNumber,
} from './options.ts';
import { REPORTER_NAMES, runAndReport } from './report.ts';

/** nvmx kselftest FOLDER [PATTERN...] [options]: the kernel's own selftest programs, with our reports. */
export async function kselftestCommand(args: string[], signal: AbortSignal): Promise<number> {
  const { values, positionals } = parse(args, {
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
  });
  const machine = machineChoice(values.machine);
  const reporter = oneOf('reporter', values.reporter, REPORTER_NAMES);
  const timeout =
    values.timeout === undefined ? undefined : wholeNumber('timeout', values.timeout, 1, 86_400);
  const jobs = values.jobs === undefined ? undefined : wholeNumber('jobs', values.jobs, 1, 64);
  labOnly(machine, { ...labGiven(values), jobs: values.jobs });
  const [path, ...patterns] = positionals;
  if (path === undefined) throw new UsageError('nvmx kselftest takes the folder of the built selftests');

  const programs = choose(find(path), patterns);
  const tests = programTests(programs);
  if (values.list) {
    for (const test of tests) process.stdout.write(`${test.id}\t${test.title}\n`);
    return STATUS.ok;
  }
  return await runAndReport(
    tests,
    {
      machine,
      settings: {},
      programs,
      seed: 0,
      expect: 'auto',
      disposable: true,
      failFast: values['fail-fast'],
      signal,
      ...(timeout === undefined ? {} : { timeoutMs: timeout * 1000 }),
      ...(jobs === undefined ? {} : { jobs }),
      lab: labMachine(values),
    },
    {
      reporter,
      output: values.output,
      evidence: values.evidence,
      console: values.console,
      // Sub-tests are counted when they are there.
      total: undefined,
    },
  );
}

function find(path: string): ProgramSet {
  try {
    return discover(path);
  } catch (error) {
    if (error instanceof KselftestError) throw new UsageError(error.message);
    throw error;
  }
}

function choose(set: ProgramSet, patterns: readonly string[]): ProgramSet {
  if (patterns.length === 0) return set;
  const programs = set.programs.filter(({ id }) =>
    namesOf(id).some((name) => patterns.some((pattern) => matchesPattern(name, pattern))),
  );
  if (programs.length === 0) {
    throw new UsageError(
      `no selftest in ${set.origin} matches ${patterns.map((one) => `"${one}"`).join(' ')}; --list prints them`,
    );
  }
  return { ...set, programs };
}
