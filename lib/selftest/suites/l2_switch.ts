// SPDX-License-Identifier: Apache-2.0
import { cpus } from 'node:os';
import { foldChecksum, type L1, type L2, vmcallRegsValues } from '../../guest/index.ts';
import { series } from '../../probe/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Selftest, SelftestContext, Suite } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, nestedRuns, stat } from './common.ts';

const DEFAULT_ROUNDS = 4;
const SECONDARY_ENABLE_VPID = 1n << 5n;

interface Mode {
  readonly name: 'sched' | 'migrate' | 'migrate-vcpus';
  readonly title: string;
  readonly vcpus: number;
  /** VMCLEAR after every turn: what a hypervisor does before another CPU may load the VMCS. */
  readonly clear: boolean;
  /** Context counters the series' own formula gives for c VMCSs, s rounds and a table of m contexts. */
  readonly counters?: (c: number, s: number, m: number) => { reuse: number; recycle: number };
}

const MODES: readonly Mode[] = [
  {
    name: 'sched',
    title: 'on one L1 vCPU, VMRESUME after the first turn',
    vcpus: 1,
    clear: false,
    // A lone VMCS stays current: it is never loaded again.
    counters: (c, s, m) => ({ reuse: c === 1 ? 0 : Math.min(c, m) * (s - 1), recycle: 0 }),
  },
  {
    name: 'migrate',
    title: 'on one L1 vCPU, VMCLEAR after every turn',
    vcpus: 1,
    clear: true,
    counters: (c, s, m) => (c <= m ? { reuse: c * (s - 1), recycle: 0 } : { reuse: 0, recycle: c * s - m }),
  },
  { name: 'migrate-vcpus', title: 'every round on the other one of two L1 vCPUs', vcpus: 2, clear: true },
];

/** Register values of an L2's turn; each is L2's own, so a mix-up of two L2s changes a checksum. */
function seedOf(index: number, round: number): bigint {
  return BigInt(index * 1000 + round + 1);
}

/** What L2 has folded when it stands in its last VMCALL: every turn's mark, and the registers of all but the last. */
function expectedChecksum(index: number, rounds: number): bigint {
  const values: bigint[] = [];
  for (let round = 0; round < rounds; round++) {
    values.push(seedOf(index, round));
    if (round < rounds - 1) values.push(...vmcallRegsValues(seedOf(index, round)));
  }
  return foldChecksum(values);
}

/**
 * Made at its first turn, so that a VMCS is loaded exactly once a turn: what the context counters count.
 */
function createL2(l1: L1, index: number, rounds: number): Promise<L2> {
  return l1.createL2({ vpid: index + 1, msrBitmap: true }, (program) => {
    for (let round = 0; round < rounds; round++) {
      program.fold(seedOf(index, round)).vmcallRegs(seedOf(index, round));
    }
  });
}

async function hasVpid(l2: L2): Promise<boolean> {
  const controls = await l2.vmread('SECONDARY_VM_EXEC_CONTROL');
  const vpid = await l2.vmread('VIRTUAL_PROCESSOR_ID');
  return (controls & SECONDARY_ENABLE_VPID) !== 0n && vpid === BigInt(l2.options.vpid ?? 0);
}

async function run(
  context: SelftestContext,
  mode: Mode,
  c: number,
  rounds: number,
): Promise<{ observed: Observations; evidence: Observations }> {
  await using machine = await bootL1(context, mode.vcpus);
  const { vm, l1 } = machine;
  const runsBefore = nestedRuns(l1);
  const l2s: L2[] = [];
  let vmcalls = 0;
  for (let round = 0; round < rounds; round++) {
    for (let index = 0; index < c; index++) {
      const l2 = l2s[index] ?? (await createL2(l1, index, rounds));
      l2s[index] = l2;
      const stop = await l2.enter({ on: round % mode.vcpus, signal: context.signal });
      if (stop.kind !== 'exit' || stop.exit.reason !== 'vmcall') {
        throw new Error(`L2 ${index} stopped with ${stop.kind === 'exit' ? stop.exit.reason : stop.kind}`);
      }
      vmcalls += 1;
      if (mode.clear) await l2.vmclear();
    }
  }
  const stats = vm.stats();
  const counter = (name: string): number | null => (stats.has(name) ? stat(stats, name) : null);
  const counters = {
    contextReuse: counter(series().contextStats.reuse),
    contextRecycle: counter(series().contextStats.recycle),
  };
  const nestedRun = nestedRuns(l1) - runsBefore;
  let vpids = 0;
  for (const l2 of l2s) vpids += (await hasVpid(l2)) ? 1 : 0;
  return {
    observed: {
      nestedRun,
      vmcallExits: l2s.reduce((sum, l2) => sum + l2.exitCount('vmcall'), 0),
      turns: vmcalls,
      operations: l2s.map((l2) => l2.progress.executed).reduce((sum, n) => sum + n, 0),
      rightChecksums: l2s.filter((l2, index) => l2.progress.checksum === expectedChecksum(index, rounds))
        .length,
      vpids,
      ...(mode.counters ? counters : {}),
    },
    evidence: mode.counters ? {} : counters,
  };
}

function define(mode: Mode, c: number, s: number): Selftest {
  const everywhere = {
    nestedRun: c * s,
    vmcallExits: c * s,
    turns: c * s,
    operations: c * (2 * s - 1),
    rightChecksums: c,
    vpids: c,
  };
  // Evaluated where the test runs: in the lab this is the emulated machine's number of CPUs.
  const contexts = series().contextsPerCpu * cpus().length;
  const counted = mode.counters?.(c, s, contexts);
  return selftest({
    id: `l2-switch/${mode.name}/c=${c}${s === DEFAULT_ROUNDS ? '' : `,s=${s}`}`,
    title: `${c} L2s take turns ${mode.title}`,
    requires: [
      nestedVmx,
      binaryStats,
      vmxControl('secondary.enable-ept'),
      vmxControl('secondary.enable-vpid'),
      vmxControl('primary.use-msr-bitmaps'),
    ],
    expectations: counted
      ? {
          stock: { ...everywhere, contextReuse: null, contextRecycle: null },
          patched: { ...everywhere, contextReuse: counted.reuse, contextRecycle: counted.recycle },
        }
      : { any: everywhere },
    body: (context) => run(context, mode, c, s),
  });
}

export const l2Switch: Suite = {
  name: 'l2-switch',
  parameters: {
    c: {
      title: 'VMCSs that take turns',
      min: 1,
      max: 24,
      default: Array.from({ length: 15 }, (_, i) => 2 + i),
    },
    s: { title: 'rounds', min: 1, max: 64, default: [DEFAULT_ROUNDS] },
  },
  tests: ({ c = [], s = [] }) =>
    MODES.flatMap((mode) => c.flatMap((size) => s.map((rounds) => define(mode, size, rounds)))),
};
