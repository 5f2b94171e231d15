// SPDX-License-Identifier: Apache-2.0
// TLB-flush hypercalls of L2 that L0 answers without L1 (TLFS, "Direct Virtual Flush").
import { EVMCS_CLEAN, VP_ASSIST } from '../../guest/index.ts';
import type { Observations } from '../engine/model.ts';
import { kernelFrom } from '../engine/requirements.ts';
import { hex } from './common.ts';
import type { Bench, ScenarioCase } from './scenario.ts';
import { trace } from './trace.ts';

const FLUSHES = { space: 0x02, list: 0x03, 'space-ex': 0x13, 'list-ex': 0x14 } as const;
/** HvCallNotifyLongSpinWait. */
const OTHER = 0x08;
const NOWHERE = 0xd000_0000;
const DIRECT_HYPERCALL = 1;
const NESTED_FLUSH = 1;
/** In RCX the repetitions asked for, in RAX those done. */
const ONE_REPETITION = 2 ** 32;
/** Every processor and every address space. */
const ALL = 3n;
const ALL_PROCESSORS_SET = 1n;
const UNTOUCHED = 0xffff_ffff_ffff_ffffn;
const INVALID_INPUT = 3;
/** Reason of the exit that KVM makes up behind a flush while L1 holds the lock; its lower half is another one's. */
const TRAP_AFTER_FLUSH = 0x1000_0031;

const imm64 = (value: bigint): number[] => [...new Uint8Array(BigUint64Array.of(value).buffer)];

/** VMCALL with RCX and RDX, and what it returned in the next word of the page `results`. */
function hypercall(bench: Bench, index: number, rcx: bigint, rdx: number): number[] {
  return [
    ...[0x48, 0xb9, ...imm64(rcx)],
    ...[0x48, 0xba, ...imm64(BigInt(rdx))],
    ...[0x0f, 0x01, 0xc1],
    ...[0x48, 0xa3, ...imm64(BigInt(bench.page('results') + 8 * index))],
  ];
}

const CALL_BYTES = 33;
/** The exit behind a hypercall's VMCALL. */
const exitBehind = (index: number): string =>
  `ept-misconfiguration gpa=0x0 at=caller+${hex(CALL_BYTES * index + 23)}`;

const isExtended = (code: number): boolean => code >= 0x10;

/** An L2 that makes these hypercalls, and one that L1 always gets. */
function caller(bench: Bench, codes: readonly number[]): number {
  const gva = BigInt(bench.page('results'));
  const code = codes.flatMap((one, index) => {
    const name = `input ${index}`;
    const input = isExtended(one) ? [0n, ALL, ALL_PROCESSORS_SET, 0n, gva] : [0n, ALL, 0n, gva];
    for (const [i, word] of input.entries()) bench.view(name).setBigUint64(8 * i, word, true);
    bench.view('results').setBigUint64(8 * index, UNTOUCHED, true);
    const isList = one === FLUSHES.list || one === FLUSHES['list-ex'];
    return hypercall(bench, index, BigInt(one + (isList ? ONE_REPETITION : 0)), bench.page(name));
  });
  return bench.raw('caller', ...code, ...hypercall(bench, codes.length, BigInt(OTHER), 0));
}

interface Switches {
  readonly enlightenment?: boolean;
  readonly directHypercall?: boolean;
  /** Where L0 looks for the lock; default a page whose lock is free. */
  readonly assistPage?: number;
}

/** Turns direct flushes on: in the eVMCS and in the VP assist page. */
function enable(bench: Bench, switches: Switches = {}): void {
  const { enlightenment = true, directHypercall = true, assistPage = bench.page('assist') } = switches;
  const { evmcs } = bench.l2;
  if (!evmcs) throw new Error('no eVMCS');
  evmcs.setWord('enlightenmentsControl', enlightenment ? NESTED_FLUSH : 0);
  evmcs.setWord('partitionAssistPage', assistPage);
  evmcs.setWord('vmId', 1);
  evmcs.setWord('vpId', 1);
  bench.cpu.vpAssistPage.setUint32(VP_ASSIST.nestedFeatures, directHypercall ? DIRECT_HYPERCALL : 0, true);
}

