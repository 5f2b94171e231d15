// SPDX-License-Identifier: Apache-2.0
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import type { Reporter, Write } from '../../lib/report/index.ts';
import {
  githubReporter,
  jsonReporter,
  junitReporter,
  ktapReporter,
  mergeReports,
  parseReport,
  specReporter,
} from '../../lib/report/index.ts';
import { RESULT_SCHEMA, type RunReport, summarize, type TestResult } from '../../lib/selftest/index.ts';
import { stock } from '../fixtures.ts';

const results: TestResult[] = [
  {
    id: 'a/pass',
    verdict: 'pass',
    reason: 'stock behaviour (unpatched)',
    expectation: 'stock',
    evidence: { exits: 1 },
    durationMs: 12.4,
    kvmRunMs: 9.3,
  },
  {
    id: 'a/fail',
    verdict: 'fail',
    reason: 'exits: expected 9, seen 8 (table "patched")',
    expectation: 'patched',
    evidence: { exits: 8, words: [1, 2] },
    durationMs: 3,
    kvmRunMs: 1,
    seed: 5,
    reproduce: 'nvmx test a/fail',
  },
  { id: 'a/skip', verdict: 'skip', reason: 'no VMX here', expectation: 'any', evidence: {}, durationMs: 0 },
  {
    id: 'a/crash',
    verdict: 'crash',
    reason: 'the machine ended: panic; console:\nKernel panic - not syncing',
    expectation: 'any',
    evidence: {},
    durationMs: 900,
    reproduce: 'nvmx test a/crash --machine lab',
  },
  {
    id: 'a/timeout',
    verdict: 'timeout',
    reason: 'no result within 5 ms',
    expectation: 'any',
    evidence: {},
    durationMs: 5,
  },
];

const report: RunReport = {
  schema: RESULT_SCHEMA,
  nvmx: '0.0.0',
  machine: {
    kind: 'lab',
    kernel: '6.1.0',
    cpu: 'CPU',
    engine: 'Bochs 3.0',
    parameters: { 'kvm_intel.nested': 'Y' },
    fingerprint: stock,
  },
  seed: 7,
  results,
  summary: summarize(results),
};

function render(make: (write: Write) => Reporter): string {
  let text = '';
  const reporter = make((more) => {
    text += more;
  });
  reporter.begin(results.length);
  reporter.event({ event: 'machine', machine: report.machine });
  for (const result of results) {
    reporter.event({ event: 'start', id: result.id, iteration: 1 });
    reporter.event({ event: 'result', result });
  }
  reporter.end(report);
  return text;
}

test('summarize counts timeouts, crashes and errors as failed', () => {
  expect(report.summary).toEqual({
    passed: 1,
    failed: 3,
    skipped: 1,
    verdicts: { pass: 1, fail: 1, skip: 1, timeout: 1, crash: 1, error: 0 },
  });
});

test('KTAP: version, plan, one line a test in order, reasons and evidence as diagnostics', () => {
  expect(render(ktapReporter)).toBe(`KTAP version 1
1..5
# lab: Linux 6.1.0, CPU, Bochs 3.0, stock
#   exits: 1
#   stock behaviour (unpatched)
ok 1 a/pass
#   exits: 8
#   words: [1, 2]
#   fail: exits: expected 9, seen 8 (table "patched")
#   again: nvmx test a/fail
not ok 2 a/fail
ok 3 a/skip # SKIP no VMX here
#   crash: the machine ended: panic; console: | Kernel panic - not syncing
#   again: nvmx test a/crash --machine lab
not ok 4 a/crash
#   no result within 5 ms
not ok 5 a/timeout # TIMEOUT
# Totals: pass:1 fail:1 skip:1 timeout:1 crash:1 error:0
`);
});

test('spec: evidence, reason, reproducer, and a last line for scripts', () => {
  const text = render(specReporter);
  expect(text).toContain('  ✔ a/pass 12 ms\n      exits 1\n      stock behaviour (unpatched)\n');
  expect(text).toContain('      fail: exits: expected 9, seen 8 (table "patched")\n');
  expect(text).toContain('      evidence: exits 8 · words [1, 2]\n      again: nvmx test a/fail\n');
  expect(text).toContain('      skip: no VMX here\n');
  expect(text).toContain('      Kernel panic - not syncing\n');
  expect(text.split('\n').slice(-5)).toEqual([
    'of the failed: 1 timeout, 1 crash',
    // The racing test is not in it.
    "outside KVM_RUN: 25 % of the deterministic tests' time (a 25 %)",
    'seed 7',
    '1 passed, 3 failed, 1 skipped',
    '',
  ]);
  expect(text).not.toContain('\u001b');
  expect(render((write) => specReporter(write, { color: true }))).toContain('\u001b[32m✔\u001b[0m a/pass');
});

