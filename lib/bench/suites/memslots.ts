// SPDX-License-Identifier: Apache-2.0
// The work of the kernel's memslot benchmark, plain (L1 touches) and nested (L2 touches, one VMCALL a page). Guest and
// host take turns, so that the result does not depend on how two CPUs interleave.
import { abiPorts, Batch, type L2, type RecordView } from '../../guest/index.ts';
import { type MemoryRegion, runSteps, type Step } from '../../kvm/index.ts';
import type { BackingName, Bench, BenchContext } from '../bench.ts';
import type { Measurement } from '../model.ts';
import {
  backingOf,
  benchL2,
  benchRecord,
  bootMachine,
  ControlPages,
  type Machine,
  mustBe,
  PAGE,
  symbol,
} from './machine.ts';

const KIB = 1024;
const MIB = 1024 * KIB;
const MEMORY_GPA = 256 * MIB;
/** Slots that are only there, one page each: above everything the guest touches. */
const FILLER_GPA = 0x1_0000_0000;
const WINDOW = 192 * KIB;

/** Sizes of the upstream benchmark, on hardware. */
const FULL = { map: 32 * MIB, unmap: 128 * MIB, chunk: 2 * MIB, rw: 512 * MIB, moved: 512 * MIB };
/** An emulator executes a hundredth of the instructions: a sixteenth of the memory, the same pieces per call. */
const SLOW = { map: 2 * MIB, unmap: 8 * MIB, chunk: 2 * MIB, rw: 4 * MIB, moved: 8 * MIB };
const QUICK = { map: MIB, unmap: 2 * MIB, chunk: MIB, rw: MIB, moved: 2 * MIB };
/** The least that is whole pages of 2 MiB in every part. */
const QUICK_HUGE = { map: 4 * MIB, unmap: 2 * MIB, chunk: 2 * MIB, rw: 2 * MIB, moved: 8 * MIB };
type Sizes = typeof FULL;

const OPERATIONS = {
  map: 'touch one half, discard it, touch the other half, discard it',
  unmap: 'touch all, discard page by page',
  'unmap-chunked': 'touch all, discard in pieces of 2 MiB',
  'move-active': 'touch 192 KiB across the start of the last slot, move that slot away and back',
  'move-inactive': 'touch 192 KiB below the last slot, move that slot away and back',
  rw: 'guest and host check and write a word of each page in turn',
} as const;
type Operation = keyof typeof OPERATIONS;

export type Level = 'plain' | 'nested';

function sizesOf({ quick, full }: BenchContext, backing: BackingName): Sizes {
  if (quick) return backing === 'hugetlb' ? QUICK_HUGE : QUICK;
  if (full) return FULL;
  return backing === 'hugetlb' ? { ...SLOW, map: QUICK_HUGE.map } : SLOW;
}

/** What a backing cannot do, in whatever kernel. */
function impossible(operation: Operation, backing: BackingName): string | undefined {
  if (backing === 'hugetlb' && operation === 'unmap') {
    return 'pages of 2 MiB are not discarded in smaller pieces: see unmap-chunked';
  }
  if (backing === 'guest-memfd' && operation.startsWith('move'))
    return 'KVM moves no memslot on a guest_memfd';
  return undefined;
}

const roundsOf = (context: BenchContext): number => (context.quick ? 3 : context.slow ? 5 : 40);

export function memslots(level: Level, backing: BackingName, slots: number | 'max'): Bench {
  const operations = (Object.keys(OPERATIONS) as Operation[]).filter(
    (name) => !(level === 'nested' && name === 'rw'),
  );
  return {
    family: `memslot/${level}/${backing}/slots=${slots}`,
    nested: level === 'nested',
    backing,
    figures: operations.map((name) => ({
      id: `memslot/${name}/${level}/${backing}/slots=${slots}`,
      title: `${OPERATIONS[name]}${level === 'nested' ? '; L2 touches, one VMCALL a page' : ''}`,
      missing: () => impossible(name, backing),
    })),
    async measure(context, wanted) {
      using machine = await bootMachine();
      const work = await SlotWork.prepare(machine, { level, backing, slots, context });
      const results: Measurement[] = [];
      for (const [i, { id, title }] of this.figures.entries()) {
        if (wanted.has(id)) results.push({ id, title, ...(await work.measure(operations[i]!)) });
      }
      return results;
    },
  };
}

interface Setting {
  readonly level: Level;
  readonly backing: BackingName;
  readonly slots: number | 'max';
  readonly context: BenchContext;
}

/** A VM with its slots in place, ready for one operation after the other. */
class SlotWork {
  readonly #machine: Machine;
  readonly #setting: Setting;
  readonly #record: RecordView<'bench'>;
  readonly #slots: number;
  readonly #setUpNs: number;
  /** Nested: the L2 that touches. */
  readonly #l2: L2 | undefined;

  private constructor(
    machine: Machine,
    setting: Setting,
    record: RecordView<'bench'>,
    l2: L2 | undefined,
    slots: { count: number; ns: number },
  ) {
    this.#machine = machine;
    this.#setting = setting;
    this.#record = record;
    this.#l2 = l2;
    this.#slots = slots.count;
    this.#setUpNs = slots.ns;
  }

