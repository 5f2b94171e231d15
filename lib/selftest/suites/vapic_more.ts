// SPDX-License-Identifier: Apache-2.0
// TPR thresholds, virtual interrupts, several L2s, APICv inhibited, and changes of the page while L2 runs.
import { Batch, foldChecksum } from '../../guest/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, churn, hex, nestedRuns, stopText } from './common.ts';
import { counted, counting } from './counting.ts';
import { GuestPage, PAGE_GPA } from './guest_page.ts';
import { runRound, type Stage } from './page_rounds.ts';
import { type Bench, type ScenarioCase, scenarioTest } from './scenario.ts';
import type { TraceOptions } from './trace.ts';

const SHADOW = 'primary.use-tpr-shadow';
const DELIVERY = 'secondary.virtual-interrupt-delivery';
const LOW = 0x61;
const HIGH = 0x81;
const SELF_IPI = 0x83f;
const IF_OFF = 2;
const requires = [nestedVmx, binaryStats, vmxControl(SHADOW), vmxControl('secondary.enable-ept')];

/** Virtual-interrupt delivery, with EOI by the virtualised x2APIC. */
const DELIVERING = {
  needs: [
    SHADOW,
    DELIVERY,
    'pin.external-interrupt-exiting',
    'primary.use-msr-bitmaps',
    'secondary.virtualize-x2apic-mode',
  ],
  options: () => ({
    virtualInterrupts: true,
    msrBitmap: true,
    autoEoi: 'x2apic',
    controls: ['secondary.virtualize-x2apic-mode'],
  }),
} as const satisfies Pick<ScenarioCase, 'needs' | 'options'>;

/** Both vectors wait. L2 has been up to a first VMCALL: delivery must meet no EPT violation, see guests/l2/main.c. */
async function request({ l2 }: Bench): Promise<void> {
  await l2.enter();
  l2.vapic?.request(LOW);
  l2.vapic?.request(HIGH);
  await l2.setInterruptStatus({ requested: HIGH });
}

const taken = ({ l2 }: Bench) => [l2.interruptCount(LOW), l2.interruptCount(HIGH)];

const takenFirst = (bench: Bench): TraceOptions => ({
  onSync: () => {
    bench.results['first'] = taken(bench);
  },
});

/** Nothing is left: RVI, SVI, VIRR, VISR. */
async function settled(bench: Bench): Promise<Observations> {
  const { requested, inService } = await bench.l2.interruptStatus();
  return {
    ...bench.results,
    taken: taken(bench),
    status: [requested, inService],
    left: [...(bench.l2.vapic?.requested ?? []), ...(bench.l2.vapic?.inService ?? [])],
  };
}
const SETTLED = { taken: [1, 1], status: [0, 0], left: [] };

