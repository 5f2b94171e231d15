// SPDX-License-Identifier: Apache-2.0
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { consoleExcerpt, LabError, type LabOptions, runInLab } from '../lab/index.ts';
import { probeHost, seriesForLab } from '../probe/index.ts';
import {
  BENCH_SCHEMA,
  type BenchEnvironment,
  type BenchEvent,
  type BenchReport,
  type Figure,
  type Missing,
} from './model.ts';
import { type BenchJob, decodeBenchEvent } from './protocol.ts';

export interface BenchRequest {
  readonly machine: 'auto' | 'host' | 'lab';
  /** Figure ids. */
  readonly ids: readonly string[];
  readonly quick: boolean;
  /** Lab: memslot churn with the sizes of hardware. */
  readonly full?: boolean;
  /** Default: 1 in the lab, where a second run proves that figures repeat; 9 on a host, 3 when quick. */
  readonly passes?: number;
  /** Lab: no second run. */
  readonly once?: boolean;
  /** Boot the lab with memory the kernel does not manage. On a host that is the boot arguments' business. */
  readonly unmanaged: boolean;
  readonly lab: Pick<LabOptions, 'kernel' | 'append' | 'onProgress' | 'onConsole'>;
  readonly signal?: AbortSignal;
}

/** Half of it is hidden with --unmanaged. */
const LAB_MEMORY_MIB = { small: 1024, large: 3072 };
/** Of 2 MiB: what the largest figure touches, and two for pages of L1's. */
const HUGE_PAGES = { small: 32, large: 272 };
const AGENT = fileURLToPath(new URL('../../dist/bench/agent.js', import.meta.url));

/** The measuring process on the host ended without a result. */
export class BenchError extends Error {
  override readonly name = 'BenchError';
}

/**
 * Measures on the machine the request names.
 * @throws LabError when the lab machine could not be used or died; BenchError when the host's process did
 */
export async function runBench(
  request: BenchRequest,
  emit: (event: BenchEvent) => void = () => {},
): Promise<BenchReport> {
  const useHost = request.machine === 'host' || (request.machine === 'auto' && probeHost().nestedVmx.usable);
  const collected = new Collected(emit);
  const job: BenchJob = {
    kind: useHost ? 'host' : 'lab',
    ids: request.ids,
    quick: request.quick,
    ...(request.full ? { full: true } : {}),
    passes: request.passes ?? (useHost ? (request.quick ? 3 : 9) : 1),
  };
  if (useHost) {
    await onHost(job, request, collected);
    return collected.report(job);
  }
  if (request.once) {
    await inLab(job, request, collected);
    return collected.report(job);
  }
  // Two machines at once where there are two CPUs: what they measure does not depend on the time outside.
  const again = new Collected(() => {});
  if (availableParallelism() > 1) {
    const stop = new AbortController();
    const signal = request.signal ? AbortSignal.any([request.signal, stop.signal]) : stop.signal;
    try {
      await Promise.all([
        inLab(job, { ...request, signal }, collected),
        inLab(job, { ...request, signal, lab: silent(request.lab) }, again),
      ]);
    } finally {
      stop.abort();
    }
  } else {
    await inLab(job, request, collected);
    await inLab(job, { ...request, lab: silent(request.lab) }, again);
  }
  const [first, second] = [collected.report(job), again.report(job)];
  return { ...first, secondRun: { differing: differingFigures(first.figures, second.figures) } };
}

function silent({ kernel, append }: BenchRequest['lab']): BenchRequest['lab'] {
  return { ...(kernel === undefined ? {} : { kernel }), ...(append === undefined ? {} : { append }) };
}

/** Ids of figures that are not the same in every number, or in one list only. */
export function differingFigures(first: readonly Figure[], second: readonly Figure[]): string[] {
  const text = new Map(second.map((figure) => [figure.id, JSON.stringify(figure)]));
  const differing = first
    .filter((figure) => text.get(figure.id) !== JSON.stringify(figure))
    .map(({ id }) => id);
  const known = new Set(first.map(({ id }) => id));
  return [...differing, ...[...text.keys()].filter((id) => !known.has(id))];
}

class Collected {
  readonly #emit: (event: BenchEvent) => void;
  readonly #figures: Figure[] = [];
  readonly #missing: Missing[] = [];
  readonly #notes: string[] = [];
  #environment: BenchEnvironment | undefined;
  ended = false;
  /** What was being measured last. */
  last = 'nothing';
  engine: string | undefined;

