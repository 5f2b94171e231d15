// SPDX-License-Identifier: Apache-2.0
import { setTimeout as delay } from 'node:timers/promises';
import { kvmRunTime } from '../../kvm/index.ts';
import type { HostProbe, KernelKind } from '../../probe/index.ts';
import { KernelLog } from './kernel_log.ts';
import type { RunEvent, Selftest, SelftestContext, TestResult } from './model.ts';
import { seededRandom } from './random.ts';
import { isMissingFeature } from './requirements.ts';
import { compare, expectationFor } from './verdict.ts';

export interface RunOptions {
  /** Base of every racing test's seed: round n runs with seed + n - 1. */
  readonly seed: number;
  /** Overrides each test's own limit, in milliseconds. */
  readonly timeoutMs?: number;
  /** `auto` takes the fingerprint's word. */
  readonly expect: KernelKind | 'auto';
  /** Allow tests that may take this machine's kernel down. */
  readonly disposable: boolean;
  /** Rounds; default 1. */
  readonly repeat?: number;
  /** Begin rounds until this time has passed, whatever `repeat` says; milliseconds of the machine's own clock. */
  readonly durationMs?: number;
  /** Stop after the first test that did not pass or skip. */
  readonly failFast?: boolean;
  readonly signal?: AbortSignal;
}

/** A place in a run: the test with this index in this round comes next. */
export interface Cursor {
  /** From 1. */
  readonly iteration: number;
  readonly index: number;
}

/** How long a body may take to notice its abort before it is given up. */
const GRACE_MS = 3000;
/** In the lab's emulator this is 50 million instructions at most, which take it half a second. */
const HEARTBEAT_MS = 250;
const LOG_LINES = 200;

export function isFailure(result: TestResult): boolean {
  return result.verdict !== 'pass' && result.verdict !== 'skip';
}

/** Runs tests in order on this machine, telling each start and result as it happens; a test begins when that is told. */
export async function runHere(
  tests: readonly Selftest[],
  probe: HostProbe,
  options: RunOptions,
  emit: (event: RunEvent) => unknown,
  from: Cursor = { iteration: 1, index: 0 },
): Promise<TestResult[]> {
  const results: TestResult[] = [];
  const begin = performance.now();
  using log = new KernelLog();
  const heart = setInterval(() => emit({ event: 'heartbeat' }), HEARTBEAT_MS);
  try {
    for (let { iteration, index } = from; tests.length > 0; iteration++, index = 0) {
      const over = options.durationMs !== undefined && performance.now() - begin >= options.durationMs;
      const wanted = options.durationMs === undefined ? iteration <= (options.repeat ?? 1) : !over;
      if (!wanted) break;
      for (const test of tests.slice(index)) {
        options.signal?.throwIfAborted();
        await emit({ event: 'start', id: test.id, iteration });
        const found = await runOne(test, iteration, probe, options, log);
        options.signal?.throwIfAborted();
        for (const result of found) {
          results.push(result);
          emit({ event: 'result', result });
        }
        if (options.failFast && found.some(isFailure)) return results;
      }
    }
    return results;
  } finally {
    clearInterval(heart);
  }
}

/** Whether a run has more than one round, so that its results say which. */
export function hasRounds(options: Pick<RunOptions, 'repeat' | 'durationMs'>): boolean {
  return (options.repeat ?? 1) > 1 || options.durationMs !== undefined;
}

