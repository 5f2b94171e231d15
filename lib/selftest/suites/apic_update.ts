// SPDX-License-Identifier: Apache-2.0
import type { L2Stop } from '../../guest/index.ts';
import type { MemoryRegion } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, hex, nestedRuns } from './common.ts';

/** Where L1 puts the APIC-access page: a slot of its own, one page, far from L1's memory. */
const PAGE_GPA = 0xc000_0000;
const PAGE_SIZE = 4096;
/** The task-priority register: any register would do, a write to it is linear and harmless. */
const REGISTER = 0x80;
const VALUES = [1, 2, 4, 8, 16, 32, 64, 128] as const;
const MOVE_STEP = 0x1_0000;
/** Between two writes of the racing variants; the host acts every HOST_PERIOD_MS on average. */
const L2_DELAY_TICKS = 20_000_000n;
const HOST_PERIOD_MS = 5;

const requires = [
  nestedVmx,
  binaryStats,
  vmxControl('secondary.virtualize-apic-accesses'),
  vmxControl('secondary.enable-ept'),
  vmxControl('secondary.enable-vpid'),
];

type Change = (page: MemoryRegion, turn: number) => void;

const discard: Change = (page) => page.discard();
const move: Change = (page, turn) => page.move(PAGE_GPA + (turn + 1) * MOVE_STEP);

/** What the host sees while L2 writes: counts, never order or time. */
class Watch {
  readonly #page: MemoryRegion;
  readonly words: number[] = [];
  mmio = 0;
  internalErrors = 0;

  constructor(page: MemoryRegion) {
    this.#page = page;
  }

  /** The word of the page at the register's offset: zero for as long as every write trapped. */
  readWord(): number {
    return new DataView(this.#page.buffer).getUint32(REGISTER, true);
  }

  /** @returns whether L2 can go on after this exit to userspace */
  take(stop: Extract<L2Stop, { kind: 'kvm-exit' }>): boolean {
    const { exit } = stop;
    if (
      exit.type === 'mmio' &&
      exit.isWrite &&
      exit.address === PAGE_GPA + REGISTER &&
      exit.data.length === 4
    ) {
      this.mmio += 1;
      return true;
    }
    if (exit.type === 'internal-error') {
      this.internalErrors += 1;
      return false;
    }
    throw new Error(
      `unexpected exit to userspace while L2 runs: ${JSON.stringify(exit, (_, v) => (typeof v === 'bigint' ? hex(v) : v))}`,
    );
  }
}

/** L2 stops at a port after every write; the host changes the page exactly then. */
async function deterministic(context: SelftestContext, change: Change): Promise<{ observed: Observations }> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const page = vm.memory.add({ gpa: PAGE_GPA, size: PAGE_SIZE });
  const watch = new Watch(page);
  const l2 = await l1.createL2({ vpid: 1, msrBitmap: true, apicAccess: PAGE_GPA }, (program) => {
    for (const [turn, value] of VALUES.entries()) program.write32(PAGE_GPA + REGISTER, value).sync(turn);
    program.vmcall();
  });
  const runsBefore = nestedRuns(l1);
  const syncs: number[] = [];
  let stop = await l2.enter({ policy: { 'apic-access': 'skip' }, signal: context.signal });
  while (stop.kind !== 'exit') {
    if (stop.kind === 'sync') {
      syncs.push(stop.value);
      watch.words.push(watch.readWord());
      change(page, stop.value);
    } else if (!watch.take(stop)) {
      break;
    }
    stop = await l2.continue({ signal: context.signal });
  }
  return {
    observed: {
      apicAccessExits: l2.exitCount('apic-access'),
      mmioExits: watch.mmio,
      internalErrors: watch.internalErrors,
      nestedRun: nestedRuns(l1) - runsBefore,
      lastExit: stop.kind === 'exit' ? stop.exit.reason : 'none',
      syncs,
      pageWords: watch.words,
      operations: l2.progress.executed,
    },
  };
}

