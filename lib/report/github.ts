// SPDX-License-Identifier: Apache-2.0
import { appendFileSync } from 'node:fs';
import { isFailure, type RunReport, show, type TestResult } from '../selftest/index.ts';
import { type Reporter, resultName, type Write } from './reporter.ts';

/**
 * Workflow commands for GitHub Actions, an annotation for each failure as it happens, and a table in the step's
 * summary (the file that $GITHUB_STEP_SUMMARY names) where there is one.
 */
export function githubReporter(write: Write, env: NodeJS.ProcessEnv = process.env): Reporter {
  return {
    begin: () => {},
    event: (event) => {
      if (event.event !== 'result') return;
      const { result } = event;
      if (isFailure(result)) write(annotation('error', result));
      else if (result.verdict === 'skip') write(annotation('notice', result));
    },
    end: (report) => {
      const { passed, failed, skipped } = report.summary;
      write(`${passed} passed, ${failed} failed, ${skipped} skipped\n`);
      const file = env['GITHUB_STEP_SUMMARY'];
      if (file) appendFileSync(file, summary(report));
    },
  };
}

function annotation(level: 'error' | 'notice', result: TestResult): string {
  const title = property(`${result.verdict}: ${resultName(result)}`);
  return `::${level} title=${title}::${data(result.reason ?? result.verdict)}\n`;
}

/** Escapes of the workflow commands' own language. */
function data(text: string): string {
  return text.replaceAll('%', '%25').replaceAll('\r', '%0D').replaceAll('\n', '%0A');
}

function property(text: string): string {
  return data(text).replaceAll(':', '%3A').replaceAll(',', '%2C');
}

function summary(report: RunReport): string {
  const { machine } = report;
  const notPassed = report.results.filter((result) => result.verdict !== 'pass');
  const rows = notPassed.map((result) => {
    const evidence = Object.entries(result.evidence).map(([name, value]) => `${name} ${show(value)}`);
    const cells = [result.verdict, resultName(result), result.reason ?? '', evidence.join(', ')];
    return `| ${cells.map((cell) => cell.replaceAll('|', '\\|').replaceAll('\n', '<br>')).join(' | ')} |\n`;
  });
  const { passed, failed, skipped } = report.summary;
  return (
    `### nvmx: ${passed} passed, ${failed} failed, ${skipped} skipped\n\n` +
    `${machine.kind}: Linux ${machine.kernel}, ${machine.cpu}${machine.engine ? `, ${machine.engine}` : ''}, ` +
    `${machine.fingerprint.kind}\n\n` +
    (rows.length > 0 ? `| verdict | test | reason | evidence |\n|---|---|---|---|\n${rows.join('')}\n` : '')
  );
}
