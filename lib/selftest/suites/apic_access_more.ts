// SPDX-License-Identifier: Apache-2.0
// The APIC-access page: qualifications, several pages, several L2s, and changes while L2 runs.
import type { L1, L2, L2Program } from '../../guest/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { look, touch } from './apic_accesses.ts';
import { bootL1, churn, hex, nestedRuns } from './common.ts';
import { counted, counting } from './counting.ts';
import { GuestPage, PAGE_GPA } from './guest_page.ts';
import { type PageTest, pageTest, runRound, type Stage, userspaceText } from './page_rounds.ts';
import { type ScenarioCase, scenarioTest } from './scenario.ts';

const CONTROL = 'secondary.virtualize-apic-accesses';
const requires = [nestedVmx, binaryStats, vmxControl(CONTROL), vmxControl('secondary.enable-ept')];
const OTHER_GPA = PAGE_GPA + 0x10_0000;
const SKIPPED = 0x11;

const MOV_AL = [0x31, 0xc0, 0x8a, 0x07, 0xc3];
const MOV_AX = [0x31, 0xc0, 0x66, 0x8b, 0x07, 0xc3];
const MOV_EAX = [0x31, 0xc0, 0x8b, 0x07, 0xc3];
const MOV_RAX = [0x31, 0xc0, 0x48, 0x8b, 0x07, 0xc3];

const TESTS: readonly PageTest[] = [
  {
    id: 'apic-access/qualification',
    title: 'reads and writes of every size, at any offset: the qualification has offset and type',
    needs: [CONTROL],
    options: ({ page }) => ({ apicAccess: page.gpa }),
    rounds: [
      {
        at: 'entry',
        run: (p, place) =>
          p
            .call(place(...MOV_AL), PAGE_GPA)
            .call(place(...MOV_AX), PAGE_GPA + 0x3fe)
            .call(place(...MOV_EAX), PAGE_GPA + 0x390)
            .call(place(...MOV_RAX), PAGE_GPA + 0xff8)
            .write8(PAGE_GPA + 0xfff, 1)
            .write16(PAGE_GPA + 0x301, 2)
            .write32(PAGE_GPA + 0xb0, 3)
            .write64(PAGE_GPA + 8, 4),
        exits: [0, 0x3fe, 0x390, 0xff8, 0x1fff, 0x1301, 0x10b0, 0x1008].map((q) =>
          q === 0 ? 'apic-access' : `apic-access q=${hex(q)}`,
        ),
        values: [0, 0, 0, 0],
        page: true,
      },
    ],
    look: ({ page }) => new Uint8Array(page.region.buffer).every((byte) => byte === 0),
  },
  {
    id: 'apic-access/alias',
    title: 'another guest address that the EPT leads to the same page traps too, also after a discard',
    needs: [CONTROL],
    options: ({ page }) => ({ apicAccess: page.gpa }),
    before: ({ l1 }) => l1.ept.map(OTHER_GPA, PAGE_GPA),
    rounds: [0, 1].map((round) => ({
      at: 'entry',
      act: ({ page }: Stage) => page.discard(),
      run: (p, place) => touch(p, place, round + 1, OTHER_GPA),
      exits: ['apic-access q=0x20', 'apic-access q=0x1080'],
      values: [SKIPPED],
      page: false,
    })),
    look,
  },
  {
    id: 'apic-access/address',
    title: 'L1 gives L2 another page and the first one back: exactly the one named traps',
    needs: [CONTROL],
    options: ({ page }) => ({ apicAccess: page.gpa }),
    before: ({ vm, l1 }) => {
      new GuestPage(vm, OTHER_GPA);
      l1.ept.split(OTHER_GPA);
    },
    rounds: [PAGE_GPA, OTHER_GPA, PAGE_GPA].map((named, round) => ({
      at: 'entry',
      act: async ({ l2, page }: Stage) => {
        page.discard();
        await l2.vmwrite('APIC_ACCESS_ADDR', named);
      },
      run: (p, place) => {
        touch(p, place, round + 1, PAGE_GPA);
        touch(p, place, round + 1, OTHER_GPA);
      },
      exits: ['apic-access q=0x20', 'apic-access q=0x1080'],
      values: named === PAGE_GPA ? [SKIPPED, 0] : [0, SKIPPED],
      page: named !== PAGE_GPA,
    })),
    look,
  },
];

