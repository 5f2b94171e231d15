// SPDX-License-Identifier: Apache-2.0
// Posted interrupts for an L2 that is active, halted or preempted, from the host and from L1's other vCPU.
import { Batch, type L1, type L2, type L2Program, type L2Stop } from '../../guest/index.ts';
import type { Vcpu } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { ExpectationTable, Observations, Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, kernelFrom, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, nestedRuns, stopText } from './common.ts';
import { NOTIFICATION, OPTIONS, POSTED_CONTROLS, post, VECTOR } from './posted.ts';
import { isHalted, meanwhile, until } from './watchdog.ts';

const VECTORS = [VECTOR, 0x81, 0x93];
const requires = [nestedVmx, binaryStats, ...POSTED_CONTROLS.map(vmxControl)];
const ICR_NOTIFICATION = 0x4000n | BigInt(NOTIFICATION);
const PIN = 'PIN_BASED_VM_EXEC_CONTROL';
const PROCESS_POSTED = 1n << 7n;
const wakes = kernelFrom(6, 12, 'do not wake an L2 in HLT for a posted interrupt (seen on 6.1)');
interface Target {
  readonly l1: L1;
  readonly l2: L2;
  readonly vcpu: Vcpu;
  /** A word of L2's memory. */
  readonly flag: Int32Array;
}

/** Boots an L2 with posted interrupts; `program` gets the address of the flag. */
async function withTarget(
  context: SelftestContext,
  program: (program: L2Program, flag: number, l1: L1) => unknown,
  body: (target: Target) => Promise<{ observed: Observations; evidence?: Observations }>,
  vcpus = 1,
): Promise<{ observed: Observations; evidence?: Observations }> {
  await using machine = await bootL1(context, vcpus);
  const { l1 } = machine;
  const flag = l1.allocate();
  const l2 = await l1.createL2({ ...OPTIONS, postedInterrupts: { vector: NOTIFICATION } }, (p) =>
    program(p, flag, l1),
  );
  return await body({ l1, l2, vcpu: l1.vcpu(0), flag: new Int32Array(l1.memory.buffer, flag, 1) });
}

const taken = (l2: L2): number[] => VECTORS.map((vector) => l2.interruptCount(vector));

function left({ l2, l1 }: Target, runsBefore: number, stop: L2Stop | undefined): Observations {
  const { executed, last } = l2.progress;
  return {
    taken: taken(l2),
    pending: l2.postedInterrupts?.pending ?? [],
    outstanding: l2.postedInterrupts?.outstanding ?? false,
    last: stop ? stopText(stop) : 'none',
    exits: [...l2.exitCounts().keys()],
    nestedRun: nestedRuns(l1) - runsBefore,
    executed,
    folded: Number(last),
  };
}

const RIGHT = {
  pending: [],
  outstanding: false,
  last: 'vmcall',
  exits: ['vmcall'],
  nestedRun: 1,
  folded: 7,
} as const satisfies ExpectationTable;

function active(context: SelftestContext) {
  return withTarget(
    context,
    (p) => p.sync(1).sync(2).fold(7),
    async (target) => {
      const { l1, l2 } = target;
      const runsBefore = nestedRuns(l1);
      await l2.enter({ signal: context.signal });
      for (const vector of VECTORS) l2.postedInterrupts?.post(vector);
      l1.signal(NOTIFICATION);
      await l2.continue({ signal: context.signal });
      const first = taken(l2);
      for (const vector of VECTORS) post(target, vector);
      const stop = await l2.continue({ signal: context.signal });
      return { observed: { first, ...left(target, runsBefore, stop) } };
    },
  );
}

function ipi(context: SelftestContext) {
  return withTarget(
    context,
    (p) => p.sync(1).fold(7),
    async (target) => {
      const { l1, l2 } = target;
      await l1.cpu(0).x2apicEnable();
      await l1.cpu(1).x2apicEnable();
      const runsBefore = nestedRuns(l1);
      await l2.enter({ signal: context.signal });
      const descriptor = l2.postedInterrupts?.gpa ?? 0;
      await l1.cpu(1).executeAll(
        new Batch()
          .write(descriptor + (VECTOR >> 3), 1, 1 << (VECTOR & 7))
          .write(descriptor + 32, 1, 1)
          .ipi(ICR_NOTIFICATION),
      );
      const stop = await l2.continue({ signal: context.signal });
      return { observed: left(target, runsBefore, stop) };
    },
    2,
  );
}

