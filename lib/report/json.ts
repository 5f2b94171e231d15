// SPDX-License-Identifier: Apache-2.0
import { RESULT_SCHEMA, type RunReport } from '../selftest/index.ts';
import type { Reporter, Write } from './reporter.ts';

/** One JSON document at the end: the result model itself. */
export function jsonReporter(write: Write): Reporter {
  return {
    begin: () => {},
    event: () => {},
    end: (report) => write(`${JSON.stringify(report, null, 2)}\n`),
  };
}

/**
 * Reads a result file's text.
 *
 * @throws Error when it is not JSON or not of the schema this version knows
 */
export function parseReport(text: string): RunReport {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`not a result file: ${error instanceof Error ? error.message : String(error)}`);
  }
  const schema = (value as { schema?: unknown } | null)?.schema;
  if (schema !== RESULT_SCHEMA) {
    throw new Error(
      `not a result file this version can read: schema is ${String(schema)}, not ${RESULT_SCHEMA}`,
    );
  }
  return value as RunReport;
}