  static async prepare(machine: Machine, setting: Setting): Promise<SlotWork> {
    const { vm, l1 } = machine;
    const { backing, context } = setting;
    const record = benchRecord(l1);
    let l2: L2 | undefined;
    if (setting.level === 'nested') {
      const pages = new ControlPages(vm, 1, backingOf(backing, context), 'vapic');
      l2 = await benchL2(l1, 'bench_touch_l2', pages.options(0), record.gpa);
      l2.setPolicy({ vmcall: 'skip' });
    }
    // Two more are made for each operation.
    const limit = vm.checkExtension('KVM_CAP_NR_MEMSLOTS');
    const count = setting.slots === 'max' ? limit - 1 : Math.min(setting.slots, limit - 1);
    const fillers = count - vm.memory.regions.length - 2;
    const begin = process.hrtime.bigint();
    // From the last number down: the first are those that others get
    for (let i = 1; i <= fillers; i += 1)
      vm.memory.add({ gpa: FILLER_GPA + i * PAGE, size: PAGE, slot: limit - i });
    return new SlotWork(machine, setting, record, l2, { count, ns: Number(process.hrtime.bigint() - begin) });
  }

  /** Memory that can be discarded: unmanaged memory cannot, so there only the pages L0 needs are unmanaged. */
  #add(gpa: number, size: number): MemoryRegion {
    const { backing, context } = this.#setting;
    return this.#machine.vm.memory.add({
      gpa,
      size,
      backing: backing === 'unmanaged' ? 'anonymous' : backingOf(backing, context),
    });
  }

  async measure(operation: Operation): Promise<Omit<Measurement, 'id' | 'title'>> {
    const sizes = sizesOf(this.#setting.context, this.#setting.backing);
    const rounds = roundsOf(this.#setting.context);
    const plan = this.#plan(operation, sizes);
    const regions = [...plan.regions];
    try {
      const record = this.#record;
      record.setU64('start', plan.start);
      record.setU64('pages', plan.pages);
      record.setU64('share', plan.share);
      record.setU64('next', 0);
      // The commands stay where they are: every KVM_RUN of a round executes them again.
      const batch = this.#l2
        ? new Batch().enter(this.#l2.area.gpa, 'auto', plan.share)
        : new Batch().call(
            symbol(this.#machine.l1, operation === 'rw' ? 'bench_rw' : 'bench_touch'),
            record.gpa,
          );
      await this.#machine.l1.cpu(0).executeAll(batch);
      if (operation === 'map') await this.#machine.l1.cpu(0).executeAll(batch);
      record.setU64('round', 0);
      record.setU64('touched', 0);
      const vcpu = this.#machine.l1.vcpu(0);
      // The first round pays for the vCPU's move to this thread.
      const { times, wrong } = runSteps(vcpu, plan.steps, rounds + 1);
      const touches = plan.steps.filter(({ kind }) => kind === 'run').length * plan.share * (rounds + 1);
      if (operation === 'rw') {
        mustBe('words the guest found wrong', record.u64('wrong'), 0n);
        mustBe('words the host found wrong', wrong, 0);
      } else {
        mustBe('pages touched', record.u64('touched'), BigInt(touches));
      }
      const samples = new Float64Array(rounds);
      for (let round = 0; round < rounds; round += 1) {
        const at = (round + 1) * plan.steps.length;
        for (let step = 0; step < plan.steps.length; step += 1) samples[round]! += times[at + step]!;
      }
      return {
        unit: 'cycles',
        samples,
        parameters: { slots: this.#slots, bytes: plan.bytes, pages: plan.pages, rounds },
        setUpNs: this.#setUpNs,
      };
    } finally {
      for (const region of regions) region.delete();
    }
  }

  /** What one round does: the guest's part by the bench record, the host's as steps. */
  #plan(operation: Operation, sizes: Sizes) {
    const run: Step = { kind: 'run', port: abiPorts.done };
    const start = MEMORY_GPA;
    switch (operation) {
      case 'map': {
        const bytes = sizes.map;
        const half = bytes / 2;
        const region = this.#add(start, bytes);
        const discard = (offset: number): Step => ({ kind: 'discard', region, offset, length: half });
        const steps = [run, discard(0), run, discard(half)];
        return { regions: [region], start, bytes, pages: bytes / PAGE, share: half / PAGE, steps };
      }
      case 'unmap':
      case 'unmap-chunked': {
        const bytes = sizes.unmap;
        const region = this.#add(start, bytes);
        const pages = bytes / PAGE;
        const piece = operation === 'unmap' ? PAGE : sizes.chunk;
        return {
          regions: [region],
          start,
          bytes,
          pages,
          share: pages,
          steps: [run, { kind: 'discard', region, piece } as Step],
        };
      }
      case 'move-active':
      case 'move-inactive': {
        const last = sizes.moved / 4;
        const gpa = start + sizes.moved - last;
        const below = this.#add(start, sizes.moved - last);
        const region = this.#add(gpa, last);
        const window = operation === 'move-active' ? gpa - WINDOW / 2 : gpa - WINDOW;
        const pages = WINDOW / PAGE;
        const steps: Step[] = [
          run,
          { kind: 'move', region, gpa: gpa + 2 * last },
          { kind: 'move', region, gpa },
        ];
        return { regions: [below, region], start: window, bytes: sizes.moved, pages, share: pages, steps };
      }
      case 'rw': {
        const bytes = sizes.rw;
        const region = this.#add(start, bytes);
        const pages = bytes / PAGE;
        return {
          regions: [region],
          start,
          bytes,
          pages,
          share: pages,
          steps: [run, { kind: 'exchange', region } as Step],
        };
      }
    }
  }
}