describe('JSON', () => {
  test('the report comes back as it went', () => {
    expect(parseReport(render(jsonReporter))).toEqual(report);
  });

  test('what is not a report of this schema is refused with the reason', () => {
    expect(() => parseReport('{')).toThrow('not a result file');
    expect(() => parseReport('{"schema":"nvmx-result/9"}')).toThrow('schema is nvmx-result/9');
    expect(() => parseReport('null')).toThrow('schema is undefined');
  });
});

test('JUnit: suites by the first part of the id, escaped text, a failure with its type', () => {
  expect(render(junitReporter)).toBe(`<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nvmx" tests="5" failures="3" skipped="1">
  <testsuite name="a" tests="5" failures="3" errors="0" skipped="1" time="0.920">
    <properties><property name="kernel" value="6.1.0"/></properties>
    <testcase classname="a" name="a/pass" time="0.012">
      <system-out>exits: 1</system-out>
    </testcase>
    <testcase classname="a" name="a/fail" time="0.003">
      <failure type="fail" message="exits: expected 9, seen 8 (table &quot;patched&quot;)">exits: expected 9, seen 8 (table &quot;patched&quot;)&#10;again: nvmx test a/fail</failure>
      <system-out>exits: 8&#10;words: [1, 2]</system-out>
    </testcase>
    <testcase classname="a" name="a/skip" time="0.000">
      <skipped message="no VMX here"/>
    </testcase>
    <testcase classname="a" name="a/crash" time="0.900">
      <failure type="crash" message="the machine ended: panic; console:">the machine ended: panic; console:&#10;Kernel panic - not syncing&#10;again: nvmx test a/crash --machine lab</failure>
    </testcase>
    <testcase classname="a" name="a/timeout" time="0.005">
      <failure type="timeout" message="no result within 5 ms">no result within 5 ms</failure>
    </testcase>
  </testsuite>
</testsuites>
`);
});

test('GitHub: annotations escaped in its own way, and a summary table of what did not pass', () => {
  const folder = mkdtempSync(join(tmpdir(), 'nvmx-summary-'));
  const file = join(folder, 'summary.md');
  const text = render((write) => githubReporter(write, { GITHUB_STEP_SUMMARY: file }));
  const table = readFileSync(file, 'utf8');
  rmSync(folder, { recursive: true });
  expect(text).toBe(`::error title=fail%3A a/fail::exits: expected 9, seen 8 (table "patched")
::notice title=skip%3A a/skip::no VMX here
::error title=crash%3A a/crash::the machine ended: panic; console:%0AKernel panic - not syncing
::error title=timeout%3A a/timeout::no result within 5 ms
1 passed, 3 failed, 1 skipped
`);
  expect(table).toContain('### nvmx: 1 passed, 3 failed, 1 skipped\n');
  expect(table).toContain(
    '| crash | a/crash | the machine ended: panic; console:<br>Kernel panic - not syncing |  |\n',
  );
  expect(table.split('\n').filter((line) => line.startsWith('| '))).toHaveLength(5);
});

test('a result of a round or a combination says so in its name', () => {
  const named = { ...report, results: [{ ...results[0]!, iteration: 2, variant: 'kvm_intel.ept=0' }] };
  let text = '';
  const reporter = ktapReporter((more) => {
    text += more;
  });
  reporter.begin(undefined);
  reporter.event({ event: 'result', result: named.results[0]! });
  expect(text).toContain('ok 1 [kvm_intel.ept=0] a/pass#2\n');
  expect(text).not.toContain('1..');
});

describe('merge', () => {
  const part = (...ids: string[]): RunReport => {
    const own = results.filter((result) => ids.includes(result.id));
    return { ...report, results: own, summary: summarize(own) };
  };

  test('the parts of a run give the whole', () => {
    const merged = mergeReports([part('a/pass', 'a/fail'), part('a/skip', 'a/crash', 'a/timeout')]);
    expect(merged).toEqual(report);
  });

  test('what does not belong together is refused', () => {
    expect(() => mergeReports([])).toThrow('no report');
    expect(() => mergeReports([part('a/pass'), part('a/pass')])).toThrow('a/pass is in more than one report');
    const machine = { ...report.machine, kernel: '7.0' };
    expect(() => mergeReports([part('a/pass'), { ...part('a/fail'), machine }])).toThrow(
      'lab 6.1.0 and lab 7.0',
    );
    const parameters = { 'kvm_intel.nested': 'N' };
    const other = { ...part('a/fail'), machine: { ...report.machine, parameters } };
    expect(() => mergeReports([part('a/pass'), other])).toThrow('kvm_intel.nested is Y in one report and N');
  });
});