/** The results of one test: those of its parts, then its own. */
async function runOne(
  test: Selftest,
  iteration: number,
  probe: HostProbe,
  options: RunOptions,
  log: KernelLog,
): Promise<TestResult[]> {
  const { name: expectation, table } = expectationFor(test.expectations, options.expect, probe.fingerprint);
  const seed = (options.seed + iteration - 1) % 2 ** 32;
  const base = {
    id: test.id,
    ...(hasRounds(options) ? { iteration } : {}),
    expectation,
    ...(test.racing ? { seed } : {}),
  };
  const skip = (reason: string): TestResult => ({
    ...base,
    verdict: 'skip',
    reason,
    evidence: {},
    durationMs: 0,
  });

  if (test.hazard === 'host-crash' && !options.disposable) {
    return [skip('may take the kernel down: run it with --machine lab, or with --disposable on this host')];
  }
  const missing = test.requires.map((r) => r.missing(probe)).filter((m) => m !== undefined);
  if (missing.length > 0) return [skip(missing.join('; '))];

  const begin = performance.now();
  log.take();
  const ranBefore = kvmRunTime();
  const outcome = await limited(test, seed, probe, options);
  const durationMs = Math.round((performance.now() - begin) * 10) / 10;
  const times = { durationMs, kvmRunMs: Math.round((kvmRunTime() - ranBefore) * 10) / 10 };
  const { lines, problems } = log.take();
  const kernelLog = lines.length > 0 ? { kernelLog: lines.slice(-LOG_LINES) } : {};
  const failed = (
    verdict: TestResult['verdict'],
    reason: string,
    evidence: TestResult['evidence'] = {},
  ): TestResult => ({
    ...base,
    verdict,
    reason: [reason, ...problems.map((p) => `kernel log: ${p}`)].join('; '),
    evidence,
    ...times,
    ...kernelLog,
    reproduce: reproducer(test, seed, options),
  });

  switch (outcome.kind) {
    case 'timeout':
      return [failed('timeout', `no result within ${outcome.limitMs} ms`)];
    case 'threw':
      return isMissingFeature(outcome.error)
        ? [{ ...skip(outcome.error.message), durationMs }]
        : [failed('error', describe(outcome.error))];
    case 'done': {
      const evidence = { ...outcome.observed, ...outcome.evidence };
      const parts = (outcome.subtests ?? []).map(
        ({ name, ...part }): TestResult => ({
          ...base,
          id: `${test.id}/${name}`,
          parent: test.id,
          ...part,
          evidence: {},
          durationMs: 0,
        }),
      );
      const mismatches = compare(table, outcome.observed);
      if (mismatches.length > 0) {
        const text = mismatches.map((m) => `${m.name}: expected ${m.expected}, seen ${m.seen}`).join('; ');
        return [...parts, failed('fail', `${text} (table "${expectation}")`, evidence)];
      }
      if (problems.length > 0) return [...parts, failed('fail', 'the kernel logged a problem', evidence)];
      const reason = expectation === 'stock' ? { reason: 'stock behaviour (unpatched)' } : {};
      return [...parts, { ...base, verdict: 'pass', ...reason, evidence, ...times, ...kernelLog }];
    }
  }
}

type Outcome =
  | ({ kind: 'done' } & Awaited<ReturnType<Selftest['body']>>)
  | { kind: 'timeout'; limitMs: number }
  | { kind: 'threw'; error: unknown };

async function limited(
  test: Selftest,
  seed: number,
  probe: HostProbe,
  options: RunOptions,
): Promise<Outcome> {
  const limitMs = options.timeoutMs ?? test.timeoutMs;
  const stop = new AbortController();
  const signal = options.signal ? AbortSignal.any([options.signal, stop.signal]) : stop.signal;
  const context: SelftestContext = {
    signal,
    random: seededRandom(seed),
    probe,
    sleep: (ms) => delay(ms, undefined, { signal }),
  };
  const timer = new AbortController();
  const body: Promise<Outcome> = test.body(context).then(
    (value) => ({ kind: 'done', ...value }),
    (error: unknown) => ({ kind: 'threw', error }),
  );
  const limit = delay(limitMs, 'limit' as const, { signal: timer.signal }).catch(() => 'limit' as const);
  try {
    const first = await Promise.race([body, limit]);
    if (first !== 'limit') return first;
    stop.abort(new Error(`no result within ${limitMs} ms`));
    // The body's handles close on its way out; without that the next test would share the machine with it.
    await Promise.race([body, delay(GRACE_MS, undefined, { ref: false })]);
    return { kind: 'timeout', limitMs };
  } finally {
    timer.abort();
  }
}

/** A command line that runs the test again the same way. */
export function reproducer(
  test: Selftest,
  seed: number,
  options: Pick<RunOptions, 'expect'>,
  machine = '',
): string {
  const seeded = test.racing ? ` --seed ${seed}` : '';
  const expect = options.expect === 'auto' ? '' : ` --expect ${options.expect}`;
  return `${test.command ?? `nvmx test ${test.id}`}${machine}${seeded}${expect}`;
}

function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const where = error.stack?.split('\n').find((line) => line.includes('/suites/'));
  return `${error.name}: ${error.message}${where ? ` (${where.trim().replace(/^at /, '')})` : ''}`;
}
