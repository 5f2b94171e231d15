// SPDX-License-Identifier: Apache-2.0
import { existsSync, readFileSync } from 'node:fs';
import { KvmUnsupportedError, timestamp } from '../kvm/index.ts';
import { findUnmanaged, type HostProbe, probeHost } from '../probe/index.ts';
import { type Bench, type BenchContext, UnavailableError } from './bench.ts';
import { figureOf, ratioFigure } from './figures.ts';
import type { BenchEnvironment, BenchEvent, Figure, Measurement } from './model.ts';
import type { BenchJob } from './protocol.ts';
import { spread } from './statistics.ts';

/** Of KVM_CAP_GUEST_MEMFD_FLAGS. */
const GUEST_MEMFD_FLAG_MMAP = 1;
/** Passes whose medians differ by more than this say that the machine was not quiet. */
const NOISY = 0.05;

/**
 * Measures on this machine: the whole list, pass after pass, so that a disturbance of some seconds does not fall on
 * all the repetitions of one figure.
 */
export async function measureHere(
  all: readonly Bench[],
  job: BenchJob,
  emit: (event: BenchEvent) => void,
): Promise<void> {
  const probe = probeHost();
  const unmanaged = findUnmanaged(probe, job.memoryBytes);
  const context: BenchContext = {
    probe,
    quick: job.quick,
    slow: job.kind === 'lab',
    full: job.full ?? job.kind === 'host',
    unmanaged,
  };
  emit({ event: 'environment', environment: environmentOf(job, probe, unmanaged, tscFrequency()) });
  const stealBefore = stolenTicks();

  const ids = new Set(job.ids);
  const passes = new Map<string, Measurement[]>();
  const missing = new Map<string, string>();
  for (let pass = 1; pass <= job.passes; pass += 1) {
    for (const bench of all) {
      const wanted = wantedOf(bench, ids, context, missing);
      if (wanted.size === 0) continue;
      emit({ event: 'start', id: bench.family, pass, passes: job.passes });
      try {
        for (const measurement of await bench.measure(context, wanted)) {
          passes.set(measurement.id, [...(passes.get(measurement.id) ?? []), measurement]);
        }
      } catch (error) {
        const reason = reasonOf(error);
        for (const id of wanted) missing.set(id, reason);
      }
    }
  }
  for (const [id, reason] of missing) {
    passes.delete(id);
    emit({ event: 'missing', missing: { id, reason } });
  }
  const figures = [...passes.values()].map(figureOf);
  for (const figure of [...figures, ...ratios(figures)]) emit({ event: 'figure', figure });
  for (const note of notes(job, figures, stolenTicks() - stealBefore)) emit({ event: 'note', note });
  emit({ event: 'end' });
}

function wantedOf(
  bench: Bench,
  ids: ReadonlySet<string>,
  context: BenchContext,
  missing: Map<string, string>,
): Set<string> {
  const wanted = new Set<string>();
  for (const figure of bench.figures) {
    if (!ids.has(figure.id) || missing.has(figure.id)) continue;
    const reason = benchMissing(bench, context) ?? figure.missing(context);
    if (reason === undefined) wanted.add(figure.id);
    else missing.set(figure.id, reason);
  }
  return wanted;
}

/** All that is missing, so that nobody repairs one thing only to hear of the next. */
export function benchMissing(bench: Bench, { probe, unmanaged }: BenchContext): string | undefined {
  if (probe.kvm.device !== 'ok') return probe.kvm.problem ?? '/dev/kvm does not open';
  const reasons: string[] = [];
  if (bench.nested && !probe.nestedVmx.usable) reasons.push(probe.nestedVmx.reason);
  if (bench.backing === 'unmanaged' && 'reason' in unmanaged) reasons.push(unmanaged.reason);
  if (bench.backing === 'hugetlb' && freeHugePages() === 0) {
    reasons.push('no huge pages of 2 MiB are reserved (echo 64 > /proc/sys/vm/nr_hugepages, as root)');
  }
  if (bench.backing === 'guest-memfd') {
    const { KVM_CAP_GUEST_MEMFD: has, KVM_CAP_GUEST_MEMFD_FLAGS: flags = 0 } = probe.kvm.capabilities;
    if (!has) reasons.push('this kernel has no guest_memfd (Linux 6.8; mapped into the process: 6.18)');
    else if ((flags & GUEST_MEMFD_FLAG_MMAP) === 0) {
      reasons.push("this kernel's guest_memfd cannot be mapped into the process (Linux 6.18)");
    }
  }
  return reasons.length === 0 ? undefined : reasons.join('; ');
}

