// SPDX-License-Identifier: Apache-2.0
import {
  discover,
  KselftestError,
  matchesPattern,
  namesOf,
  type ProgramSet,
  programTests,
} from '../selftest/index.ts';
import { labMachine, parse, UsageError } from './options.ts';
import { list, RUN_OPTIONS, runAndReport, runChoices } from './report.ts';

/** nvmx kselftest FOLDER [PATTERN...] [options]: the kernel's own selftest programs, with our reports. */
export async function kselftestCommand(args: string[], signal: AbortSignal): Promise<number> {
  const { values, positionals } = parse(args, RUN_OPTIONS);
  const { machine, reporter, limits } = runChoices(values);
  const [path, ...patterns] = positionals;
  if (path === undefined) throw new UsageError('nvmx kselftest takes the folder of the built selftests');

  const programs = choose(find(path), patterns);
  const tests = programTests(programs);
  if (values.list) return list(tests);
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
      ...limits,
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
