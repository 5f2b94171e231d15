// SPDX-License-Identifier: Apache-2.0
// What a VMCS brings with it when it is loaded: its pages must be the ones it names, wherever KVM keeps them mapped.
import type { L1, L2, L2Program } from '../../guest/index.ts';
import { foldChecksum, vmcallRegsValues } from '../../guest/index.ts';
import type { Vm } from '../../kvm/index.ts';
import { series } from '../../probe/index.ts';
import { selftest } from '../engine/define.ts';
import type { Expectations, ExpectationTable, Observed, Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, hex, nestedRuns, stat } from './common.ts';
import { type ContextCounters, ContextTable } from './context_table.ts';
import { GuestPage, PAGE_GPA } from './guest_page.ts';

const SYSENTER_ESP = 0x175;
const TPR = 0x80;
/** A register of the APIC page that no control virtualizes: an access exits. */
const APIC_ID = 0x20;
const APART = 0x10_0000;

const requires = [
  nestedVmx,
  binaryStats,
  vmxControl('secondary.enable-vpid'),
  vmxControl('secondary.virtualize-apic-accesses'),
  vmxControl('primary.use-tpr-shadow'),
  vmxControl('primary.use-msr-bitmaps'),
];
const REASONS = ['apic-access', 'wrmsr', 'vmcall'] as const;
const POLICY = { 'apic-access': 'skip', wrmsr: 'skip' } as const;

function counters(vm: Vm): Record<string, number | null> {
  const stats = vm.stats();
  const counter = (name: string): number | null => (stats.has(name) ? stat(stats, name) : null);
  const { reuse, recycle } = series().contextStats;
  return { contextReuse: counter(reuse), contextRecycle: counter(recycle) };
}

function withCounters(table: ExpectationTable, { reuse, recycle }: ContextCounters): Expectations {
  return {
    change: 'contexts',
    stock: { ...table, contextReuse: null, contextRecycle: null },
    patched: { ...table, contextReuse: reuse, contextRecycle: recycle },
  };
}

/** Uses all three pages: an APIC write that exits, the TPR in the virtual-APIC page, an MSR write by the bitmap. */
function usePages(program: L2Program, apicAccess: number, tpr: number): L2Program {
  return program
    .write32(apicAccess + APIC_ID, 1)
    .writeCr8(tpr)
    .readCr8()
    .wrmsr(SYSENTER_ESP, tpr);
}

/** Exits since the last call, by {@link REASONS}. */
function exitCounter(l2: L2): () => number[] {
  const now = () => REASONS.map((reason) => l2.exitCount(reason));
  let before = now();
  return () => {
    const after = now();
    const counts = after.map((count, i) => count - (before[i] ?? 0));
    before = after;
    return counts;
  };
}

async function enter(l2: L2, on: number, signal: AbortSignal): Promise<void> {
  const stop = await l2.enter({ on, policy: POLICY, signal });
  const reason = stop.kind === 'exit' ? stop.exit.reason : stop.kind;
  if (reason !== 'vmcall') throw new Error(`L2 stopped with ${reason}`);
}

const VCPUS = 4;
const TURNS = 16;
/** What the host does to all three pages before a turn; zeroes come after each. */
const CHANGES: readonly ((page: GuestPage) => void)[] = [
  () => {},
  (page) => page.discard(),
  (page) => page.swap(),
  (page) => {
    page.moveAway();
    page.discard();
    page.moveBack();
  },
];
const tprOf = (turn: number) => 1 + (turn % 15);

const handOver = selftest({
  id: 'l2-switch/hand-over/discard',
  title: 'a VMCS goes round four L1 vCPUs; its pages are discarded, swapped or moved on the way',
  requires,
  expectations: withCounters(
    {
      exits: Array.from({ length: TURNS }, (_, turn) => [1, turn & 1, 1]),
      tprs: Array.from({ length: TURNS }, (_, turn) => tprOf(turn) << 4),
      apicPage: 0,
      nestedRun: TURNS * 2 + TURNS / 2,
      executed: TURNS * 5 - 1,
      checksum: hex(foldChecksum(Array.from({ length: TURNS }, (_, turn) => tprOf(turn)))),
    },
    { reuse: TURNS - 1, recycle: 0 },
  ),
  body: async (context) => {
    await using machine = await bootL1(context, VCPUS);
    const { vm, l1 } = machine;
    const [apicAccess, virtualApic, bitmap] = [0, 1, 2].map(
      (i) => new GuestPage(vm, PAGE_GPA + i * APART),
    ) as [GuestPage, GuestPage, GuestPage];
    const options = {
      vpid: 1,
      apicAccess: apicAccess.gpa,
      virtualApic: virtualApic.gpa,
      msrBitmap: bitmap.gpa,
    };
    const l2 = await l1.createL2(options, (program) => {
      for (let turn = 0; turn < TURNS; turn++) usePages(program, apicAccess.gpa, tprOf(turn)).vmcall();
    });
    const runsBefore = nestedRuns(l1);
    const count = exitCounter(l2);
    const exits: Observed[] = [];
    const tprs: number[] = [];
    let apicPage = 0;
    for (let turn = 0; turn < TURNS; turn++) {
      // each change meets each vCPU
      const change = CHANGES[(turn + Math.floor(turn / VCPUS)) % CHANGES.length]!;
      for (const page of [apicAccess, virtualApic, bitmap]) change(page);
      l2.msrBitmap?.interceptWrite(SYSENTER_ESP, (turn & 1) === 1);
      await enter(l2, turn % VCPUS, context.signal);
      exits.push(count());
      tprs.push(virtualApic.view.getUint8(TPR));
      apicPage |= apicAccess.view.getUint32(APIC_ID, true);
      await l2.vmclear();
    }
    return {
      observed: {
        exits,
        tprs,
        apicPage,
        nestedRun: nestedRuns(l1) - runsBefore,
        executed: l2.progress.executed,
        checksum: hex(l2.progress.checksum),
        ...counters(vm),
      },
    };
  },
});

