// SPDX-License-Identifier: Apache-2.0
import { type RunReport, summarize } from '../selftest/index.ts';
import { resultName } from './reporter.ts';

/** Reports that do not belong together. */
export class MergeError extends Error {
  override readonly name = 'MergeError';
}

/**
 * One report of the parts of a run: same package, kernel and parameters, no result twice.
 *
 * @throws MergeError when they are not parts of one run
 */
export function mergeReports(reports: readonly RunReport[]): RunReport {
  const [first, ...others] = reports;
  if (!first) throw new MergeError('there is no report to merge');
  for (const other of others) {
    if (other.nvmx !== first.nvmx) throw new MergeError(`reports of nvmx ${first.nvmx} and ${other.nvmx}`);
    const [a, b] = [first.machine, other.machine];
    if (a.kernel !== b.kernel || a.kind !== b.kind) {
      throw new MergeError(`reports of different machines: ${a.kind} ${a.kernel} and ${b.kind} ${b.kernel}`);
    }
    for (const name of Object.keys({ ...a.parameters, ...b.parameters })) {
      if (a.parameters[name] !== b.parameters[name]) {
        throw new MergeError(
          `${name} is ${a.parameters[name]} in one report and ${b.parameters[name]} in another`,
        );
      }
    }
  }
  const results = reports.flatMap((report) => report.results);
  const seen = new Set<string>();
  for (const name of results.map(resultName)) {
    if (seen.has(name)) throw new MergeError(`${name} is in more than one report`);
    seen.add(name);
  }
  return { ...first, results, summary: summarize(results) };
}