/** What each hypercall returned; -1 for one that did not return. */
function returned(bench: Bench, count: number): number[] {
  return Array.from({ length: count }, (_, index) => {
    const value = bench.view('results').getBigUint64(8 * index, true);
    return value === UNTOUCHED ? -1 : Number(value);
  });
}

/** Older kernels leave L2's flushes to L1. */
const requires = [kernelFrom(6, 2, 'give L1 every hypercall of L2')];

function flushCase(
  name: string,
  title: string,
  codes: readonly number[],
  switches: (bench: Bench) => Switches,
  results: readonly number[],
): ScenarioCase {
  return {
    id: `evmcs/flush/${name}`,
    title,
    requires,
    options: (bench) => ({ entry: caller(bench, codes) }),
    before: (bench) => enable(bench, switches(bench)),
    after: (bench) => ({ returned: returned(bench, codes.length) }),
    expect: { exits: ['vmcall'], more: { returned: results } },
  };
}

const CODES = Object.values(FLUSHES);

/** What L2 left with, and what its flush returned. */
async function behindFlush(bench: Bench): Promise<Observations> {
  const reason = Number(await bench.l2.fields.read('VM_EXIT_REASON'));
  return { reason, returned: returned(bench, 2)[1] ?? -1 };
}

export const flushes: readonly ScenarioCase[] = [
  flushCase('direct', 'L0 flushes for L2, by all four hypercalls; L1 gets another one', CODES, () => ({}), [
    0,
    ONE_REPETITION,
    0,
    ONE_REPETITION,
  ]),
  flushCase(
    'no-enlightenment',
    'without the enlightenment in the eVMCS the hypercall exits to L1',
    [FLUSHES.space],
    () => ({ enlightenment: false }),
    [-1],
  ),
  flushCase(
    'no-direct-hypercall',
    'without direct hypercalls in the VP assist page it exits to L1',
    [FLUSHES.space],
    () => ({ directHypercall: false }),
    [-1],
  ),
  flushCase(
    'unbacked',
    'the partition assist page is where no memory is: the hypercall says so',
    [FLUSHES.space],
    () => ({ assistPage: NOWHERE }),
    [INVALID_INPUT],
  ),
  {
    id: 'evmcs/flush/locked',
    title: 'while L1 holds the lock of L2s TLB an exit follows the flush',
    requires,
    options: (bench) => ({ entry: caller(bench, [FLUSHES.space, FLUSHES.space]) }),
    before: (bench) => {
      bench.view('assist').setUint32(0, 1, true);
      enable(bench);
    },
    after: behindFlush,
    expect: { exits: [exitBehind(0)], more: { reason: TRAP_AFTER_FLUSH, returned: -1 } },
  },
  ...([true, false] as const).map(
    (isDirty): ScenarioCase => ({
      id: `evmcs/clean-fields/enlightenments/${isDirty ? 'dirty' : 'clean'}`,
      title: isDirty
        ? 'another partition assist page and its group marked so: the next flush looks there'
        : 'another partition assist page behind a group marked clean: the next flush looks at the old one',
      requires,
      options: (bench) => ({ entry: caller(bench, [OTHER, FLUSHES.space]) }),
      before: async (bench) => {
        enable(bench);
        await trace(bench.l2);
        bench.view('other').setUint32(0, 1, true);
        bench.l2.evmcs!.setWord('partitionAssistPage', bench.page('other'));
        bench.l2.evmcs!.cleanFields = isDirty
          ? EVMCS_CLEAN.all & ~EVMCS_CLEAN.enlightenments
          : EVMCS_CLEAN.all;
      },
      after: behindFlush,
      expect: isDirty
        ? { exits: [exitBehind(1)], more: { reason: TRAP_AFTER_FLUSH, returned: -1 } }
        : { exits: ['vmcall'], more: { reason: 18, returned: 0 } },
    }),
  ),
];