// An instruction fetch from the page has no row: Bochs 3.0 panics there.
const SCENARIOS: readonly ScenarioCase[] = [
  {
    id: 'apic-access/event-delivery',
    title: 'a stack in the page: the delivery of an interrupt exits with type 3 and its vector',
    needs: [CONTROL],
    options: (bench) => ({
      apicAccess: bench.page('apic'),
      entry: bench.raw('code', 0xcd, 0x61), // int 0x61
      fields: { GUEST_RSP: bench.page('apic') + 0x100 },
    }),
    trace: () => ({ limit: 1, policy: { 'apic-access': 'return' } }),
    expect: { exits: ['apic-access q=0x30f8 vectoring=0x80000461'] },
  },
];

/** A program of `rounds` turns: touch the page, stop with L2 active, touch it again, exit. */
function turns(l1: L1, program: L2Program, rounds: number, gpa: number): void {
  const place = (...bytes: number[]) => l1.place(Uint8Array.from(bytes));
  for (let round = 0; round < rounds; round++) {
    touch(program, place, 1, gpa);
    program.sync(round);
    touch(program, place, 2, gpa);
    program.vmcall();
  }
}

const ROUNDS = 3;
const TOUCHES = 4;

/** Two L2s with a page each on one vCPU; while one is active the other's page is discarded and swapped. */
async function twoL2s(context: SelftestContext): Promise<{ observed: Observations }> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const runsBefore = nestedRuns(l1);
  const stages: Stage[] = [];
  for (const gpa of [PAGE_GPA, OTHER_GPA]) {
    const page = new GuestPage(vm, gpa);
    const l2 = await l1.createL2({ apicAccess: gpa }, (p) => turns(l1, p, ROUNDS, gpa));
    stages.push({ vm, l1, l2, page });
  }
  const others: string[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    for (const [index, stage] of stages.entries()) {
      const other = stages[1 - index]!.page;
      const texts = await runRound(stage, 'entry', context.signal);
      if (round % 2 === 0) other.discard();
      else other.swap();
      texts.push(...(await runRound(stage, 'active', context.signal)));
      others.push(...texts.filter((text) => !text.startsWith('apic-access')));
    }
  }
  return {
    observed: {
      exits: stages.map(({ l2 }) => l2.exitCount('apic-access')),
      others,
      executed: stages.map(({ l2 }) => l2.progress.executed),
      nestedRun: nestedRuns(l1) - runsBefore,
    },
  };
}

/** The L2s of two vCPUs share the page, and are both active when it is discarded. */
async function twoVcpus(context: SelftestContext): Promise<{ observed: Observations }> {
  await using machine = await bootL1(context, 2);
  const { vm, l1 } = machine;
  const page = new GuestPage(vm);
  const stages: Stage[] = [];
  for (const cpu of [0, 1]) {
    const l2 = await l1.createL2({ cpu, apicAccess: page.gpa }, (p) => turns(l1, p, 2, page.gpa));
    stages.push({ vm, l1, l2, page });
  }
  const seen: number[] = [];
  const step = async (at: 'entry' | 'active'): Promise<void> => {
    const both = await Promise.all(stages.map((stage) => runRound(stage, at, context.signal)));
    seen.push(...both.map((texts) => texts.filter((text) => text.startsWith('apic-access')).length));
  };
  await step('entry');
  page.discard();
  await step('active');
  await step('entry');
  await step('active');
  return {
    observed: { exits: seen, executed: stages.map(({ l2 }) => l2.progress.executed) },
  };
}

const RACED = 200;
const TICKS = 200_000n;
const HOST_PERIOD_MS = 10;
/** mov eax, [rdi] */
const LOAD = [0x8b, 0x07];

/**
 * L2 reads the page again and again; userspace answers what is no memory, and repeats entries that need the page. A slot
 * that comes back between KVM's fault and its emulation of a read lets that read meet memory: once for each return.
 */