/** One L2 with pages of its own in L1's memory; every second one has its MSR write intercepted. */
async function makeOwn(l1: L1, index: number, turns: number): Promise<L2> {
  const apicAccess = l1.allocate();
  const options = { vpid: index + 1, apicAccess, virtualApic: true, msrBitmap: true } as const;
  const l2 = await l1.createL2(options, (program) => {
    for (let turn = 0; turn < turns; turn++) usePages(program, apicAccess, ownTpr(index)).vmcall();
  });
  l2.msrBitmap?.interceptWrite(SYSENTER_ESP, (index & 1) === 1);
  return l2;
}

const ownTpr = (index: number) => 1 + (index % 15);

/** Whether the L2 has run this often with its own pages and no other's. */
function isRight(l2: L2, index: number, turns: number): boolean {
  const [apic, wrmsr, vmcall] = REASONS.map((reason) => l2.exitCount(reason));
  return (
    apic === turns &&
    wrmsr === (index & 1) * turns &&
    vmcall === turns &&
    l2.vapic?.tpr === ownTpr(index) << 4 &&
    l2.progress.checksum === foldChecksum(Array.from({ length: turns }, () => ownTpr(index)))
  );
}

const MANY = 12;
const FREED = 4;
const ROUNDS = 4;
/** Load order: two rounds of all; then four are cleared; then again two rounds of all. */
function exhaustedCounters(): ContextCounters {
  const table = new ContextTable(series().contextsPerCpu);
  for (let round = 0; round < ROUNDS; round++) {
    if (round === ROUNDS / 2) for (let vmcs = 0; vmcs < FREED; vmcs++) table.clear(0, vmcs);
    for (let i = 0; i < MANY; i++) table.load(0, (i + (round >= ROUNDS / 2 ? FREED : 0)) % MANY);
  }
  return table.counters;
}

const exhausted = (): Selftest =>
  selftest({
    id: 'l2-switch/contexts/exhausted',
    title: 'more VMCSs are loaded than KVM keeps contexts for; then some are cleared, and others take theirs',
    requires,
    expectations: withCounters(
      { right: MANY, nestedRun: ROUNDS * (2 * MANY + MANY / 2), operations: MANY * (ROUNDS * 5 - 1) },
      exhaustedCounters(),
    ),
    body: async (context) => {
      await using machine = await bootL1(context);
      const { vm, l1 } = machine;
      const runsBefore = nestedRuns(l1);
      const l2s: L2[] = [];
      for (let round = 0; round < ROUNDS; round++) {
        const late = round >= ROUNDS / 2;
        if (round === ROUNDS / 2)
          for (const l2 of l2s.slice(0, FREED)) await l1.cpu(0).vmclear(l2.vmcs, l2.area.gpa);
        for (let i = 0; i < MANY; i++) {
          const index = (i + (late ? FREED : 0)) % MANY;
          l2s[index] ??= await makeOwn(l1, index, ROUNDS);
          await enter(l2s[index]!, 0, context.signal);
        }
      }
      return {
        observed: {
          right: l2s.filter((l2, index) => isRight(l2, index, ROUNDS)).length,
          nestedRun: nestedRuns(l1) - runsBefore,
          operations: l2s.reduce((sum, l2) => sum + l2.progress.executed, 0),
          ...counters(vm),
        },
      };
    },
  });

const CYCLES = 4;
const ATTACHED = 8;
/** Each cycle loads VMCSs of its own and ends in VMXOFF; before the last one all earlier ones are cleared. */
function vmxoffCounters(): ContextCounters {
  const table = new ContextTable(series().contextsPerCpu);
  for (let cycle = 0; cycle < CYCLES; cycle++) {
    if (cycle === CYCLES - 1) for (let i = 0; i < cycle * ATTACHED; i++) table.clear(0, i);
    for (let i = 0; i < ATTACHED; i++) table.load(0, cycle * ATTACHED + i);
    table.off(0);
  }
  return table.counters;
}

