// SPDX-License-Identifier: Apache-2.0
import { show, type TestResult } from '../selftest/index.ts';
import { type Reporter, resultName, type Write } from './reporter.ts';

/** The kernel's test protocol, version 1 (Documentation/dev-tools/ktap.rst), live. */
export function ktapReporter(write: Write): Reporter {
  let number = 0;
  return {
    begin: (total) => write(`KTAP version 1\n${total === undefined ? '' : `1..${total}\n`}`),
    event: (event) => {
      if (event.event === 'machine') {
        const { kind, kernel, cpu, engine, fingerprint } = event.machine;
        write(comment(`${kind}: Linux ${kernel}, ${cpu}${engine ? `, ${engine}` : ''}, ${fingerprint.kind}`));
      } else if (event.event === 'result') {
        number += 1;
        write(line(number, event.result));
      }
    },
    end: ({ summary }) => {
      const { pass, fail, skip, timeout, crash, error } = summary.verdicts;
      write(
        comment(
          `Totals: pass:${pass} fail:${fail} skip:${skip} timeout:${timeout} crash:${crash} error:${error}`,
        ),
      );
    },
  };
}

function line(number: number, result: TestResult): string {
  const evidence = Object.entries(result.evidence).map(([name, value]) =>
    comment(`  ${name}: ${show(value)}`),
  );
  const reason = (result.reason ?? '').replace(/\s*\n\s*/g, ' | ');
  switch (result.verdict) {
    case 'pass':
      return `${evidence.join('') + (reason ? comment(`  ${reason}`) : '')}ok ${number} ${resultName(result)}\n`;
    case 'skip':
      return `ok ${number} ${resultName(result)} # SKIP ${reason}\n`;
    case 'timeout':
      return `${evidence.join('') + comment(`  ${reason}`)}not ok ${number} ${resultName(result)} # TIMEOUT\n`;
    default:
      return (
        evidence.join('') +
        comment(`  ${result.verdict}: ${reason}`) +
        (result.reproduce ? comment(`  again: ${result.reproduce}`) : '') +
        `not ok ${number} ${resultName(result)}\n`
      );
  }
}

function comment(text: string): string {
  return `# ${text}\n`;
}