/** The headline: what unmanaged memory costs on this kernel, without a second kernel to compare with. */
function ratios(figures: readonly Figure[]): Figure[] {
  const byId = new Map(figures.map((figure) => [figure.id, figure]));
  return figures.flatMap((above) => {
    if (!above.id.includes('/unmanaged') || above.id.startsWith('memremap')) return [];
    const below = byId.get(above.id.replace('/unmanaged', '/anonymous'));
    if (!below || below.p50 === 0) return [];
    const id = `ratio/${above.id.replace('/unmanaged', '')}`;
    return [ratioFigure(id, `unmanaged ÷ anonymous: ${above.title}`, above, below)];
  });
}

function notes(job: BenchJob, figures: readonly Figure[], stolen: number): string[] {
  if (job.kind === 'lab') return [];
  const found: string[] = [];
  const noisy = figures.filter(({ passes }) => spread(passes.map(({ p50 }) => p50)) > NOISY);
  if (noisy.length > 0) {
    const worst = noisy.map(({ id }) => id).slice(0, 3);
    found.push(
      `the machine was noisy: the medians of ${noisy.length} of ${figures.length} figures differ by more than ${NOISY * 100} % between passes (${worst.join(', ')}${noisy.length > 3 ? ', …' : ''})`,
    );
  }
  if (stolen > 0) found.push(`the hypervisor below took ${stolen} ticks of CPU time away (steal)`);
  if (job.pinnedTo === undefined)
    found.push('not pinned to one CPU: taskset (package util-linux) is missing');
  return found;
}

function environmentOf(
  job: BenchJob,
  probe: HostProbe,
  unmanaged: BenchEnvironment['unmanaged'],
  tscHz: number,
): BenchEnvironment {
  return {
    kind: job.kind,
    kernel: probe.kernel.release,
    cpu: probe.cpu.model,
    ...(probe.cpu.microcode === undefined ? {} : { microcode: probe.cpu.microcode }),
    parameters: probe.kvm.parameters,
    commandLine: job.kind === 'lab' ? read('/proc/cmdline').trim() : kvmArguments(read('/proc/cmdline')),
    fingerprint: probe.fingerprint,
    cpusOnline: probe.cpu.online,
    tscHz,
    ...(job.pinnedTo === undefined ? {} : { pinnedTo: job.pinnedTo }),
    unmanaged,
  };
}

/** Counts TSC ticks for 20 ms; rounded to whole MHz. */
function tscFrequency(): number {
  const [ticksBefore, begin] = [timestamp(), process.hrtime.bigint()];
  let now = begin;
  while (now - begin < 20_000_000n) now = process.hrtime.bigint();
  const ticks = Number(timestamp() - ticksBefore);
  return Math.round((ticks * 1000) / Number(now - begin)) * 1_000_000;
}

/** A host's command line may hold what nobody should publish: only what matters here is kept. */
function kvmArguments(commandLine: string): string {
  return commandLine
    .trim()
    .split(/\s+/)
    .filter((word) =>
      /^(kvm|mem=|memmap=|iomem=|mitigations=|nosmt|isolcpus=|nohz_full=|hugepage)/.test(word),
    )
    .join(' ');
}

function reasonOf(error: unknown): string {
  if (error instanceof UnavailableError || error instanceof KvmUnsupportedError) return error.message;
  return `failed: ${error instanceof Error ? `${error.name}: ${error.message}` : String(error)}`;
}

function freeHugePages(): number {
  return Number(read('/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages').trim() || 0);
}

/** Time the hypervisor below gave to somebody else, in ticks, from /proc/stat. */
function stolenTicks(): number {
  return Number(read('/proc/stat').split('\n', 1)[0]?.trim().split(/\s+/)[8] ?? 0);
}

function read(path: string): string {
  return existsSync(path) ? readFileSync(path, 'utf8') : '';
}