const vmxoff = (): Selftest =>
  selftest({
    id: 'l2-switch/contexts/vmxoff',
    title: 'VMXOFF with eight VMCSs loaded and not cleared, again and again; then the old ones are cleared',
    requires,
    expectations: withCounters(
      {
        right: CYCLES * ATTACHED,
        nestedRun: CYCLES * (2 * ATTACHED + ATTACHED / 2),
        operations: CYCLES * ATTACHED * 4,
      },
      vmxoffCounters(),
    ),
    body: async (context) => {
      await using machine = await bootL1(context);
      const { vm, l1 } = machine;
      const cpu = l1.cpu(0);
      const runsBefore = nestedRuns(l1);
      const l2s: L2[] = [];
      for (let cycle = 0; cycle < CYCLES; cycle++) {
        if (cycle === CYCLES - 1) {
          await l1.vmxon();
          for (const l2 of l2s) await cpu.vmclear(l2.vmcs, l2.area.gpa);
        }
        for (let i = 0; i < ATTACHED; i++) {
          const index = l2s.length;
          l2s.push(await makeOwn(l1, index, 1));
          await enter(l2s[index]!, 0, context.signal);
        }
        await cpu.vmxoff();
      }
      return {
        observed: {
          right: l2s.filter((l2, index) => isRight(l2, index, 1)).length,
          nestedRun: nestedRuns(l1) - runsBefore,
          operations: l2s.reduce((sum, l2) => sum + l2.progress.executed, 0),
          ...counters(vm),
        },
      };
    },
  });

const RACERS = 5;
const RACE_TURNS = 150;
const PAUSES = 10_000;

async function race(context: SelftestContext) {
  const { signal, random } = context;
  await using machine = await bootL1(context, 2);
  const { vm, l1 } = machine;
  const runsBefore = nestedRuns(l1);
  const pages: GuestPage[] = [];
  const free: L2[] = [];
  for (let index = 0; index < RACERS; index++) {
    const page = new GuestPage(vm, PAGE_GPA + index * APART);
    pages.push(page);
    const options = { vpid: index + 1, apicAccess: page.gpa, virtualApic: true, msrBitmap: true } as const;
    free.push(
      await l1.createL2(options, (program) =>
        program.loop(RACE_TURNS, (body) =>
          body
            .write32(page.gpa + APIC_ID, 1)
            .pause(PAUSES)
            .write32(page.gpa + APIC_ID, 1)
            .vmcallRegs(index << 8),
        ),
      ),
    );
    await free[index]!.vmclear();
  }
  const all = [...free];
  let turns = 0;
  let discards = 0;
  const player = async (vcpu: number): Promise<void> => {
    while (turns < RACE_TURNS) {
      turns += 1;
      for (const page of pages) {
        if (random() < 0.3) {
          page.discard();
          discards += 1;
        }
      }
      const [l2] = free.splice(Math.floor(random() * free.length), 1);
      await enter(l2!, vcpu, signal);
      await l2!.vmclear();
      free.push(l2!);
    }
  };
  await Promise.all([player(0), player(1)]);
  const sum = (reason: 'apic-access' | 'vmcall') =>
    all.reduce((total, l2) => total + l2.exitCount(reason), 0);
  const nestedRun = nestedRuns(l1) - runsBefore;
  const registers = all.filter((l2, index) => {
    const times = Math.max(0, l2.exitCount('vmcall') - 1);
    const values = Array.from({ length: times }, () => vmcallRegsValues(index << 8)).flat();
    return l2.progress.checksum === foldChecksum(values);
  }).length;
  return {
    observed: {
      vmcalls: sum('vmcall'),
      apicAccessExits: sum('apic-access'),
      otherEntries: nestedRun - sum('vmcall') - sum('apic-access'),
      registers,
    },
    evidence: { discards, nestedRun, ...counters(vm) },
  };
}

const racing = selftest({
  id: 'l2-switch/racing/discard',
  title: 'five VMCSs change between two L1 vCPUs at random while their APIC-access pages are discarded',
  requires,
  racing: true,
  expectations: {
    change: 'pages',
    // the first write of a turn may meet a discard too, but a stock kernel then misses only what follows until the exit
    stock: {
      vmcalls: RACE_TURNS,
      apicAccessExits: { min: RACE_TURNS, max: 2 * RACE_TURNS },
      otherEntries: 0,
      registers: RACERS,
    },
    patched: { vmcalls: RACE_TURNS, apicAccessExits: 2 * RACE_TURNS, otherEntries: 0, registers: RACERS },
  },
  body: race,
});

/** What the series' table of contexts holds is data, and read when the tests are made. */
export function contexts(): readonly Selftest[] {
  return [handOver, exhausted(), vmxoff(), racing];
}
