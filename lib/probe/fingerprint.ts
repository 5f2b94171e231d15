// SPDX-License-Identifier: Apache-2.0
import { existsSync, readFileSync } from 'node:fs';
import { structMembers } from './btf.ts';
import {
  type BehaviourName,
  CHANGES,
  type Change,
  type KernelKind,
  type SeriesPatch,
  series,
  type Trace,
} from './series.ts';

export interface PatchFinding {
  readonly patch: number;
  readonly title: string;
  /** `unknown` when no source that could show it was readable, and the other patches do not tell. */
  readonly state: 'present' | 'absent' | 'unknown';
  /** Each trace looked for, and what was there. */
  readonly evidence: readonly string[];
}

export interface Fingerprint {
  /** In a word: all the changes that tests depend on are there, none, or some. */
  readonly kind: KernelKind | 'partly patched';
  /** Which expectation table `--expect auto` takes, by what the table depends on. */
  readonly changes: Readonly<Record<Change, KernelKind>>;
  /** False where nothing decided and `stock` is only the assumption. */
  readonly certain: boolean;
  readonly patches: readonly PatchFinding[];
  /** Where the evidence came from, and what could not be read. */
  readonly sources: readonly string[];
}

/** What the running kernel shows of itself; any of it may be unreadable. */
export interface FingerprintSources {
  /** Names of the VM's binary statistics (KVM_GET_STATS_FD). */
  readonly vmStats?: ReadonlySet<string>;
  /** Members by struct name; a struct that is not there was not defined. */
  readonly structs?: ReadonlyMap<string, ReadonlySet<string>>;
  /** Those of the series' functions that this kernel has. */
  readonly symbols?: ReadonlySet<string>;
  /** What an L2 saw, and what was not tried. */
  readonly behaviours?: ReadonlyMap<BehaviourName, boolean>;
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

/** The series' functions in /proc/kallsyms. Reading it costs some 60 million instructions, Debian's 200 million. */
export function readSymbols(): Pick<FingerprintSources, 'symbols' | 'notes'> {
  const path = '/proc/kallsyms';
  const traces = series().patches.flatMap((patch) => patch.traces);
  const wanted = traces.flatMap((trace) => (trace.kind === 'symbol' ? [trace.name] : []));
  let text: string;
  try {
    text = readFileSync(path, 'latin1');
  } catch (error) {
    return { notes: [`${path}: ${(error as Error).message}`] };
  }
  const has = (name: string): boolean => new RegExp(`^\\w+ \\w ${name}(?:\t|$)`, 'm').test(text);
  // A function every kernel with KVM has: without it these are not all symbols.
  return has('kvm_vcpu_ioctl')
    ? { symbols: new Set(wanted.filter(has)), notes: [`${path}: read`] }
    : { notes: [`${path}: does not name KVM's functions`] };
}

/** Decides stock or patched from what the kernel shows. */
export function fingerprint(sources: FingerprintSources): Fingerprint {
  const { patches: looked, changes: numbers } = series();
  const patches = inferred(looked.map((patch) => findPatch(patch, sources)));
  const stateOf = (change: Change): PatchFinding['state'] | undefined =>
    patches.find(({ patch }) => patch === numbers[change])?.state;
  const kinds = CHANGES.map((change): KernelKind => (stateOf(change) === 'present' ? 'patched' : 'stock'));
  const [first = 'stock'] = kinds;
  return {
    kind: kinds.every((kind) => kind === first) ? first : 'partly patched',
    changes: Object.fromEntries(CHANGES.map((change, i) => [change, kinds[i]])) as Fingerprint['changes'],
    certain: CHANGES.some((change) => stateOf(change) !== 'unknown'),
    patches,
    sources: [
      ...(sources.vmStats
        ? [`VM statistics: ${sources.vmStats.size} names`]
        : ['VM statistics: not readable']),
      ...sources.notes,
    ],
  };
}

/** A series is applied from its first patch on: what is unknown follows from the patches around it. */
function inferred(patches: readonly PatchFinding[]): PatchFinding[] {
  const later = (one: PatchFinding): PatchFinding | undefined =>
    patches.find(({ patch, state }) => patch > one.patch && state === 'present');
  const earlier = (one: PatchFinding): PatchFinding | undefined =>
    patches.find(({ patch, state }) => patch < one.patch && state === 'absent');
  return patches.map((one) => {
    if (one.state !== 'unknown') return one;
    const after = later(one);
    const why = after ?? earlier(one);
    if (!why) return one;
    const text = after
      ? `patch ${why.patch} is there, which comes after it`
      : `patch ${why.patch} is not there`;
    return { ...one, state: why.state, evidence: [...one.evidence, text] };
  });
}

function findPatch(patch: SeriesPatch, sources: FingerprintSources): PatchFinding {
  const looked = patch.traces.map((trace) => look(trace, sources)).filter((one) => one !== undefined);
  const known = looked.filter((one) => one.seen !== undefined);
  const state = known.some((one) => one.seen) ? 'present' : known.length > 0 ? 'absent' : 'unknown';
  return { patch: patch.patch, title: patch.title, state, evidence: looked.map((one) => one.text) };
}

interface Look {
  readonly seen?: boolean;
  readonly text: string;
}

/** Nothing where it was not tried. */
function look(trace: Trace, { vmStats, structs, symbols, behaviours }: FingerprintSources): Look | undefined {
  switch (trace.kind) {
    case 'vm-stat':
      return answer(`VM statistic ${trace.name}`, vmStats?.has(trace.name));
    case 'btf-struct':
      return answer(`BTF struct ${trace.struct}`, structs?.has(trace.struct));
    case 'btf-member': {
      const { struct, member, without } = trace;
      const has = (name = ''): boolean => structs?.get(struct)?.has(name) ?? false;
      const text = `BTF ${struct}.${member}${without === undefined ? '' : ` without ${without}`}`;
      return answer(text, structs && has(member) && !has(without));
    }
    case 'symbol':
      return symbols && answer(`function ${trace.name}`, symbols.has(trace.name));
    case 'behaviour': {
      const seen = behaviours?.get(trace.name);
      const text = `behaviour ${trace.name}: ${seen ? 'seen' : 'not seen'}, an L2 ran`;
      return seen === undefined ? undefined : { seen, text };
    }
  }
}

function answer(what: string, seen: boolean | undefined): Look {
  if (seen === undefined) return { text: `${what}: cannot be looked up here` };
  return { seen, text: `${what}: ${seen ? 'there' : 'not there'}` };
}
