// SPDX-License-Identifier: Apache-2.0
// Event injection at VM entry (SDM vol. 3, 27.6), also into an exit (28.2.4).
import type { InjectedEvent } from '../../guest/index.ts';
import type { Selftest } from '../engine/model.ts';
import { type Bench, type ScenarioCase, scenarioTest } from './scenario.ts';

const VECTOR = 0x61;
const NMI = 2;
/** Where L2's image begins: with its handlers. */
const L2_BASE = 0x20_0000;
/** ud2; vmcall: an event that skips its instruction skips the UD2, any other returns to it. */
const SKIPPED = [0x0f, 0x0b, 0x0f, 0x01, 0xc1];
const UD = 1 << 6;

interface EventRow {
  readonly name: string;
  readonly title: string;
  readonly event: InjectedEvent;
  /** VM-entry interruption information, which IDT-vectoring information repeats. */
  readonly info: string;
  /** KVM forgets an event of this type when its delivery faults: it must find everything mapped. See patient(). */
  readonly isFragile?: boolean;
  /** How it ends with the interpreter at the entry point. */
  readonly exits: readonly string[];
  readonly more: Record<string, number>;
}

/** What L2 found: interrupts by handler, or the exception its handler recorded. */
const found = (bench: Bench): Record<string, number> => {
  const fault = bench.l2.control.inner('fault', 'fault');
  return {
    irqs: bench.l2.interruptCount(VECTOR),
    nmis: bench.l2.interruptCount(NMI),
    faults: Number(fault.u64('count')),
    /** Where the handler would return to, from the entry point on. */
    behind: fault.u64('count') === 0n ? 0 : Number(fault.u64('rip')) - bench.l1.images.l2.entry,
  };
};
const NOTHING = { irqs: 0, nmis: 0, faults: 0, behind: 0 };

const EVENTS: readonly EventRow[] = [
  {
    name: 'external-interrupt',
    title: 'an external interrupt',
    event: { type: 'external-interrupt', vector: VECTOR },
    info: '0x80000061',
    exits: ['vmcall'],
    more: { ...NOTHING, irqs: 1 },
  },
  {
    name: 'nmi',
    title: 'an NMI',
    event: { type: 'nmi', vector: NMI },
    info: '0x80000202',
    exits: ['vmcall'],
    more: { ...NOTHING, nmis: 1 },
  },
  {
    name: 'hardware-exception',
    title: '#UD, which has no error code',
    event: { type: 'hardware-exception', vector: 6 },
    info: '0x80000306',
    exits: ['L2 exception 6 code=0x0'],
    more: { ...NOTHING, faults: 1 },
  },
  {
    name: 'hardware-exception-error-code',
    title: '#GP with an error code',
    event: { type: 'hardware-exception', vector: 13, errorCode: 0x1234 },
    info: '0x80000b0d vcode=0x1234',
    exits: ['L2 exception 13 code=0x1234'],
    more: { ...NOTHING, faults: 1 },
  },
  {
    name: 'software-exception',
    title: '#BP of an INT3 of one byte: it returns behind it',
    event: { type: 'software-exception', vector: 3, length: 1 },
    info: '0x80000603',
    exits: ['L2 exception 3 code=0x0'],
    more: { ...NOTHING, faults: 1, behind: 1 },
  },
  {
    name: 'privileged-software-exception',
    title: '#DB of an INT1 of one byte: it returns behind it',
    event: { type: 'privileged-software-exception', vector: 1, length: 1 },
    info: '0x80000501',
    isFragile: true,
    exits: ['L2 exception 1 code=0x0'],
    more: { ...NOTHING, faults: 1, behind: 1 },
  },
];

/** Makes L0 map what delivery needs: stack, IDT, GDT and the control page. */
async function touchAll(bench: Bench): Promise<void> {
  const { l1, l2 } = bench;
  const load = (address: number): number[] => {
    const bytes = [0, 8, 16, 24].map((shift) => (address >>> shift) & 0xff);
    return [0x48, 0x8b, 0x04, 0x25, ...bytes]; // mov rax, [address]
  };
  const code = bench.raw(
    'touch',
    ...[0x50, 0x58], // push rax; pop rax
    ...load(l1.images.l2.symbol('idt').address + 16),
    ...load(l1.images.l2.symbol('gdt').address),
    ...load(L2_BASE),
    ...[0x48, 0x8b, 0x07, 0x48, 0x89, 0x07], // the control page, by RDI: read and written
    ...[0x0f, 0x01, 0xc1],
  );
  await l2.vmwrite('GUEST_RIP', code);
  await l2.enter();
  await l2.vmwrite('GUEST_RIP', l1.images.l2.entry);
}

const ATTEMPTS = 4;

