// SPDX-License-Identifier: Apache-2.0
import {
  BENCH_SCHEMA,
  type BenchReport,
  type Figure,
  figureOf,
  type Measurement,
} from '../../lib/bench/index.ts';
import { RESULT_SCHEMA, type RunReport, summarize, type TestResult } from '../../lib/selftest/index.ts';
import { stock } from '../fixtures.ts';

export function figure(id: string, samples: readonly number[], more: Partial<Measurement> = {}): Figure {
  return figureOf([{ id, title: `title of ${id}`, unit: 'cycles', samples, ...more }]);
}

export function report(
  kernel: string,
  figures: readonly Figure[],
  more: Partial<BenchReport> = {},
): BenchReport {
  return {
    schema: BENCH_SCHEMA,
    nvmx: '0.1.0',
    environment: {
      kind: 'lab',
      kernel,
      cpu: 'Example CPU <7>',
      engine: 'emulator 1',
      parameters: { 'kvm_intel.nested': 'Y' },
      commandLine: 'mem=512M',
      fingerprint: stock,
      cpusOnline: 1,
      tscHz: 3_500_000_000,
      unmanaged: { reason: 'none' },
    },
    passes: 1,
    quick: true,
    figures,
    missing: [],
    notes: [],
    ...more,
  };
}

export function tests(results: readonly Partial<TestResult>[]): RunReport {
  const all = results.map(
    (result): TestResult => ({
      id: 'x',
      verdict: 'pass',
      expectation: 'stock',
      evidence: {},
      durationMs: 1,
      ...result,
    }),
  );
  return {
    schema: RESULT_SCHEMA,
    nvmx: '0.1.0',
    machine: {
      kind: 'lab',
      kernel: '6.1',
      cpu: 'c',
      parameters: {},
      fingerprint: stock,
    },
    seed: 1,
    results: all,
    summary: summarize(all),
  };
}
