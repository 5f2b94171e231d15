// SPDX-License-Identifier: Apache-2.0
// Which pages the dirty log and the dirty ring name after L2 has run.
import { foldChecksum, type L1, type L2, type L2Options } from '../../guest/index.ts';
import type { MemoryRegion } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observed, Requirement, Selftest, SelftestContext } from '../engine/model.ts';
import { nestedVmx } from '../engine/requirements.ts';
import type { Machine } from './common.ts';
import { hex } from './common.ts';
import {
  bootPrepared,
  dirtyRing,
  fromBitmap,
  fromRing,
  RING,
  requires,
  type Take,
} from './dirty_log_common.ts';
import { ownWrites } from './dirty_log_own.ts';
import { racing } from './dirty_log_racing.ts';

const GPA = 0xc000_0000;
const PAGE = 4096;
const PAGES = 64;
/** An address that only L2 knows. */
const ALIAS = 0x8_0000_0000;

interface Translation {
  readonly id: string;
  /** Without EPT the test does not ask for it: it is the one for a kvm_intel with ept=0. */
  readonly requires: readonly Requirement[];
  readonly title: string;
  readonly options: (l1: L1) => L2Options;
}

const at = (page: number, offset = 0) => GPA + page * PAGE + offset;

function withEpt(pageSize: '4K' | '2M', accessedDirty = false): (l1: L1) => L2Options {
  return (l1) => {
    const ept = l1.createEpt({ pageSize, accessedDirty });
    ept.map(ALIAS, at(9));
    const pageTables = l1.createPageTables();
    pageTables.map(ALIAS);
    return { ept, pageTables };
  };
}

const TRANSLATIONS: readonly Translation[] = [
  { id: 'ept-4k', title: "L1's EPT of 4 KiB pages", requires, options: withEpt('4K') },
  { id: 'ept-2m', title: "L1's EPT of 2 MiB pages", requires, options: withEpt('2M') },
  { id: 'ept-ad', title: "L1's EPT with accessed and dirty flags", requires, options: withEpt('2M', true) },
  {
    id: 'no-ept',
    requires: [nestedVmx],
    title: 'no EPT: KVM shadows the page tables of L2',
    options: (l1) => {
      const pageTables = l1.createPageTables();
      pageTables.map(ALIAS, { to: at(9) });
      return { ept: false, pageTables };
    },
  },
];

const VALUES = [0, 0x55];

/** Writes, reads and writes again, and a stop after each. */
async function makeL2(l1: L1, translation: Translation): Promise<L2> {
  return l1.createL2(translation.options(l1), (program) =>
    program
      .write8(at(1), 1)
      .read64(at(2))
      .write64(at(4), 0x55)
      .write32(at(6, PAGE - 2), 0xffff_ffff)
      .write16(ALIAS, 1)
      .sync(1)
      .read64(at(4))
      .sync(2)
      .write8(at(63), 1)
      .write8(at(1), 2)
      .write8(ALIAS + 8, 1)
      .sync(3),
  );
}

const EXECUTED = 12;
const STEPS = {
  /** Nobody wrote: the log was just turned on. */
  start: [],
  writes: [1, 4, 6, 7, 9],
  reads: [],
  again: [1, 9, 63],
  byL1: [12],
  byHost: [],
};

async function play(
  context: SelftestContext,
  machine: Machine,
  region: MemoryRegion,
  l2: L2,
  take: Take,
): Promise<Record<string, Observed>> {
  const { l1 } = machine;
  const { signal } = context;
  const start = take();
  await l2.enter({ signal });
  const writes = take();
  await l2.continue({ signal });
  const reads = take();
  await l2.continue({ signal });
  const again = take();
  await l2.continue({ signal });
  await l1.cpu(0).write(at(12), 8, 1);
  const byL1 = take();
  new DataView(region.buffer).setUint8(PAGE * 13, 1);
  const byHost = take();
  const { executed, checksum } = l2.progress;
  return { start, writes, reads, again, byL1, byHost, executed, checksum: hex(checksum) };
}

const bitmaps = TRANSLATIONS.map((translation) =>
  selftest({
    id: `dirty-log/bitmap/${translation.id}`,
    title: `exactly the pages written since the last look, through ${translation.title}`,
    requires: translation.requires,
    expectations: { any: { ...STEPS, executed: EXECUTED, checksum: hex(foldChecksum(VALUES)) } },
    body: async (context) => {
      await using machine = await bootPrepared(context, () => {});
      const region = machine.vm.memory.add({ gpa: GPA, size: PAGES * PAGE, logDirtyPages: true });
      const l2 = await makeL2(machine.l1, translation);
      return { observed: await play(context, machine, region, l2, fromBitmap(region)) };
    },
  }),
);

