// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { probeHost } from '../probe/index.ts';
import {
  type MachineInfo,
  RESULT_SCHEMA,
  type RunEvent,
  type RunReport,
  type Selftest,
  summarize,
  type TestResult,
} from './engine/model.ts';
import type { Settings } from './engine/parameters.ts';
import { isFailure, type RunOptions, runHere } from './engine/runner.ts';
import { MachineError, reloadModules, type Variant, variantName } from './host_modules.ts';
import type { ProgramSet } from './kselftest/index.ts';
import { type LabRunOptions, runInLabMachine } from './lab_run.ts';
import { machineInfo } from './protocol.ts';

/** `auto` is this host where it has nested VMX, else the emulated machine. */
export type MachineChoice = 'auto' | 'host' | 'lab';

export interface RunRequest extends RunOptions {
  readonly machine: MachineChoice;
  /** How `tests` were made of the suites: the lab machine makes them again. */
  readonly settings: Settings;
  /** The programs that `tests` stand for, when they are those and not the suites'. */
  readonly programs?: ProgramSet;
  /** Only for the lab machine. */
  readonly lab: LabRunOptions['lab'];
  /** Lab machines that share the tests; default: 2 where there are many tests and processors enough, else 1. */
  readonly jobs?: number;
  /** Module parameters to run all tests under, one combination after the other; default: as they are. */
  readonly variants?: readonly Variant[];
}

const MANY_TESTS = 40;

type Ran = { machine: MachineInfo; results: TestResult[] };
type Emit = (event: RunEvent) => void;

/**
 * Runs tests on the machine the request names and returns the whole result.
 *
 * @throws MachineError when the host was asked for and its KVM cannot be used, or not in this way
 * @throws LabError when the lab machine could not be used
 */
export async function runSelftests(
  tests: readonly Selftest[],
  request: RunRequest,
  emit: Emit,
): Promise<RunReport> {
  const useHost = request.machine === 'host' || (request.machine === 'auto' && probeHost().nestedVmx.usable);
  const runs: (Ran & { variant?: string })[] = [];
  for (const variant of request.variants ?? [undefined]) {
    const name = variant === undefined ? undefined : variantName(variant);
    const tag = name === undefined ? {} : { variant: name };
    const tagged: Emit = (event) => {
      if (event.event === 'machine') emit({ ...event, ...tag });
      else if (event.event === 'result') emit({ ...event, result: { ...event.result, ...tag } });
      else emit(event);
    };
    const { machine, results } = useHost
      ? await onHost(tests, request, variant, tagged)
      : await inLab(tests, request, name, tagged);
    runs.push({ machine, results: results.map((result) => ({ ...result, ...tag })), ...tag });
    if (request.failFast && results.some(isFailure)) break;
  }
  const results = runs.flatMap((run) => run.results);
  const variants = runs.flatMap(({ variant, machine }) =>
    variant === undefined ? [] : [{ variant, machine }],
  );
  return {
    schema: RESULT_SCHEMA,
    nvmx: packageVersion(),
    machine: runs[0]!.machine,
    ...(variants.length > 0 ? { variants } : {}),
    seed: request.seed,
    results,
    summary: summarize(results),
  };
}

async function onHost(
  tests: readonly Selftest[],
  request: RunRequest,
  variant: Variant | undefined,
  emit: Emit,
): Promise<Ran> {
  using _restored = variant === undefined ? undefined : reloadModules(variant);
  const probe = probeHost();
  if (probe.kvm.device !== 'ok') {
    throw new MachineError(
      `this host cannot be used: ${probe.kvm.problem ?? '/dev/kvm does not open'}; --machine lab needs no KVM of the host`,
    );
  }
  const machine = machineInfo('host', probe);
  emit({ event: 'machine', machine });
  return { machine, results: await runHere(tests, probe, request, emit) };
}

async function inLab(
  tests: readonly Selftest[],
  request: RunRequest,
  variant: string | undefined,
  emit: Emit,
): Promise<Ran> {
  const append = [request.lab.append, variant].filter((part) => part !== undefined).join(' ');
  const options = { ...request, lab: { ...request.lab, ...(append ? { append } : {}) } };
  const jobs = Math.max(1, Math.min(request.jobs ?? defaultJobs(tests.length), tests.length));
  let told = false;
  const once: Emit = (event) => {
    if (event.event === 'machine' && told) return;
    told ||= event.event === 'machine';
    emit(event);
  };
  const stop = new AbortController();
  const signal = request.signal ? AbortSignal.any([request.signal, stop.signal]) : stop.signal;
  const shares = Array.from({ length: jobs }, (_, job) => tests.filter((_, index) => index % jobs === job));
  // All must have put away what they used, also those that end because another one failed.
  const ended = await Promise.allSettled(
    shares.map(async (share) => {
      try {
        return await runInLabMachine(share, { ...options, signal }, once);
      } catch (error) {
        stop.abort(error);
        throw error;
      }
    }),
  );
  // The first failure is the reason of the signal that ended the others.
  if (stop.signal.aborted) throw stop.signal.reason;
  const runs = ended.flatMap((one) => (one.status === 'fulfilled' ? [one.value] : []));
  const order = new Map(tests.map((test, index) => [test.id, index]));
  const place = ({ id, parent }: TestResult): number => order.get(parent ?? id) ?? 0;
  const results = runs
    .flatMap((run) => run.results)
    .sort((a, b) => (a.iteration ?? 1) - (b.iteration ?? 1) || place(a) - place(b));
  return { machine: runs[0]!.machine, results };
}

/** A second machine costs a boot and half a gigabyte: from so many tests on it is worth that. */
function defaultJobs(tests: number): number {
  return tests >= MANY_TESTS && availableParallelism() > 1 ? 2 : 1;
}

export function packageVersion(): string {
  const text = readFileSync(new URL('../../package.json', import.meta.url), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}
