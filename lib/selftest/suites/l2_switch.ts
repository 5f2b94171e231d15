// SPDX-License-Identifier: Apache-2.0
import { setImmediate as immediate } from 'node:timers/promises';
import { Batch, foldChecksum, type L1, type L2, vmcallRegsValues } from '../../guest/index.ts';
import { series } from '../../probe/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Selftest, SelftestContext, Suite } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, nestedRuns, stat } from './common.ts';
import { countersOf, type SwitchMode, type Turn, turnsOf } from './context_table.ts';
import { contexts } from './l2_switch_contexts.ts';
import { enlightenedVmcs } from './scenario.ts';

const DEFAULT_ROUNDS = 4;
/** vCPUs of the modes for several, in an id that does not say. */
const DEFAULT_VCPUS = 2;
const SECONDARY_ENABLE_VPID = 1n << 5n;

interface Mode {
  readonly name: SwitchMode;
  /** Of all of upstream's sizes, unless the user names others. */
  readonly whole?: true;
  readonly title: string;
  /** For several vCPUs of L1, or for one. */
  readonly many: boolean;
  /** VMCLEAR after every turn: what a hypervisor does before another CPU may load the VMCS. */
  readonly clear: boolean;
  /** VM entries in a turn. */
  readonly entries: 1 | 2;
}

const UPSTREAM_SIZES = Array.from({ length: 15 }, (_, i) => i + 2);
/** Both sides of the context table's size, and upstream's ends. */
const FEW_SIZES = [2, 8, 9, 16];

const MODES: readonly Mode[] = [
  {
    name: 'sched',
    whole: true,
    title: 'on one L1 vCPU, VMRESUME after the first turn',
    many: false,
    clear: false,
    entries: 1,
  },
  {
    name: 'migrate',
    whole: true,
    title: 'on one L1 vCPU, VMCLEAR after every turn',
    many: false,
    clear: true,
    entries: 1,
  },
  {
    name: 'evmcs',
    title: 'on one L1 vCPU, the VP assist page names another eVMCS, VMLAUNCH and VMRESUME',
    many: false,
    clear: false,
    entries: 2,
  },
  {
    name: 'sched-vcpus',
    title: 'on several L1 vCPUs at the same time, each VMCS on its own one',
    many: true,
    clear: false,
    entries: 1,
  },
  {
    name: 'migrate-vcpus',
    title: 'every round on the next of several L1 vCPUs',
    many: true,
    clear: true,
    entries: 1,
  },
];

/** Register values of an L2's entry; each is L2's own, so a mix-up of two L2s changes a checksum. */
function seedOf(index: number, entry: number): bigint {
  return BigInt(index * 1000 + entry + 1);
}

/** What L2 has folded when it stands in its last VMCALL: every entry's mark, and the registers of all but the last. */
function expectedChecksum(index: number, entries: number): bigint {
  const values: bigint[] = [];
  for (let entry = 0; entry < entries; entry++) {
    values.push(seedOf(index, entry));
    if (entry < entries - 1) values.push(...vmcallRegsValues(seedOf(index, entry)));
  }
  return foldChecksum(values);
}

function createL2(l1: L1, mode: Mode, { vmcs, vcpu }: Turn, entries: number): Promise<L2> {
  const options = { vpid: vmcs + 1, msrBitmap: true, cpu: vcpu, evmcs: mode.name === 'evmcs' };
  return l1.createL2(options, (program) => {
    for (let entry = 0; entry < entries; entry++) {
      program.fold(seedOf(vmcs, entry)).vmcallRegs(seedOf(vmcs, entry));
    }
  });
}

async function hasVpid(l2: L2): Promise<boolean> {
  const controls = await l2.vmread('SECONDARY_VM_EXEC_CONTROL');
  const vpid = await l2.vmread('VIRTUAL_PROCESSOR_ID');
  return (controls & SECONDARY_ENABLE_VPID) !== 0n && vpid === BigInt(l2.options.vpid ?? 0);
}

/** One turn on an ordinary VMCS: it is loaded exactly once, which is what the context counters count. */
async function takeTurn(l2: L2, { vcpu }: Turn, signal: AbortSignal): Promise<void> {
  const stop = await l2.enter({ on: vcpu, signal });
  if (stop.kind === 'exit' && stop.exit.reason === 'vmcall') return;
  throw new Error(`L2 stopped with ${stop.kind === 'exit' ? stop.exit.reason : stop.kind}`);
}

/** One turn on an eVMCS: nothing but the pointer changes, and no VMCLEAR tells KVM that the old one is through. */
async function takeEnlightenedTurn(l2: L2, signal: AbortSignal): Promise<void> {
  const { cpu } = l2;
  const batch = new Batch();
  l2.setPolicy({});
  cpu.enlighten(batch, l2.vmcs);
  batch.enter(l2.area.gpa, 'launch').enter(l2.area.gpa, 'resume');
  await cpu.executeAll(batch, { signal });
  cpu.setEvmcs(l2.vmcs);
}

