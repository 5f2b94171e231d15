// SPDX-License-Identifier: Apache-2.0
import { show, type TestResult } from '../selftest/index.ts';
import { groupBy, groupOf, type Reporter, resultName, type Write } from './reporter.ts';

/** JUnit XML at the end, in the form that CI systems read: a suite for each first part of the ids. */
export function junitReporter(write: Write): Reporter {
  return {
    begin: () => {},
    event: () => {},
    end: (report) => {
      const suites = [...groupBy(report.results, groupOf)].map(([name, results]) =>
        suite(name, results, report.machine.kernel),
      );
      const { passed, failed, skipped } = report.summary;
      const counts = `tests="${passed + failed + skipped}" failures="${failed}" skipped="${skipped}"`;
      write(
        `<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="nvmx" ${counts}>\n${suites.join('')}</testsuites>\n`,
      );
    },
  };
}

function suite(name: string, results: readonly TestResult[], kernel: string): string {
  const failures = results.filter(
    (r) => r.verdict !== 'pass' && r.verdict !== 'skip' && r.verdict !== 'error',
  );
  const errors = results.filter((r) => r.verdict === 'error');
  const skipped = results.filter((r) => r.verdict === 'skip');
  const time = results.reduce((sum, r) => sum + r.durationMs, 0) / 1000;
  return (
    `  <testsuite name="${xmlText(name)}" tests="${results.length}" failures="${failures.length}" ` +
    `errors="${errors.length}" skipped="${skipped.length}" time="${time.toFixed(3)}">\n` +
    `    <properties><property name="kernel" value="${xmlText(kernel)}"/></properties>\n` +
    `${results.map((result) => testCase(name, result)).join('')}  </testsuite>\n`
  );
}

function testCase(group: string, result: TestResult): string {
  const name = resultName(result);
  const head = `    <testcase classname="${xmlText(group)}" name="${xmlText(name)}" time="${(result.durationMs / 1000).toFixed(3)}"`;
  const evidence = Object.entries(result.evidence).map(([key, value]) => `${key}: ${show(value)}`);
  const out = evidence.length > 0 ? `      <system-out>${xmlText(evidence.join('\n'))}</system-out>\n` : '';
  const reason = result.reason ?? '';
  const message = xmlText(reason.split('\n', 1)[0] ?? '');
  const text = xmlText([reason, ...(result.reproduce ? [`again: ${result.reproduce}`] : [])].join('\n'));
  switch (result.verdict) {
    case 'pass':
      return `${head}>\n${out}    </testcase>\n`;
    case 'skip':
      return `${head}>\n      <skipped message="${message}"/>\n    </testcase>\n`;
    case 'error':
      return `${head}>\n      <error message="${message}">${text}</error>\n${out}    </testcase>\n`;
    default:
      return `${head}>\n      <failure type="${result.verdict}" message="${message}">${text}</failure>\n${out}    </testcase>\n`;
  }
}

const ENTITIES: Readonly<Record<string, string>> = {
  '&': '&amp;',
  '<': '&lt;',
  '>': '&gt;',
  '"': '&quot;',
  '\n': '&#10;',
};

/** Also leaves out the control characters that XML 1.0 has no way to write. */
function xmlText(text: string): string {
  return text
    .replace(/[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, '')
    .replace(/[&<>"\n]/g, (character) => ENTITIES[character] ?? character);
}
