// SPDX-License-Identifier: Apache-2.0
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { consoleExcerpt, LabError, type LabOptions, type LabResult, runInLab } from '../lab/index.ts';
import { seriesForLab } from '../probe/index.ts';
import { AGENT_MODULES, AGENT_PROGRAM, agentProgram, KSELFTEST_PROGRAM } from './agent_program.ts';
import type { MachineInfo, RunEvent, Selftest, TestResult } from './engine/model.ts';
import type { Settings } from './engine/parameters.ts';
import { type Cursor, hasRounds, isFailure, type RunOptions, reproducer } from './engine/runner.ts';
import { expectationFor } from './engine/verdict.ts';
import type { ProgramSet } from './kselftest/index.ts';
import { type AgentJob, decodeEvent } from './protocol.ts';

export interface LabRunOptions extends Omit<RunOptions, 'disposable'> {
  readonly settings?: Settings;
  /** The programs that `tests` stand for, when they are those and not the suites'. */
  readonly programs?: ProgramSet;
  readonly lab: Omit<LabOptions, 'signal' | 'onEngine' | 'onLine'>;
  /** The program that runs the tests inside; its lines are RunEvents. For tests of this function. */
  readonly agent?: string;
}

/** Where a folder of kernel selftests is in the machine. */
const PROGRAM_FOLDER = '/kselftest';
/** The agent's heart beats all the time; so long without a line, in CPU time of the emulator, and the machine is dead. */
const HEARTBEAT_LIMIT_MS = 5_000;
const DAY_MS = 86_400_000;
/**
 * Two NUMA nodes on a kernel with CONFIG_NUMA_EMU, and pages go to the other one when a test says so; KVM emulates what
 * an L2 asks it to.
 */
const FOR_TESTS = 'numa=fake=2 numa_balancing=disable kvm.force_emulation_prefix=1';

/**
 * Runs tests inside the emulated machine. When the machine dies under a test, that test's verdict is `crash`
 * with what the console says of it, and the rest goes on in a fresh machine.
 *
 * @throws LabError when the machine could not be used at all
 */
export async function runInLabMachine(
  tests: readonly Selftest[],
  options: LabRunOptions,
  emit: (event: RunEvent) => void,
): Promise<{ machine: MachineInfo; results: TestResult[] }> {
  const results: TestResult[] = [];
  const began = performance.now();
  let machine: MachineInfo | undefined;
  let cursor: Cursor = { iteration: 1, index: 0 };
  for (;;) {
    const boot = await runOnce(tests, cursor, began, options, (event) => {
      if (event.event === 'machine') {
        if (machine) return;
        machine = event.machine;
      } else if (event.event === 'result') {
        results.push(event.result);
      }
      emit(event);
    });
    options.signal?.throwIfAborted();
    if (boot.ended) break;
    const victim = boot.running === undefined ? undefined : tests[boot.running.index];
    if (!machine || !boot.running || !victim) throw machineFailure(boot.result);
    const result = crashed(victim, boot.running.iteration, boot, options, machine);
    results.push(result);
    emit({ event: 'result', result });
    if (options.failFast && isFailure(result)) break;
    const next = boot.running.index + 1;
    const { iteration } = boot.running;
    cursor = next < tests.length ? { iteration, index: next } : { iteration: iteration + 1, index: 0 };
    const rounds = options.durationMs === undefined ? (options.repeat ?? 1) : Number.POSITIVE_INFINITY;
    const over = options.durationMs !== undefined && performance.now() - began >= options.durationMs;
    if (cursor.iteration > rounds || over) break;
  }
  if (!machine) throw new LabError('the lab machine ran no test', 'it ended without a word', 'run it again');
  return { machine, results };
}

interface Boot {
  readonly result: LabResult;
  /** The agent said it was through. */
  readonly ended: boolean;
  /**
   * The test that had begun and not ended; when no line says so, the one behind the last result: what a dying machine
   * said last may still have been in the serial line's buffer.
   */
  readonly running: Cursor | undefined;
}