  constructor(emit: (event: BenchEvent) => void) {
    this.#emit = emit;
  }

  line(text: string): void {
    const event = decodeBenchEvent(text);
    if (!event) return;
    switch (event.event) {
      case 'environment':
        this.#environment = {
          ...event.environment,
          ...(this.engine === undefined ? {} : { engine: this.engine }),
        };
        break;
      case 'figure':
        this.#figures.push(event.figure);
        break;
      case 'missing':
        this.#missing.push(event.missing);
        break;
      case 'note':
        this.#notes.push(event.note);
        break;
      case 'start':
        this.last = event.id;
        break;
      case 'end':
        this.ended = true;
    }
    this.#emit(event);
  }

  report(job: BenchJob): BenchReport {
    if (!this.#environment) throw new BenchError('the measuring process said nothing about its machine');
    return {
      schema: BENCH_SCHEMA,
      nvmx: packageVersion(),
      environment: this.#environment,
      passes: job.passes,
      quick: job.quick,
      figures: this.#figures,
      missing: this.#missing,
      notes: this.#notes,
    };
  }
}

async function inLab(job: BenchJob, request: BenchRequest, collected: Collected): Promise<void> {
  // A memslot costs the kernel some 20 KB: as many as there can be fill the small machine
  const size = request.full || request.ids.some((id) => id.endsWith('slots=max')) ? 'large' : 'small';
  const memoryMiB = LAB_MEMORY_MIB[size];
  const append = [
    ...(request.unmanaged ? [`mem=${memoryMiB / 2}M kvm.allow_unsafe_mappings=1 iomem=relaxed`] : []),
    ...(request.ids.some((id) => id.includes('/hugetlb')) ? [`hugepages=${HUGE_PAGES[size]}`] : []),
    ...(request.lab.append === undefined ? [] : [request.lab.append]),
  ].join(' ');
  const full: BenchJob = { ...job, memoryBytes: memoryMiB * 1024 * 1024 };
  const result = await runInLab(['dist/bench/agent.js', JSON.stringify(full)], {
    ...request.lab,
    ...seriesForLab(),
    ...(append === '' ? {} : { append }),
    ...(request.signal ? { signal: request.signal } : {}),
    memoryMiB,
    deterministic: true,
    timeoutMs: 3_600_000,
    silenceMs: 600_000,
    onEngine: (engine) => {
      collected.engine = `${engine.version}${engine.apicv ? '' : ' (apicv off)'}`;
    },
    onLine: (line) => collected.line(line),
  });
  request.signal?.throwIfAborted();
  if (collected.ended) return;
  throw new LabError(
    `the lab machine ended while ${collected.last} was measured: ${result.outcome}`,
    `${result.reason ?? 'its console says'}:\n${consoleExcerpt(result.console)}`,
    `the whole console is in ${result.consoleFile}`,
  );
}

/** A process of its own, so that it can be pinned and so that the caller's own work is not measured. */
async function onHost(job: BenchJob, request: BenchRequest, collected: Collected): Promise<void> {
  const cpu = quietCpu();
  const pinned = await canPin(cpu);
  const full: BenchJob = pinned ? { ...job, pinnedTo: cpu } : job;
  const command = [process.execPath, AGENT, JSON.stringify(full)];
  const argv = pinned ? ['taskset', '-c', String(cpu), ...command] : command;
  const child = spawn(argv[0]!, argv.slice(1), {
    stdio: ['ignore', 'pipe', 'inherit'],
    ...(request.signal ? { signal: request.signal } : {}),
  });
  const ended = new Promise<number | null>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  createInterface({ input: child.stdout }).on('line', (line) => collected.line(line));
  const status = await ended;
  request.signal?.throwIfAborted();
  if (!collected.ended) {
    throw new BenchError(
      `the measuring process ended with status ${status ?? 'none (a signal)'} while ${collected.last} was measured`,
    );
  }
}

/** The last CPU this process may use: the first is where most interrupts go. */
function quietCpu(): number {
  const allowed = /^Cpus_allowed_list:\s*(\S+)$/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1] ?? '0';
  return Number(allowed.split(/[,-]/).at(-1));
}

async function canPin(cpu: number): Promise<boolean> {
  return await new Promise((resolve) => {
    const child = spawn('taskset', ['-c', String(cpu), 'true'], { stdio: 'ignore' });
    child.once('error', () => resolve(false));
    child.once('close', (status) => resolve(status === 0));
  });
}

function packageVersion(): string {
  const text = readFileSync(new URL('../../package.json', import.meta.url), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}