const rings = TRANSLATIONS.filter(({ id }) => id !== 'ept-4k').map((translation) =>
  selftest({
    id: `dirty-log/ring/${translation.id}`,
    title: `the dirty ring names exactly the pages written, through ${translation.title}`,
    requires: [...translation.requires, dirtyRing],
    expectations: {
      any: { ...STEPS, bitmap: 'ENXIO', executed: EXECUTED, checksum: hex(foldChecksum(VALUES)) },
    },
    body: async (context) => {
      await using machine = await bootPrepared(context, (vm) => vm.enableDirtyRing(RING));
      const region = machine.vm.memory.add({ gpa: GPA, size: PAGES * PAGE, logDirtyPages: true });
      const l2 = await makeL2(machine.l1, translation);
      const seen = await play(context, machine, region, l2, fromRing(machine, region));
      let bitmap = 'ok';
      try {
        region.dirtyLog();
      } catch (error) {
        bitmap = (error as { code: string }).code;
      }
      return { observed: { ...seen, bitmap } };
    },
  }),
);

const MANY = 2 * RING;

const ringFull = selftest({
  id: 'dirty-log/ring/full',
  title: 'L2 writes more pages than the ring holds: KVM_RUN stops, and after a harvest L2 goes on',
  requires: [...requires, dirtyRing],
  expectations: {
    any: { missing: 0, foreign: 0, fullStops: { min: 1, max: MANY }, last: 'vmcall', executed: 2 * MANY },
  },
  body: async (context) => {
    const { signal } = context;
    await using machine = await bootPrepared(context, (vm) => vm.enableDirtyRing(RING));
    const { vm, l1 } = machine;
    const region = vm.memory.add({ gpa: GPA, size: MANY * PAGE, logDirtyPages: true });
    const take = fromRing(machine, region);
    const page = l1.allocate();
    const memory = new DataView(l1.memory.buffer);
    memory.setBigUint64(page, BigInt(GPA), true);
    // mov rax, [rdi]; mov [rax], rax; add rax, rsi; mov [rdi], rax; ret
    const step = l1.place(
      Uint8Array.from([
        ...[0x48, 0x8b, 0x07, 0x48, 0x89, 0x00, 0x48, 0x01, 0xf0],
        ...[0x48, 0x89, 0x07, 0xc3],
      ]),
    );
    const l2 = await l1.createL2({}, (program) => program.loop(MANY, (body) => body.call(step, page, PAGE)));
    const seen = new Set(take());
    let fullStops = 0;
    let stop = await l2.enter({ signal });
    while (stop.kind === 'kvm-exit' && stop.exit.type === 'dirty-ring-full') {
      fullStops += 1;
      for (const number of take()) seen.add(number);
      stop = await l2.continue({ signal });
    }
    for (const number of take()) seen.add(number);
    const last = stop.kind === 'exit' ? stop.exit.reason : stop.kind;
    const missing = Array.from({ length: MANY }, (_, n) => n).filter((n) => !seen.has(n)).length;
    const foreign = [...seen].filter((n) => n >= MANY).length;
    return { observed: { missing, foreign, fullStops, last, executed: l2.progress.executed } };
  },
});

const manual = selftest({
  id: 'dirty-log/bitmap/manual',
  title: 'KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: looking clears nothing, clearing clears what it names',
  requires,
  expectations: {
    any: {
      initially: PAGES,
      cleared: [],
      written: [1, 2, 40],
      lookedAgain: [1, 2, 40],
      partly: [2, 40],
      writtenAgain: [1, 2, 40],
      executed: 7,
    },
  },
  body: async (context) => {
    const { signal } = context;
    await using machine = await bootPrepared(context, (vm) =>
      vm.enableManualDirtyLog({ initiallySet: true }),
    );
    const { vm, l1 } = machine;
    const region = vm.memory.add({ gpa: GPA, size: PAGES * PAGE, logDirtyPages: true });
    const bit = (...pages: number[]) => {
      const bitmap = new Uint8Array(PAGES / 8);
      for (const page of pages) bitmap[page >> 3]! |= 1 << (page & 7);
      return bitmap;
    };
    const initially = region.dirtyPages().length;
    region.clearDirtyLog(new Uint8Array(PAGES / 8).fill(0xff));
    const cleared = region.dirtyPages();
    const l2 = await l1.createL2({}, (program) => {
      for (const page of [1, 2, 40]) program.write8(at(page), 1);
      program.sync(1).write8(at(1), 2).write8(at(40), 2).sync(2);
    });
    await l2.enter({ signal });
    const written = region.dirtyPages();
    const lookedAgain = region.dirtyPages();
    region.clearDirtyLog(bit(1));
    const partly = region.dirtyPages();
    await l2.continue({ signal });
    const writtenAgain = region.dirtyPages();
    await l2.continue({ signal });
    const { executed } = l2.progress;
    return { observed: { initially, cleared, written, lookedAgain, partly, writtenAgain, executed } };
  },
});

export const dirtyLog: readonly Selftest[] = [...bitmaps, manual, ...rings, ringFull, ...ownWrites, racing];