async function runOnce(
  tests: readonly Selftest[],
  from: Cursor,
  began: number,
  options: LabRunOptions,
  onEvent: (event: RunEvent) => void,
): Promise<Boot> {
  const { seed, expect, timeoutMs, repeat, durationMs, failFast } = options;
  const job: AgentJob = {
    ids: tests.map((test) => test.id),
    settings: options.settings ?? {},
    ...(options.programs === undefined ? {} : { programs: { ...options.programs, folder: PROGRAM_FOLDER } }),
    seed,
    expect,
    from,
    ...(timeoutMs === undefined ? {} : { timeoutMs }),
    ...(repeat === undefined ? {} : { repeat }),
    ...(durationMs === undefined
      ? {}
      : { durationMs: Math.max(0, durationMs - (performance.now() - began)) }),
    ...(failFast === undefined ? {} : { failFast }),
  };
  let ended = false;
  let running: Cursor | undefined;
  let next: Cursor | undefined = from;
  let engine = 'emulated';
  const result = await runInLab([options.agent ?? AGENT_PROGRAM, JSON.stringify(job)], {
    ...(options.agent === undefined ? { program: programOf(tests, options), preload: AGENT_MODULES } : {}),
    heartbeatMs: HEARTBEAT_LIMIT_MS,
    // A living machine may take its time: --duration, --repeat, a busy host.
    timeoutMs: DAY_MS,
    ...labOptions(options),
    ...(options.signal ? { signal: options.signal } : {}),
    onEngine: (used) => {
      engine = `${used.version}${used.apicv ? '' : ' (apicv off)'}`;
    },
    onLine: (line) => {
      const event = decodeEvent(line);
      if (!event) return;
      if (event.event === 'start') {
        const { id, iteration } = event;
        running = { iteration, index: tests.findIndex((test) => test.id === id) };
      } else if (event.event === 'result' && event.result.parent === undefined) {
        const { iteration, index } = running ?? next ?? from;
        next = index + 1 < tests.length ? { iteration, index: index + 1 } : undefined;
        running = undefined;
      } else if (event.event === 'end') {
        ended = true;
      }
      if (event.event === 'machine') onEvent({ ...event, machine: { ...event.machine, engine } });
      else onEvent(event);
    },
  });
  return { result, ended, running: running ?? (result.bootMs === undefined ? undefined : next) };
}

function programOf(tests: readonly Selftest[], { programs }: LabRunOptions): string {
  return programs === undefined ? agentProgram(tests) : KSELFTEST_PROGRAM;
}

function labOptions({ lab, programs }: LabRunOptions): LabRunOptions['lab'] {
  const { files, env } = seriesForLab();
  const there = (programs?.programs ?? []).filter(({ file }) => existsSync(join(programs!.folder, file)));
  const theirs = there.map(({ file }) => [join(PROGRAM_FOLDER, file), join(programs!.folder, file)]);
  return {
    ...lab,
    append: [FOR_TESTS, lab.append].filter((part) => part !== undefined).join(' '),
    files: { ...lab.files, ...files, ...Object.fromEntries(theirs) },
    env: { ...lab.env, ...env },
  };
}

/** Ends of a machine whose kernel did what it was asked to. */
const ENDED_ALIVE: readonly LabResult['outcome'][] = ['exited', 'powered-off'];

function crashed(
  test: Selftest,
  iteration: number,
  { result }: Boot,
  options: LabRunOptions,
  machine: MachineInfo,
): TestResult {
  const how =
    result.outcome === 'exited'
      ? `the test process ended with status ${result.exitStatus}`
      : `the machine ended: ${result.outcome}${result.reason === undefined ? '' : ` (${result.reason})`}`;
  const seed = (options.seed + iteration - 1) % 2 ** 32;
  return {
    id: test.id,
    ...(hasRounds(options) ? { iteration } : {}),
    verdict: ENDED_ALIVE.includes(result.outcome) ? 'error' : 'crash',
    reason: `${how}; console (whole in ${result.consoleFile}):\n${consoleExcerpt(result.console)}`,
    expectation: expectationFor(test.expectations, options.expect, machine.fingerprint).name,
    evidence: {},
    durationMs: result.wallMs,
    ...(test.racing ? { seed } : {}),
    reproduce: reproducer(test, seed, options, ' --machine lab'),
  };
}

function machineFailure(lab: LabResult): LabError {
  const what =
    lab.outcome === 'exited'
      ? `the program in the lab machine ended with status ${lab.exitStatus} before any test began`
      : `the lab machine ended before any test began: ${lab.outcome}`;
  return new LabError(
    what,
    `its console says:\n${consoleExcerpt(lab.console) || '(nothing)'}`,
    `read the whole console in ${lab.consoleFile}; try another kernel with --kernel`,
  );
}