/** KVM also forgets such an event when it calls an entry off for work of the host's: then it is injected again. */
function patient(test: Selftest): Selftest {
  return {
    ...test,
    body: async (context) => {
      for (let forgotten = 0; ; forgotten++) {
        const { observed } = await test.body(context);
        if (observed['faults'] !== 0 || forgotten === ATTEMPTS - 1)
          return { observed, evidence: { forgotten } };
      }
    },
  };
}

const DELIVERED: readonly Selftest[] = EVENTS.map((row) => {
  const test = scenarioTest({
    id: `events/inject/${row.name}`,
    title: `entry delivers ${row.title}`,
    program: (p) => p.fold(7),
    before: async (bench) => {
      if (row.isFragile) await touchAll(bench);
      await bench.l2.inject(row.event);
    },
    after: found,
    expect: {
      exits: row.exits,
      executed: row.exits[0] === 'vmcall' ? 1 : 0,
      values: row.exits[0] === 'vmcall' ? [7] : [],
      more: row.more,
    },
  });
  return row.isFragile ? patient(test) : test;
});

const MORE: readonly ScenarioCase[] = [
  {
    id: 'events/inject/software-interrupt',
    title: 'entry delivers INT 0x61 of two bytes: the handler returns behind the instruction it stands for',
    options: (bench) => ({ entry: bench.raw('code', ...SKIPPED), exceptionBitmap: UD }),
    before: ({ l2 }) => l2.inject({ type: 'software-interrupt', vector: VECTOR, length: 2 }),
    after: (bench, last) => ({
      irqs: bench.l2.interruptCount(VECTOR),
      at: Number(last?.rip ?? 0n) - (bench.names['code'] ?? 0),
    }),
    expect: { exits: ['vmcall'], more: { irqs: 1, at: 2 } },
  },
  {
    id: 'events/inject/once',
    title: 'an exit clears the event: the next entry delivers nothing',
    options: () => ({ controls: ['primary.hlt-exiting'] }),
    program: (p) => p.hlt().fold(7),
    before: ({ l2 }) => l2.inject({ type: 'external-interrupt', vector: VECTOR }),
    after: async (bench) => ({
      irqs: bench.l2.interruptCount(VECTOR),
      info: Number(await bench.l2.vmread('VM_ENTRY_INTR_INFO_FIELD')),
    }),
    expect: { exits: ['hlt len=1', 'vmcall'], executed: 2, values: [7], more: { irqs: 1, info: VECTOR } },
  },
  {
    id: 'events/inject/into-hlt',
    title: 'an interrupt wakes an L2 that is entered in the HLT state',
    options: () => ({ fields: { GUEST_ACTIVITY_STATE: 1 } }),
    program: (p) => p.fold(7),
    before: ({ l2 }) => l2.inject({ type: 'external-interrupt', vector: VECTOR }),
    after: (bench, last) => ({ irqs: bench.l2.interruptCount(VECTOR), activity: last?.activityState ?? -1 }),
    expect: { exits: ['vmcall'], executed: 1, values: [7], more: { irqs: 1, activity: 0 } },
  },
];

/** The stack that delivery pushes to is not in the EPT: the exit says what was being delivered. */
const VECTORING: readonly ScenarioCase[] = EVENTS.filter((row) => !row.isFragile).map(
  (row): ScenarioCase => ({
    id: `events/idt-vectoring/${row.name}`,
    title: `delivery of ${row.title} hits an EPT violation; injected again, it arrives`,
    options: (bench) => ({ fields: { GUEST_RSP: bench.page('stack') + 0x800 } }),
    program: (p) => p.fold(7),
    before: async (bench) => {
      bench.l1.ept.unmap(bench.page('stack'));
      await bench.l2.inject(row.event);
    },
    trace: (bench) => ({
      onExit: async (exit) => {
        if (exit.reason !== 'ept-violation') return;
        bench.notes['length'] = BigInt(row.event.length === undefined ? 0 : exit.instructionLength);
        bench.l1.ept.map(bench.page('stack'));
        await bench.cpu.invept(2, 0n);
        await bench.l2.fields.writeAll({
          VM_ENTRY_EXCEPTION_ERROR_CODE: exit.idtVectoringErrorCode,
          VM_ENTRY_INSTRUCTION_LEN: exit.instructionLength,
          VM_ENTRY_INTR_INFO_FIELD: exit.idtVectoringInfo,
        });
      },
    }),
    after: (bench) => ({ ...found(bench), length: Number(bench.notes['length'] ?? -1n) }),
    expect: {
      exits: [`ept-violation q=0x182 gpa=stack+0x7f8 vectoring=${row.info}`, ...row.exits],
      executed: row.exits[0] === 'vmcall' ? 1 : 0,
      values: row.exits[0] === 'vmcall' ? [7] : [],
      more: { ...row.more, length: row.event.length ?? 0 },
    },
  }),
);

export const injectedEvents: readonly Selftest[] = [
  ...DELIVERED,
  ...[...MORE, ...VECTORING].map(scenarioTest),
];