const SCENARIOS: readonly ScenarioCase[] = [
  {
    id: 'vapic/threshold',
    title:
      'VTPR falls below the threshold: exit 43 behind the instruction, and again at entry until it is above',
    needs: [SHADOW, 'secondary.virtualize-apic-accesses'],
    options: (bench) => ({ tprThreshold: 4, apicAccess: bench.page('apic') }),
    program: (p) => p.writeCr8(5).writeCr8(4).writeCr8(3).readCr8(),
    before: ({ l2 }) => {
      if (l2.vapic) l2.vapic.tpr = 0x50;
    },
    trace: (bench) => ({
      onExit: (exit, index) => {
        if (exit.reason !== 'tpr-below-threshold') return;
        const values = bench.results['vtpr'];
        bench.results['vtpr'] = [...(Array.isArray(values) ? values : []), bench.l2.vapic?.tpr ?? -1];
        if (index === 0) bench.notes['rip'] = exit.rip;
        else bench.results['sameRip'] = exit.rip === bench.notes['rip'];
        if (index === 1 && bench.l2.vapic) bench.l2.vapic.tpr = 0x60;
      },
    }),
    after: ({ results }) => results,
    expect: {
      exits: ['tpr-below-threshold', 'tpr-below-threshold', 'vmcall'],
      executed: 4,
      values: [6],
      more: { vtpr: [0x30, 0x30], sameRip: true },
    },
  },
  {
    id: 'vapic/threshold/entry-check',
    title: 'without virtualised APIC accesses a VTPR below the threshold is VMfail 7, and at it is not',
    needs: [SHADOW],
    options: () => ({ tprThreshold: 4 }),
    program: (p) => p.readCr8(),
    before: async (bench) => {
      if (!bench.l2.vapic) return;
      bench.l2.vapic.tpr = 0x30;
      bench.results['below'] = await bench.l2
        .enter()
        .then(stopText, (error: Error) => error.message.includes('7'));
      bench.l2.vapic.tpr = 0x40;
    },
    after: ({ results }) => results,
    expect: { exits: ['vmcall'], executed: 1, values: [4], more: { below: true } },
  },
  {
    id: 'vapic/virtual-interrupts/priority',
    title: 'the higher vector is delivered at entry, the lower one when L2 lowers its TPR',
    ...DELIVERING,
    program: (p) => p.vmcall().sync(1).writeCr8(0).fold(7),
    before: async (bench) => {
      await request(bench);
      if (bench.l2.vapic) bench.l2.vapic.tpr = 0x70;
    },
    trace: takenFirst,
    after: settled,
    expect: {
      exits: ['sync 1', 'vmcall'],
      executed: 4,
      values: [7],
      more: { ...SETTLED, first: [0, 1] },
    },
  },
  {
    id: 'vapic/virtual-interrupts/window',
    title: 'with interrupts off nothing is delivered; STI lets both in',
    ...DELIVERING,
    options: () => ({ ...DELIVERING.options(), fields: { GUEST_RFLAGS: IF_OFF } }),
    program: (p) => p.vmcall().sync(1).sti().fold(7),
    before: request,
    trace: takenFirst,
    after: settled,
    expect: {
      exits: ['sync 1', 'vmcall'],
      executed: 4,
      values: [7],
      more: { ...SETTLED, first: [0, 0] },
    },
  },
  {
    id: 'vapic/virtual-interrupts/eoi-exit',
    title: 'the EOI of a vector in the EOI-exit bitmap exits, that of another does not',
    ...DELIVERING,
    options: () => ({ ...DELIVERING.options(), eoiExits: [LOW] }),
    program: (p) => p.vmcall().fold(7),
    before: request,
    trace: () => ({ policy: { 'virtualized-eoi': 'return' } }),
    after: settled,
    expect: { exits: [`virtualized-eoi q=${hex(LOW)}`, 'vmcall'], executed: 2, values: [7], more: SETTLED },
  },
  {
    id: 'vapic/virtual-interrupts/self-ipi',
    title: 'self-IPIs of L2 are delivered without an exit, once the TPR lets them',
    ...DELIVERING,
    program: (p) => p.wrmsr(SELF_IPI, HIGH).writeCr8(15).wrmsr(SELF_IPI, LOW).sync(1).writeCr8(0).fold(7),
    trace: takenFirst,
    after: settled,
    expect: {
      exits: ['sync 1', 'vmcall'],
      executed: 6,
      values: [7],
      more: { ...SETTLED, first: [0, 1] },
    },
  },
  {
    id: 'vapic/apicv-inhibit',
    title: "APICv is inhibited and allowed again while L2 is active: L1's own interrupt arrives, once",
    needs: [SHADOW],
    options: () => ({ virtualApic: true, externalInterrupts: 'exit' }),
    program: (p) => p.sync(1).writeCr8(5).vmcall().sync(2).readCr8(),
    trace: (bench) => ({
      onSync: () => bench.cpu.vcpu.setGuestDebug({ blockInterrupts: true }),
    }),
    after: freeAgain,
    expect: {
      exits: ['sync 1', 'vmcall'],
      more: { executed: 5, last: 5, stops: ['sync 2', 'external-interrupt', 'vmcall'], irqs: [0, 1] },
    },
  },
];

/** The second half of vapic/apicv-inhibit: free again with L2 active, then an interrupt for L1 comes. */
async function freeAgain(bench: Bench): Promise<Observations> {
  const { l2, cpu } = bench;
  const stops = [stopText(await l2.enter())];
  const before = cpu.interruptCount(LOW);
  cpu.vcpu.setGuestDebug({});
  bench.interrupt(LOW);
  stops.push(stopText(await l2.continue()));
  // L1 with interrupts on for a moment
  await cpu.executeAll(new Batch().spin(bench.page('zero'), 8, 0));
  stops.push(stopText(await l2.enter()));
  const { executed, last } = l2.progress;
  return { executed, last: Number(last), stops, irqs: [before, cpu.interruptCount(LOW)] };
}