/** Turns of vCPUs can follow each other so closely that timers starve, and the lab's heartbeat with them: immediate(). */
async function run(
  context: SelftestContext,
  mode: Mode,
  { c, s, v }: Size,
): Promise<{ observed: Observations }> {
  const { signal } = context;
  const isEnlightened = mode.name === 'evmcs';
  await using machine = await bootL1(context, { vcpus: v, evmcs: isEnlightened });
  const { vm, l1 } = machine;
  // read once, before vCPUs ask for it at the same time
  await l1.controls();
  const runsBefore = nestedRuns(l1);
  const l2s: L2[] = [];
  const entries = s * mode.entries;
  if (isEnlightened) {
    for (let vmcs = 0; vmcs < c; vmcs++) l2s[vmcs] = await createL2(l1, mode, { vmcs, vcpu: 0 }, entries);
  }
  let turns = 0;
  const play = async (list: readonly Turn[]): Promise<void> => {
    for (const turn of list) {
      l2s[turn.vmcs] ??= await createL2(l1, mode, turn, entries);
      const l2 = l2s[turn.vmcs]!;
      if (isEnlightened) await takeEnlightenedTurn(l2, signal);
      else await takeTurn(l2, turn, signal);
      turns += 1;
      if (mode.clear) await l2.vmclear();
      await immediate();
    }
  };
  await Promise.all(turnsOf(mode.name, c, s, v).map(play));
  const stats = vm.stats();
  const counter = (name: string): number | null => (stats.has(name) ? stat(stats, name) : null);
  const counters = {
    contextReuse: counter(series().contextStats.reuse),
    contextRecycle: counter(series().contextStats.recycle),
  };
  const nestedRun = nestedRuns(l1) - runsBefore;
  let vpids = 0;
  let rightChecksums = 0;
  for (const [index, l2] of l2s.entries()) {
    vpids += (await hasVpid(l2)) ? 1 : 0;
    rightChecksums += l2.progress.checksum === expectedChecksum(index, entries) ? 1 : 0;
    await immediate();
  }
  return {
    observed: {
      nestedRun,
      vmcallExits: l2s.reduce((sum, l2) => sum + l2.exitCount('vmcall'), 0),
      turns,
      operations: l2s.map((l2) => l2.progress.executed).reduce((sum, n) => sum + n, 0),
      rightChecksums,
      vpids,
      ...counters,
    },
  };
}

interface Size {
  readonly c: number;
  readonly s: number;
  readonly v: number;
}

function idOf(mode: Mode, { c, s, v }: Size): string {
  const rounds = s === DEFAULT_ROUNDS ? '' : `,s=${s}`;
  const vcpus = v === (mode.many ? DEFAULT_VCPUS : 1) ? '' : `,v=${v}`;
  return `l2-switch/${mode.name}/c=${c}${rounds}${vcpus}`;
}

function define(mode: Mode, size: Size): Selftest {
  const { c, s, v } = size;
  const entries = c * s * mode.entries;
  const everywhere = {
    nestedRun: entries,
    vmcallExits: entries,
    turns: c * s,
    operations: c * (2 * s * mode.entries - 1),
    rightChecksums: c,
    vpids: c,
  };
  const { reuse, recycle } = countersOf(mode.name, c, s, v, series().contextsPerCpu);
  return selftest({
    id: idOf(mode, size),
    title: `${c} L2s take turns ${mode.title}`,
    requires: [
      nestedVmx,
      binaryStats,
      vmxControl('secondary.enable-ept'),
      vmxControl('secondary.enable-vpid'),
      vmxControl('primary.use-msr-bitmaps'),
      ...(mode.name === 'evmcs' ? [enlightenedVmcs] : []),
    ],
    timeoutMs: 20_000 + 100 * entries,
    expectations: {
      change: 'contexts',
      stock: { ...everywhere, contextReuse: null, contextRecycle: null },
      patched: { ...everywhere, contextReuse: reuse, contextRecycle: recycle },
    },
    body: (context) => run(context, mode, size),
  });
}

export const l2Switch: Suite = {
  name: 'l2-switch',
  parameters: {
    c: { title: 'VMCSs that take turns', min: 1, max: 24, default: UPSTREAM_SIZES },
    s: { title: 'rounds', min: 1, max: 64, default: [DEFAULT_ROUNDS] },
    v: { title: 'vCPUs of L1', min: 1, max: 4, default: [1, DEFAULT_VCPUS] },
  },
  tests: ({ c = [], s = [], v = [] }, chosen) => {
    const sizes = (mode: Mode): readonly number[] => (mode.whole || chosen.has('c') ? c : FEW_SIZES);
    const switches = MODES.flatMap((mode) =>
      v
        .filter((vcpus) => mode.many === vcpus > 1)
        .flatMap((vcpus) =>
          sizes(mode).flatMap((size) => s.map((rounds) => define(mode, { c: size, s: rounds, v: vcpus }))),
        ),
    );
    return [...switches, ...contexts()];
  },
};