const resume =
  ({ l2 }: Target) =>
  (signal: AbortSignal) =>
    l2.continue({ signal });

function halted(context: SelftestContext) {
  return withTarget(
    context,
    (p) => p.sync(1).hlt().sync(2).hlt().fold(7),
    async (target) => {
      const { l1, l2, vcpu } = target;
      const runsBefore = nestedRuns(l1);
      vcpu.stats();
      let stop: L2Stop | undefined = await l2.enter({ signal: context.signal });
      const slept: boolean[] = [];
      const woken: boolean[] = [];
      for (const vectors of [[VECTOR], VECTORS]) {
        const next = await meanwhile(context, resume(target), async () => {
          slept.push(await until(context, () => isHalted(vcpu)));
          for (const vector of vectors) l2.postedInterrupts?.post(vector);
          l1.signal(NOTIFICATION);
        });
        woken.push(next !== undefined);
        if (!next) break;
        stop = next;
      }
      return { observed: { slept, woken, ...left(target, runsBefore, stop) } };
    },
  );
}

/** jmp over: spin: pause; over: cmp dword [rdi], 2; jne spin; ret, with the flag set to 1 before */
const SPIN = [0xc7, 0x07, 1, 0, 0, 0, 0xf3, 0x90, 0x83, 0x3f, 2, 0x75, 0xf9, 0xb8, 7, 0, 0, 0, 0xc3];

/** L2 has the CPU of its own accord; the host takes it away for as long as it acts. */
function preempted(context: SelftestContext) {
  return withTarget(
    context,
    (p, flag, l1) => p.sync(1).call(l1.place(Uint8Array.from(SPIN)), flag),
    async (target) => {
      const { l1, l2, flag } = target;
      const runsBefore = nestedRuns(l1);
      await l2.enter({ signal: context.signal });
      const spinning: boolean[] = [];
      const stop = await meanwhile(context, resume(target), async () => {
        spinning.push(await until(context, () => Atomics.load(flag, 0) === 1));
        for (const [index, vector] of VECTORS.entries()) {
          post(target, vector);
          const isTaken = await until(context, () => taken(l2)[index] === 1);
          spinning.push(isTaken);
          if (!isTaken) break;
        }
        Atomics.store(flag, 0, 2);
      });
      return { observed: { spinning, ...left(target, runsBefore, stop) } };
    },
  );
}

/** The notification comes while L1 runs with interrupts off, and is pending when L2 is entered. */
function pending(context: SelftestContext) {
  return withTarget(
    context,
    (p) => p.vmcall().fold(7),
    async (target) => {
      const { l1, l2 } = target;
      const runsBefore = nestedRuns(l1);
      await l2.enter({ signal: context.signal });
      post(target);
      const stop = await l2.enter({ signal: context.signal });
      return { observed: left(target, runsBefore, stop) };
    },
  );
}

/** Entries with the control on, then off: the notification is an interrupt like any other again. */
function offAgain(context: SelftestContext) {
  return withTarget(
    context,
    (p) => p.vmcall().sync(1).fold(7),
    async (target) => {
      const { l1, l2 } = target;
      const runsBefore = nestedRuns(l1);
      await l2.enter({ signal: context.signal });
      await l2.vmwrite(PIN, (await l2.vmread(PIN)) & ~PROCESS_POSTED);
      await l2.enter({ signal: context.signal });
      post(target);
      let stop = await l2.continue({ signal: context.signal });
      if (stopText(stop) === 'external-interrupt') stop = await l2.enter({ signal: context.signal });
      return { observed: left(target, runsBefore, stop) };
    },
  );
}

const POSTS = 40;
/** spin: cmp dword [rdi], 2; je out; hlt or pause; jmp spin; out: mov eax, 7; ret */
const waiting = (wait: readonly number[]) => [
  ...[0x83, 0x3f, 2, 0x74, wait.length + 2],
  ...wait,
  ...[0xeb, 0xf9 - wait.length, 0xb8, 7, 0, 0, 0, 0xc3],
];
const HLT = [0xf4];
const PAUSE = [0xf3, 0x90];

