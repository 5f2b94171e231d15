// SPDX-License-Identifier: Apache-2.0
// The virtual-APIC page changes beneath an L2 that writes CR8 over and over and never exits by itself.
import { availableParallelism } from 'node:os';
import type { L2Program } from '../../guest/index.ts';
import type { Observations, Requirement, SelftestContext } from '../engine/model.ts';
import { vmxControl } from '../engine/requirements.ts';
import { bootL1, type Machine, stopText } from './common.ts';
import { GuestPage } from './guest_page.ts';
import type { HazardTest } from './hazard.ts';
import { text } from './hazard_pages.ts';
import { meanwhile, until } from './watchdog.ts';

const VTPR = 0x80;
const CR8 = 9;
const SPINS = 50;
/** The end of the waits without sleep, far beyond what L2 needs. */
const LOOKS = 10_000_000;
const ROUNDS = 10;

/** inc dword [rdi]; mov cr8, rsi; cmp dword [rdi+4], 2; jne; mov eax, 7; ret */
const SPIN_CR8 = [0xff, 0x07, 0x44, 0x0f, 0x22, 0xc6, 0x83, 0x7f, 4, 2, 0x75, 0xf4, 0xb8, 7, 0, 0, 0, 0xc3];

/** An L2 that counts in a cell of memory and writes CR8 until the next cell holds 2. */
class Spinner {
  readonly page: GuestPage;
  readonly #cells: number;
  readonly #counter: Int32Array;
  readonly #spin: number;

  constructor({ vm, l1 }: Machine) {
    this.page = new GuestPage(vm);
    this.#cells = l1.allocate();
    this.#counter = new Int32Array(l1.memory.buffer, this.#cells, 2);
    this.#spin = l1.place(Uint8Array.from(SPIN_CR8));
  }

  spin(program: L2Program): L2Program {
    return program.call(this.#spin, this.#cells, CR8);
  }

  /** Whether L2 has gone round some more times since the call. */
  more(): () => boolean {
    const now = Atomics.load(this.#counter, 0);
    return () => Atomics.load(this.#counter, 0) > now + SPINS;
  }

  /** VTPR in the page as it is now. */
  get vtpr(): number {
    return this.page.view.getUint8(VTPR);
  }

  stop(): void {
    Atomics.store(this.#counter, 1, 2);
  }
}

async function swapped(context: SelftestContext): Promise<Observations> {
  await using machine = await bootL1(context);
  const spinner = new Spinner(machine);
  const l2 = await machine.l1.createL2({ virtualApic: spinner.page.gpa }, (p) =>
    spinner.spin(p.sync(1)).vmcall().readCr8().writeCr8(3),
  );
  await l2.enter({ signal: context.signal });
  let fresh = -1;
  let old = -1;
  const spun: boolean[] = [];
  const stop = await meanwhile(
    context,
    (signal) => l2.continue({ signal }),
    async () => {
      spun.push(await until(context, spinner.more()));
      old = spinner.vtpr;
      spinner.page.swap();
      spun.push(await until(context, spinner.more()));
      fresh = spinner.vtpr;
      spinner.stop();
    },
  );
  const last = stop && stopText(await l2.enter({ signal: context.signal }));
  return {
    spun,
    old,
    fresh,
    stops: [text(stop), last ?? 'none'],
    next: spinner.vtpr,
    executed: l2.progress.executed,
  };
}

/**
 * Discards the page while L2 spins on another CPU, and waits without sleeping: L2 has no exit in between but the one
 * that the discard makes. CR8 writes that are missing from the new page went to the old one.
 */
async function discarded(context: SelftestContext): Promise<Observations> {
  await using machine = await bootL1(context);
  const spinner = new Spinner(machine);
  const l2 = await machine.l1.createL2({ virtualApic: spinner.page.gpa }, (p) =>
    spinner.spin(p.sync(1)).vmcall(),
  );
  const first = stopText(await l2.enter({ signal: context.signal }));
  let stale = 0;
  let stuck = 0;
  const stop = await meanwhile(
    context,
    (signal) => l2.continue({ signal }),
    async () => {
      await until(context, spinner.more());
      for (let round = 0; round < ROUNDS; round++) {
        spinner.page.discard();
        const isOn = spinner.more();
        let looks = 0;
        while (!isOn() && looks < LOOKS) looks++;
        if (looks === LOOKS) stuck += 1;
        if (spinner.vtpr !== CR8 << 4) stale += 1;
        await context.sleep(1);
      }
      spinner.stop();
    },
  );
  return { stops: [first, text(stop)], stale, stuck, executed: l2.progress.executed };
}

const twoCpus: Requirement = {
  name: 'two CPUs',
  missing: () =>
    availableParallelism() > 1
      ? undefined
      : 'needs two CPUs, one for L2 and one that changes memory meanwhile: in the lab --cpus 2',
};

const requires = [vmxControl('primary.use-tpr-shadow')];
const SWAPPED = {
  spun: [true, true],
  old: CR8 << 4,
  stops: ['vmcall', 'vmcall'],
  next: 0x30,
  executed: 5,
};
const DISCARDED = { stops: ['sync 1', 'vmcall'], stuck: 0, executed: 2 };

export const SPIN_HAZARDS: readonly HazardTest[] = [
  {
    id: 'vapic-swap-under-spin',
    title:
      'other memory beneath the virtual-APIC page of an L2 that never exits (stock KVM: seen at the next entry)',
    requires,
    expect: { stock: { ...SWAPPED, fresh: 0 }, patched: { ...SWAPPED, fresh: CR8 << 4 } },
    body: swapped,
  },
  {
    id: 'vapic-discard-under-spin',
    title: 'the virtual-APIC page is discarded beneath an L2 that never exits, on another CPU',
    requires: [...requires, twoCpus],
    expect: { stock: { ...DISCARDED, stale: ROUNDS }, patched: { ...DISCARDED, stale: 0 } },
    body: discarded,
  },
];
