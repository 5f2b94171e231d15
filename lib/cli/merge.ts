// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { MergeError, mergeReports, parseReport } from '../report/index.ts';
import type { RunReport } from '../selftest/index.ts';
import { oneOf, parse, UsageError } from './options.ts';
import { exitStatus, openOutput, REPORTER_NAMES, REPORTERS } from './report.ts';

/** Shows the parts of a sharded run as one, in any view; its exit status is the whole run's. */
export async function mergeCommand(args: string[]): Promise<number> {
  const { values, positionals } = parse(args, {
    reporter: { type: 'string', default: 'json' },
    output: { type: 'string' },
  });
  const name = oneOf('reporter', values.reporter, REPORTER_NAMES);
  if (positionals.length === 0) throw new UsageError('nvmx merge takes the JSON reports of the parts');
  const report = merge(positionals);
  using output = values.output === undefined ? undefined : openOutput(values.output);
  const reporter = REPORTERS[name](output?.write ?? ((text) => process.stdout.write(text)));
  reporter.begin(report.results.length);
  reporter.event({ event: 'machine', machine: report.machine });
  for (const result of report.results) reporter.event({ event: 'result', result });
  reporter.end(report);
  return exitStatus(report);
}

function merge(files: readonly string[]): RunReport {
  const reports = files.map((file) => {
    try {
      return parseReport(readFileSync(file, 'utf8'));
    } catch (error) {
      throw new UsageError(`${file}: ${(error as Error).message}`);
    }
  });
  try {
    return mergeReports(reports);
  } catch (error) {
    if (error instanceof MergeError) throw new UsageError(error.message);
    throw error;
  }
}
