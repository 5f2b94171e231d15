// SPDX-License-Identifier: Apache-2.0
import { existsSync } from 'node:fs';
import { structMembers } from './btf.ts';
import { type KernelKind, type SeriesPatch, series, type Trace } from './series.ts';

export interface PatchFinding {
  readonly patch: number;
  readonly title: string;
  /** `unknown` when no source that could show it was readable. */
  readonly state: 'present' | 'absent' | 'unknown';
  /** Each trace looked for, and what was there. */
  readonly evidence: readonly string[];
}

export interface Fingerprint {
  /** Which expectation table `--expect auto` takes. */
  readonly kind: KernelKind;
  /** False where nothing decided and `stock` is only the assumption. */
  readonly certain: boolean;
  readonly patches: readonly PatchFinding[];
  /** Where the evidence came from, and what could not be read. */
  readonly sources: readonly string[];
}

/** What the running kernel shows of itself; either may be unreadable. */
export interface FingerprintSources {
  /** Names of the VM's binary statistics (KVM_GET_STATS_FD). */
  readonly vmStats?: ReadonlySet<string>;
  /** Members by struct name; a struct that is not there was not defined. */
  readonly structs?: ReadonlyMap<string, ReadonlySet<string>>;
  readonly notes: readonly string[];
}

const BTF = '/sys/kernel/btf';

/** Struct layouts of kvm and kvm_intel from BTF, wherever this kernel keeps them. */
export function readStructs(): Pick<FingerprintSources, 'structs' | 'notes'> {
  const wanted = new Set(
    series()
      .patches.flatMap((patch) => patch.traces)
      .flatMap((trace) => ('struct' in trace ? [trace.struct] : [])),
  );
  const vmlinux = `${BTF}/vmlinux`;
  if (!existsSync(vmlinux)) return { notes: [`${vmlinux}: not there (kernel built without BTF)`] };
  const modules = ['kvm', 'kvm_intel'].map((name) => `${BTF}/${name}`).filter((path) => existsSync(path));
  const structs = new Map<string, Set<string>>();
  const notes: string[] = [];
  for (const path of modules.length > 0 ? modules : [vmlinux]) {
    try {
      const found = structMembers(path, wanted, path === vmlinux ? undefined : vmlinux);
      for (const [struct, members] of found) {
        structs.set(struct, new Set([...(structs.get(struct) ?? []), ...members]));
      }
      notes.push(`${path}: read`);
    } catch (error) {
      notes.push(`${path}: ${error instanceof Error ? error.message : String(error)}`);
    }
  }
  // A struct every kernel with kvm_intel has: without it the files read were not kvm's.
  return structs.has('nested_vmx') || structs.has('gfn_to_pfn_cache') ? { structs, notes } : { notes };
}

/** Decides stock or patched from what the kernel shows. */
export function fingerprint(sources: FingerprintSources): Fingerprint {
  const { patches: looked, deciding: numbers } = series();
  const patches = looked.map((patch) => findPatch(patch, sources));
  const deciding = patches.filter((patch) => numbers.includes(patch.patch));
  const present = deciding.some((patch) => patch.state === 'present');
  return {
    kind: present ? 'patched' : 'stock',
    certain: present || deciding.some((patch) => patch.state === 'absent'),
    patches,
    sources: [
      ...(sources.vmStats
        ? [`VM statistics: ${sources.vmStats.size} names`]
        : ['VM statistics: not readable']),
      ...sources.notes,
    ],
  };
}

function findPatch(patch: SeriesPatch, sources: FingerprintSources): PatchFinding {
  const looked = patch.traces.map((trace) => look(trace, sources));
  const known = looked.filter((one) => one.seen !== undefined);
  const state = known.some((one) => one.seen) ? 'present' : known.length > 0 ? 'absent' : 'unknown';
  return { patch: patch.patch, title: patch.title, state, evidence: looked.map((one) => one.text) };
}

function look(trace: Trace, { vmStats, structs }: FingerprintSources): { seen?: boolean; text: string } {
  switch (trace.kind) {
    case 'vm-stat':
      return answer(`VM statistic ${trace.name}`, vmStats?.has(trace.name));
    case 'btf-struct':
      return answer(`BTF struct ${trace.struct}`, structs?.has(trace.struct));
    case 'btf-member':
      return answer(
        `BTF ${trace.struct}.${trace.member}`,
        structs === undefined ? undefined : (structs.get(trace.struct)?.has(trace.member) ?? false),
      );
  }
}

function answer(what: string, seen: boolean | undefined): { seen?: boolean; text: string } {
  if (seen === undefined) return { text: `${what}: cannot be looked up here` };
  return { seen, text: `${what}: ${seen ? 'there' : 'not there'}` };
}