const TURNS = 4;
const OTHER_GPA = PAGE_GPA + 0x10_0000;

/** Two L2s with a page each take turns; while one is active, the other's page gets other memory with the same bytes. */
async function twoL2s(context: SelftestContext): Promise<{ observed: Observations }> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const runsBefore = nestedRuns(l1);
  const stages: Stage[] = [];
  for (const [index, gpa] of [PAGE_GPA, OTHER_GPA].entries()) {
    const page = new GuestPage(vm, gpa);
    const l2 = await l1.createL2({ virtualApic: gpa }, (p) => {
      for (let turn = 0; turn < TURNS; turn++) {
        p.readCr8()
          .sync(turn)
          .writeCr8(2 * turn + index + 1)
          .vmcall();
      }
    });
    stages.push({ vm, l1, l2, page });
  }
  const exits: string[] = [];
  for (let turn = 0; turn < TURNS; turn++) {
    for (const [index, stage] of stages.entries()) {
      exits.push(...(await runRound(stage, 'entry', context.signal)));
      stages[1 - index]!.page.swap(true);
      exits.push(...(await runRound(stage, 'active', context.signal)));
    }
  }
  return {
    observed: {
      exits,
      checksums: stages.map(({ l2 }) => hex(l2.progress.checksum)),
      nestedRun: nestedRuns(l1) - runsBefore,
    },
  };
}

const turnValues = (index: number): number[] =>
  Array.from({ length: TURNS }, (_, turn) => (turn === 0 ? 0 : 2 * turn + index - 1));

const RACED = 300;
const TICKS = 200_000n;
const HOST_PERIOD_MS = 2;
const WRITTEN = 5;
/** mov cr8, rdi; mov rax, cr8 */
const THROUGH_CR8 = [0x44, 0x0f, 0x22, 0xc7, 0x44, 0x0f, 0x20, 0xc0];

/** L2 writes CR8 and reads it back, again and again, while the host discards the page. */
async function race(context: SelftestContext): Promise<{ observed: Observations; evidence: Observations }> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const page = new GuestPage(vm);
  const cells = l1.allocate();
  const code = counting(l1, THROUGH_CR8, BigInt(WRITTEN));
  const l2 = await l1.createL2({ virtualApic: page.gpa }, (program) =>
    program.loop(RACED, (body) => body.call(code, WRITTEN, cells).delay(TICKS)),
  );
  const runsBefore = nestedRuns(l1);
  const host = churn(context, HOST_PERIOD_MS, () => page.discard());
  let last = 'none';
  let changes = 0;
  try {
    last = stopText(await l2.enter({ signal: context.signal }));
  } finally {
    changes = await host.stop();
  }
  const { marked, own, other } = counted(l1, cells);
  return {
    observed: {
      readBack: own,
      total: own + other,
      marked,
      nestedRun: nestedRuns(l1) - runsBefore,
      last,
      executed: l2.progress.executed,
    },
    evidence: { hostChanges: changes },
  };
}

const RACE_RIGHT = { total: RACED, marked: 0, nestedRun: 1, last: 'vmcall', executed: 3 * RACED };

export const vapicMore: readonly Selftest[] = [
  ...SCENARIOS.map(scenarioTest),
  selftest({
    id: 'vapic/two-l2s',
    title: "two L2s take turns with a page each: each finds its own CR8, whatever became of the other's page",
    requires,
    expectations: {
      any: {
        exits: [],
        checksums: [0, 1].map((index) => hex(foldChecksum(turnValues(index)))),
        nestedRun: 2 * TURNS,
      },
    },
    body: twoL2s,
  }),
  selftest({
    id: 'vapic/racing/madvise',
    title: 'the page is discarded while L2 writes CR8 and reads it back (stock KVM: it always reads back)',
    requires,
    racing: true,
    expectations: {
      change: 'pages',
      stock: { ...RACE_RIGHT, readBack: RACED },
      patched: { ...RACE_RIGHT, readBack: { min: 1, max: RACED } },
    },
    body: race,
  }),
];