async function race(
  context: SelftestContext,
  change: (page: GuestPage, turn: number) => void,
  returns: (changes: number) => number,
): Promise<{ observed: Observations; evidence: Observations }> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const page = new GuestPage(vm);
  const cells = l1.allocate();
  const code = counting(l1, LOAD, 0n);
  const l2: L2 = await l1.createL2({ apicAccess: page.gpa }, (program) =>
    program.loop(RACED, (body) => body.call(code, PAGE_GPA, cells).delay(TICKS)),
  );
  const runsBefore = nestedRuns(l1);
  let mmio = 0;
  let repeated = 0;
  let last = 'vmcall';
  let changes = 0;
  const host = churn(context, HOST_PERIOD_MS, (turn) => change(page, turn));
  try {
    let stop = await l2.enter({ policy: { 'apic-access': 'skip' }, signal: context.signal });
    while (stop.kind === 'kvm-exit') {
      const text = userspaceText(stop.exit);
      if (text.startsWith('mmio read')) mmio += 1;
      else if (text === 'internal-error 1') {
        repeated += 1;
        await context.sleep(1);
      } else {
        last = text;
        break;
      }
      stop = await l2.continue({ signal: context.signal });
    }
  } finally {
    changes = await host.stop();
  }
  const { marked, own, other } = counted(l1, cells);
  const exits = l2.exitCount('apic-access');
  return {
    observed: {
      total: marked + own + other,
      fromMemory: own,
      beyondReturns: Math.max(0, own - returns(changes)),
      exitsMinusSkipped: exits - marked,
      mmioMinusAnswered: mmio - other,
      nestedRunMinusExits: nestedRuns(l1) - runsBefore - exits,
      last,
      executed: l2.progress.executed,
    },
    evidence: { hostChanges: changes, trapped: marked, mmio, repeatedEntries: repeated },
  };
}

const RACE_RIGHT = {
  total: RACED,
  fromMemory: { min: 0, max: RACED - 1 },
  beyondReturns: 0,
  exitsMinusSkipped: 0,
  mmioMinusAnswered: 0,
  nestedRunMinusExits: 1,
  last: 'vmcall',
  executed: 3 * RACED,
};

export const apicAccessMore: readonly Selftest[] = [
  ...TESTS.map(pageTest),
  ...SCENARIOS.map(scenarioTest),
  selftest({
    id: 'apic-access/two-l2s',
    title: 'two L2s with a page each: what happens to one page changes nothing for the other L2',
    requires,
    expectations: {
      any: {
        exits: [TOUCHES * ROUNDS, TOUCHES * ROUNDS],
        others: [],
        executed: [6 * ROUNDS - 1, 6 * ROUNDS - 1],
        nestedRun: 2 * (TOUCHES + 1) * ROUNDS,
      },
    },
    body: twoL2s,
  }),
  selftest({
    id: 'apic-access/two-vcpus',
    title: 'the page is discarded while the L2s of two vCPUs are active with it',
    requires,
    expectations: {
      change: 'pages',
      stock: { exits: [2, 2, 0, 0, 2, 2, 2, 2], executed: [11, 11] },
      patched: { exits: [2, 2, 2, 2, 2, 2, 2, 2], executed: [11, 11] },
    },
    body: twoVcpus,
  }),
  selftest({
    id: 'apic-access/racing/swap',
    title: 'other memory comes beneath the page while L2 reads it: no read meets memory (stock KVM: some do)',
    requires,
    racing: true,
    expectations: {
      change: 'pages',
      stock: {
        ...RACE_RIGHT,
        fromMemory: { min: 1, max: RACED - 1 },
        beyondReturns: { min: 0, max: RACED - 1 },
      },
      patched: RACE_RIGHT,
    },
    body: (context) =>
      race(
        context,
        (page) => page.swap(),
        (changes) => changes,
      ),
  }),
  selftest({
    id: 'apic-access/racing/memslot-move',
    title: 'the page moves away and back while L2 reads it: every read traps or comes to userspace',
    requires,
    racing: true,
    expectations: { any: RACE_RIGHT },
    body: (context) =>
      race(
        context,
        (page, turn) => {
          if (turn % 2 === 0) page.moveAway();
          else page.moveBack();
        },
        (changes) => Math.floor(changes / 2),
      ),
  }),
];
