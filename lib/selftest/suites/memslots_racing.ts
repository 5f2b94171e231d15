// SPDX-License-Identifier: Apache-2.0
// Memslots change while L2 runs.
import type { L2Stop } from '../../guest/index.ts';
import { selftest } from '../engine/define.ts';
import type { Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, nestedRuns } from './common.ts';

const PAGE = 4096;
const STABLE = 0xc000_0000;
const CHANGING = 0xd000_0000;
const PAGES = 8;
const ROUNDS = 400;
const PAUSES = 8000;

/** What changes, and whether L2 touches it. */
interface Race {
  readonly id: string;
  readonly title: string;
  readonly touches: boolean;
}

const RACES: readonly Race[] = [
  {
    id: 'unrelated',
    title: 'a slot that L2 does not touch comes, moves and goes while L2 increments words of another',
    touches: false,
  },
  {
    id: 'touched',
    title: 'a slot comes, moves and goes while L2 writes to it: every write meets memory or userspace',
    touches: true,
  },
];

async function race(context: SelftestContext, touches: boolean, ept: boolean) {
  const { signal, random } = context;
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const stable = vm.memory.add({ gpa: STABLE, size: PAGES * PAGE });
  // inc qword [rdi]; ret
  const increment = l1.place(Uint8Array.of(0x48, 0xff, 0x07, 0xc3));
  const l2 = await l1.createL2(ept ? {} : { ept: false }, (program) =>
    program.loop(ROUNDS, (body) => {
      for (let page = 0; page < PAGES; page++) body.call(increment, STABLE + page * PAGE);
      if (touches) body.write32(CHANGING, 7);
      body.pause(PAUSES);
    }),
  );
  const before = nestedRuns(l1);
  let over = false;
  let mmio = 0;
  let foreign = 0;
  const run = async (): Promise<L2Stop> => {
    let stop = await l2.enter({ signal });
    while (stop.kind === 'kvm-exit' && stop.exit.type === 'mmio') {
      const { isWrite, address, data } = stop.exit;
      mmio += 1;
      if (!isWrite || address !== CHANGING || data.length !== 4 || data[0] !== 7) foreign += 1;
      stop = await l2.continue({ signal });
    }
    over = true;
    return stop;
  };
  const running = run();
  let changes = 0;
  let dropped = 0;
  while (!over) {
    const region = vm.memory.add({ gpa: CHANGING, size: PAGE });
    await Promise.race([running, context.sleep(Math.floor(random() * 3))]);
    if (random() < 0.5) {
      region.move(CHANGING + 16 * PAGE);
      await Promise.race([running, context.sleep(Math.floor(random() * 2))]);
      region.move(CHANGING);
    }
    if (new DataView(region.buffer).getUint32(0, true) === 7) dropped += 1;
    region.delete();
    changes += 1;
    await Promise.race([running, context.sleep(Math.floor(random() * 2))]);
  }
  const stop = await running;
  const words = new DataView(stable.buffer);
  const numbers = Array.from({ length: PAGES }, (_, page) => Number(words.getBigUint64(page * PAGE, true)));
  return {
    observed: {
      end: stop.kind === 'exit' ? stop.exit.reason : stop.kind,
      right: numbers.filter((value) => value === ROUNDS).length,
      mmio,
      foreign,
      executed: l2.progress.executed,
      nestedRun: nestedRuns(l1) - before,
    },
    evidence: { changes, slotsWritten: dropped },
  };
}

export const racing: readonly Selftest[] = RACES.flatMap(({ id, title, touches }) =>
  [true, false].map((ept) =>
    selftest({
      id: `memslots/racing/${id}${ept ? '' : '/no-ept'}`,
      title: `${title}${ept ? '' : '; L2 without EPT'}`,
      requires: [nestedVmx, binaryStats, ...(ept ? [vmxControl('secondary.enable-ept')] : [])],
      racing: true,
      expectations: {
        any: {
          end: 'vmcall',
          right: PAGES,
          mmio: touches ? { min: 0, max: ROUNDS } : 0,
          foreign: 0,
          executed: ROUNDS * (PAGES + (touches ? 3 : 2)),
          nestedRun: 1,
        },
      },
      body: (context) => race(context, touches, ept),
    }),
  ),
);