/** The host posts vectors at random times; each is waited for, and must be taken once. */
function race(context: SelftestContext, wait: readonly number[]) {
  return withTarget(
    context,
    (p, flag, l1) => p.sync(1).call(l1.place(Uint8Array.from(waiting(wait))), flag),
    async (target) => {
      const { l1, l2, flag } = target;
      const runsBefore = nestedRuns(l1);
      await l2.enter({ signal: context.signal });
      const posted = [0, 0, 0];
      let lost = 0;
      const stop = await meanwhile(context, resume(target), async () => {
        for (let i = 0; i < POSTS && lost === 0; i++) {
          const index = Math.floor(context.random() * VECTORS.length);
          posted[index]! += 1;
          post(target, VECTORS[index]);
          if (!(await until(context, () => taken(l2)[index] === posted[index]))) lost += 1;
          if (context.random() < 0.5) await context.sleep(1);
        }
        Atomics.store(flag, 0, 2);
        post(target, VECTORS[0]);
        posted[0]! += 1;
      });
      const { taken: seen, ...rest } = left(target, runsBefore, stop);
      return {
        observed: {
          lost,
          wrongCounts: posted.filter((count, i) => count !== (seen as number[])[i]).length,
          ...rest,
        },
        evidence: { posted },
      };
    },
  );
}

const RACE_RIGHT = { ...RIGHT, lost: 0, wrongCounts: 0, executed: 2 };

export const postedInterruptMore: readonly Selftest[] = [
  selftest({
    id: 'posted-interrupt/active',
    title: 'three vectors by one notification, and three by one each, while L2 is active: each taken once',
    requires,
    expectations: { any: { ...RIGHT, first: [1, 1, 1], taken: [2, 2, 2], executed: 3 } },
    body: active,
  }),
  selftest({
    id: 'posted-interrupt/ipi',
    title: "L1's other vCPU posts and sends the notification as an IPI",
    requires,
    expectations: { any: { ...RIGHT, taken: [1, 0, 0], executed: 2 } },
    body: ipi,
  }),
  selftest({
    id: 'posted-interrupt/halted',
    title: 'a notification wakes an L2 that sleeps in HLT, which KVM emulates',
    requires: [...requires, wakes],
    expectations: {
      any: { ...RIGHT, slept: [true, true], woken: [true, true], taken: [2, 1, 1], executed: 5 },
    },
    body: halted,
  }),
  selftest({
    id: 'posted-interrupt/preempted',
    title: 'notifications for an L2 whose vCPU runs, and loses the CPU to the host each time',
    requires,
    expectations: {
      any: { ...RIGHT, spinning: [true, true, true, true], taken: [1, 1, 1], executed: 2 },
    },
    body: preempted,
  }),
  selftest({
    id: 'posted-interrupt/pending-at-entry',
    title: 'a notification that is pending in L1 when L2 is entered is processed without an exit',
    requires,
    expectations: {
      any: { ...RIGHT, taken: [1, 0, 0], nestedRun: 2, executed: 2 },
    },
    body: pending,
  }),
  selftest({
    id: 'posted-interrupt/off-again',
    title:
      'after an entry with posted interrupts, one without: the notification exits, the descriptor is left alone',
    requires: [...requires, kernelFrom(6, 12, 'go on with the vector of the last entry (seen on 6.1)')],
    expectations: {
      any: {
        ...RIGHT,
        taken: [0, 0, 0],
        pending: [VECTOR],
        outstanding: true,
        exits: ['external-interrupt', 'vmcall'],
        nestedRun: 3,
        executed: 3,
      },
    },
    body: offAgain,
  }),
  selftest({
    id: 'posted-interrupt/racing/running',
    title: '40 vectors posted at random times while L2 runs: each is taken once',
    requires,
    racing: true,
    expectations: { any: RACE_RIGHT },
    body: (context) => race(context, PAUSE),
  }),
  selftest({
    id: 'posted-interrupt/racing/halting',
    title: '40 vectors posted at random times while L2 halts between interrupts: none is lost',
    requires: [...requires, wakes],
    racing: true,
    expectations: { any: RACE_RIGHT },
    body: (context) => race(context, HLT),
  }),
];
