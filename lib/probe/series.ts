// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';

/** The two answers a kernel can give to a test of the series. */
export type KernelKind = 'stock' | 'patched';

/** What of the series a test's answer depends on; a series in review may be in a kernel in part. */
export const CHANGES = ['msr-bitmap', 'pages', 'evmcs', 'contexts'] as const;
export type Change = (typeof CHANGES)[number];

/** One trace a patch of the series leaves where userspace can see it. */
export type Trace =
  | { readonly kind: 'vm-stat'; readonly name: string }
  /** `without`: a member of older kernels' struct, which had the other one too. */
  | {
      readonly kind: 'btf-member';
      readonly struct: string;
      readonly member: string;
      readonly without?: string;
    }
  | { readonly kind: 'btf-struct'; readonly struct: string }
  /** A function that the compiler cannot leave out: global, or reached by a pointer. */
  | { readonly kind: 'symbol'; readonly name: string }
  /** What an L2 sees. Says nothing of how the kernel does it, so no test's table is chosen by it. */
  | { readonly kind: 'behaviour'; readonly name: BehaviourName };

export const BEHAVIOURS = ['discarded-page-traps', 'unaligned-evmcs-refused'] as const;
export type BehaviourName = (typeof BEHAVIOURS)[number];

export interface SeriesPatch {
  /** Its number in the posted series. */
  readonly patch: number;
  readonly title: string;
  /** Any one of them is enough to call the patch present. */
  readonly traces: readonly Trace[];
}

/**
 * A patch series, by what it leaves in a kernel. Names may change while a series is reviewed, so they are data:
 * series.json beside this file, or the file that NVMX_SERIES names.
 */
export interface Series {
  readonly title: string;
  readonly patches: readonly SeriesPatch[];
  /** The patch that makes each change. */
  readonly changes: Readonly<Record<Change, number>>;
  /** VM statistics of the nested context table. */
  readonly contextStats: { readonly reuse: string; readonly recycle: string };
  /** Contexts the table holds for each vCPU of a VM (uapi KVM_NESTED_OVERSUB_RATIO). */
  readonly contextsPerCpu: number;
}

/** NVMX_SERIES names a file that cannot be read or does not describe a series. */
export class SeriesError extends Error {
  override readonly name = 'SeriesError';
}

const OWN = new URL('./series.json', import.meta.url);

let loaded: { readonly from: string | undefined; readonly series: Series } | undefined;

/**
 * The series this process looks for.
 *
 * @throws SeriesError
 */
export function series(): Series {
  const from = process.env['NVMX_SERIES'] || undefined;
  if (loaded?.from !== from || !loaded) loaded = { from, series: readSeries(from ?? OWN) };
  return loaded.series;
}

/** @throws SeriesError which says what in the file is wrong */
export function readSeries(path: string | URL): Series {
  const fail = (why: string): never => {
    throw new SeriesError(
      `NVMX_SERIES=${path} cannot be used: ${why}; begin with a copy of the package's lib/probe/series.json`,
    );
  };
  let value: unknown;
  try {
    value = JSON.parse(readFileSync(path, 'utf8'));
  } catch (error) {
    return fail((error as Error).message);
  }
  const wrong = findWrong(value);
  return wrong === undefined ? (value as Series) : fail(wrong);
}

type Json = Readonly<Record<string, unknown>>;

function findWrong(value: unknown): string | undefined {
  if (!isObject(value)) return 'it is not a JSON object';
  const { title, patches, changes, contextStats, contextsPerCpu } = value;
  if (typeof title !== 'string') return '"title" is not a text';
  if (!Array.isArray(patches) || patches.length === 0) return '"patches" is not a list';
  for (const [index, patch] of patches.entries()) {
    const wrong = findWrongPatch(patch);
    if (wrong !== undefined) return `patches[${index}]: ${wrong}`;
  }
  const numbers = new Set(patches.map((patch: SeriesPatch) => patch.patch));
  if (!isObject(changes) || !CHANGES.every((change) => numbers.has(changes[change] as number))) {
    return `"changes" does not give ${CHANGES.join(', ')} the number of one of its patches each`;
  }
  if (!isObject(contextStats) || !texts(contextStats, 'reuse', 'recycle')) {
    return '"contextStats" does not name "reuse" and "recycle"';
  }
  return isCount(contextsPerCpu) ? undefined : '"contextsPerCpu" is not a whole number from 1 on';
}

function findWrongPatch(patch: unknown): string | undefined {
  if (!isObject(patch)) return 'not an object';
  if (!isCount(patch['patch'])) return '"patch" is not a whole number from 1 on';
  if (typeof patch['title'] !== 'string') return '"title" is not a text';
  const traces = patch['traces'];
  if (!Array.isArray(traces) || traces.length === 0) return '"traces" is not a list';
  const bad = traces.findIndex((trace) => !isTrace(trace));
  return bad < 0
    ? undefined
    : `traces[${bad}] is no {kind: "vm-stat", name}, {kind: "btf-struct", struct}, {kind: "btf-member", struct, member}, ` +
        `{kind: "symbol", name} or {kind: "behaviour", name: ${BEHAVIOURS.map((name) => `"${name}"`).join(' or ')}}`;
}

function isTrace(trace: unknown): boolean {
  if (!isObject(trace)) return false;
  switch (trace['kind']) {
    case 'vm-stat':
    case 'symbol':
      return texts(trace, 'name');
    case 'behaviour':
      return BEHAVIOURS.some((name) => name === trace['name']);
    case 'btf-struct':
      return texts(trace, 'struct');
    case 'btf-member':
      return texts({ without: '', ...trace }, 'struct', 'member', 'without');
    default:
      return false;
  }
}

function isObject(value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isCount(value: unknown): boolean {
  return Number.isSafeInteger(value) && (value as number) > 0;
}

function texts(value: Json, ...names: string[]): boolean {
  return names.every((name) => typeof value[name] === 'string');
}

/** Where the lab machine finds the file, and what a program there must know to look into it. */
export function seriesForLab(): { files: Record<string, string>; env: Record<string, string> } {
  series();
  const from = process.env['NVMX_SERIES'];
  return from
    ? { files: { '/series.json': from }, env: { NVMX_SERIES: '/series.json' } }
    : { files: {}, env: {} };
}
