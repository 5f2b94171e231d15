// SPDX-License-Identifier: Apache-2.0
import { show, type TestResult, type Verdict } from '../selftest/index.ts';
import { groupBy, groupOf, type Reporter, resultName, type Write } from './reporter.ts';

const MARKS: Record<Verdict, { mark: string; color: number }> = {
  pass: { mark: '✔', color: 32 },
  fail: { mark: '✖', color: 31 },
  skip: { mark: '↓', color: 33 },
  timeout: { mark: '⏱', color: 31 },
  crash: { mark: '☠', color: 31 },
  error: { mark: '!', color: 35 },
};

/** For people: a line a test with its evidence, live, and a summary line that scripts can read too. */
export function specReporter(write: Write, options: { color?: boolean } = {}): Reporter {
  const paint = (text: string, code: number): string =>
    options.color ? `\u001b[${code}m${text}\u001b[0m` : text;
  return {
    begin: () => {},
    event: (event) => {
      if (event.event === 'machine') {
        const { kind, kernel, cpu, engine, parameters, fingerprint } = event.machine;
        const nested = parameters['kvm_intel.nested'];
        if (event.variant !== undefined) write(`\n[${event.variant}]\n`);
        write(`${kind}: Linux ${kernel} · ${cpu}${engine ? ` · ${engine}` : ''}\n`);
        write(
          `kvm_intel.nested=${nested ?? '(not loaded)'} · this kernel is ${fingerprint.kind}` +
            `${fingerprint.certain ? '' : ' (assumed: nothing readable decides it)'}\n`,
        );
      } else if (event.event === 'result') {
        const { mark, color } = MARKS[event.result.verdict];
        const { durationMs } = event.result;
        write(
          `  ${paint(mark, color)} ${resultName(event.result)} ${paint(`${Math.round(durationMs)} ms`, 2)}\n`,
        );
        for (const text of details(event.result)) write(`      ${paint(text, 2)}\n`);
      }
    },
    end: ({ summary, seed, results }) => {
      const rare = (['timeout', 'crash', 'error'] as const).filter((name) => summary.verdicts[name] > 0);
      if (rare.length > 0)
        write(`of the failed: ${rare.map((n) => `${summary.verdicts[n]} ${n}`).join(', ')}\n`);
      for (const text of outside(results)) write(`${paint(text, 2)}\n`);
      write(`seed ${seed}\n`);
      write(`${summary.passed} passed, ${summary.failed} failed, ${summary.skipped} skipped\n`);
    },
  };
}

/** What the deterministic tests cost beyond KVM_RUN: the share of their time, in all and by group. */
function outside(results: readonly TestResult[]): string[] {
  const timed = results.filter((one) => one.kvmRunMs !== undefined && one.seed === undefined);
  if (timed.length === 0) return [];
  const share = (some: readonly TestResult[]): string => {
    const wall = some.reduce((sum, one) => sum + one.durationMs, 0);
    const run = some.reduce((sum, one) => sum + (one.kvmRunMs ?? 0), 0);
    return wall > 0 ? `${Math.max(0, Math.round(100 * (1 - run / wall)))} %` : '-';
  };
  const groups = groupBy(timed, groupOf);
  const each = [...groups].map(([name, some]) => `${name} ${share(some)}`);
  return [`outside KVM_RUN: ${share(timed)} of the deterministic tests' time (${each.join(', ')})`];
}

function details(result: TestResult): string[] {
  const lines: string[] = [];
  const evidence = Object.entries(result.evidence).map(([name, value]) => `${name} ${show(value)}`);
  if (result.verdict === 'pass') {
    if (evidence.length > 0) lines.push(evidence.join(' · '));
    if (result.reason) lines.push(result.reason);
    return lines;
  }
  lines.push(
    ...(result.reason ?? '').split('\n').map((text, i) => (i === 0 ? `${result.verdict}: ${text}` : text)),
  );
  if (evidence.length > 0) lines.push(`evidence: ${evidence.join(' · ')}`);
  if (result.reproduce) lines.push(`again: ${result.reproduce}`);
  return lines;
}