/** L2 writes on its own clock; the host changes the page on another, from a seed. */
async function racing(
  context: SelftestContext,
  change: Change,
  moreOf: (run: { finished: boolean; writesSeen: number }) => Observations,
): Promise<{ observed: Observations; evidence: Observations }> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const page = vm.memory.add({ gpa: PAGE_GPA, size: PAGE_SIZE });
  const watch = new Watch(page);
  const l2 = await l1.createL2({ vpid: 1, msrBitmap: true, apicAccess: PAGE_GPA }, (program) => {
    for (const [turn, value] of VALUES.entries()) {
      program.write32(PAGE_GPA + REGISTER, value);
      // The host begins when the first write is through: a change before it would be another test.
      if (turn === 0) program.sync(turn);
      program.delay(L2_DELAY_TICKS);
    }
    program.vmcall();
  });
  const runsBefore = nestedRuns(l1);

  const over = new AbortController();
  let changes = 0;
  const churn = async () => {
    while (!over.signal.aborted) {
      await context.sleep(1 + Math.floor(context.random() * (2 * HOST_PERIOD_MS - 1)));
      if (over.signal.aborted) break;
      change(page, changes);
      changes += 1;
    }
  };
  let stop: L2Stop;
  let churning: Promise<void> | undefined;
  try {
    stop = await l2.enter({ policy: { 'apic-access': 'skip' }, signal: context.signal });
    while (stop.kind === 'sync' || (stop.kind === 'kvm-exit' && watch.take(stop))) {
      if (stop.kind === 'sync') churning = churn();
      stop = await l2.continue({ signal: context.signal });
    }
  } finally {
    over.abort();
    await churning;
  }
  const apicAccessExits = l2.exitCount('apic-access');
  return {
    observed: {
      apicAccessExits,
      mmioExits: watch.mmio,
      internalErrors: watch.internalErrors,
      // Every trapped write costs one entry more, and nothing else does.
      nestedRunMinusExits: nestedRuns(l1) - runsBefore - apicAccessExits,
      lastExit: stop.kind === 'exit' ? stop.exit.reason : 'none',
      ...moreOf({ finished: stop.kind === 'exit', writesSeen: apicAccessExits + watch.mmio }),
    },
    evidence: { hostChanges: changes },
  };
}

/** 8 writes, 8 syncs, 1 VMCALL: operations that L2 completed. The VMCALL itself does not return to L2. */
const OPERATIONS = 2 * VALUES.length;
const SYNCS = VALUES.map((_, turn) => turn);
const WRITES = VALUES.length;

export const apicUpdate: readonly Selftest[] = [
  selftest({
    id: 'apic-update/madvise/deterministic',
    title: 'the APIC-access page is discarded by the host between L2 writes',
    requires,
    expectations: {
      change: 'pages',
      patched: {
        apicAccessExits: WRITES,
        mmioExits: 0,
        internalErrors: 0,
        nestedRun: WRITES + 1,
        lastExit: 'vmcall',
        syncs: SYNCS,
        pageWords: VALUES.map(() => 0),
        operations: OPERATIONS,
      },
      // Stock pins the page at entry: vmcs02 goes on naming the old one, and later writes land in RAM.
      stock: {
        apicAccessExits: 1,
        mmioExits: 0,
        internalErrors: 0,
        nestedRun: 2,
        lastExit: 'vmcall',
        syncs: SYNCS,
        pageWords: [0, ...VALUES.slice(1)],
        operations: OPERATIONS,
      },
    },
    body: (context) => deterministic(context, discard),
  }),
  selftest({
    id: 'apic-update/madvise/racing',
    title: 'the APIC-access page is discarded while L2 writes',
    requires,
    racing: true,
    expectations: {
      change: 'pages',
      patched: {
        apicAccessExits: WRITES,
        mmioExits: 0,
        internalErrors: 0,
        nestedRunMinusExits: 1,
        lastExit: 'vmcall',
      },
      // How many writes trap depends on whether a discard falls between an exit and the next entry.
      stock: {
        apicAccessExits: { min: 1, max: WRITES },
        mmioExits: 0,
        internalErrors: 0,
        nestedRunMinusExits: 1,
        lastExit: 'vmcall',
      },
    },
    body: (context) => racing(context, discard, () => ({})),
  }),
  selftest({
    id: 'apic-update/memslot-move/deterministic',
    title: "the APIC-access page's memslot moves away between L2 writes",
    requires,
    expectations: {
      any: {
        apicAccessExits: 1,
        mmioExits: WRITES - 1,
        internalErrors: 0,
        nestedRun: 2,
        lastExit: 'vmcall',
        syncs: SYNCS,
        pageWords: VALUES.map(() => 0),
        operations: OPERATIONS,
      },
    },
    body: (context) => deterministic(context, move),
  }),
  selftest({
    id: 'apic-update/memslot-move/racing',
    title: "the APIC-access page's memslot moves away while L2 writes",
    requires,
    racing: true,
    expectations: {
      any: {
        apicAccessExits: { min: 1, max: WRITES },
        mmioExits: { min: 0, max: WRITES - 1 },
        // A move between an APIC-access exit and L1's VMRESUME ends the run with KVM_EXIT_INTERNAL_ERROR.
        internalErrors: { oneOf: [0, 1] },
        nestedRunMinusExits: { oneOf: [0, 1] },
        lastExit: { oneOf: ['vmcall', 'none'] },
        lostWrites: { oneOf: [0, null] },
      },
    },
    body: (context) =>
      racing(context, move, ({ finished, writesSeen }) => ({
        // Nothing L2 wrote may vanish: it trapped, or it came to userspace. Unknown when the run was cut short.
        lostWrites: finished ? WRITES - writesSeen : null,
      })),
  }),
];
