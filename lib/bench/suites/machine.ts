// SPDX-License-Identifier: Apache-2.0
// What the benchmarks set up: a VM with L1, the pages L0 touches to run an L2, and L2s that do nothing but exit.
import { L1, type L2, type L2Options, RecordView } from '../../guest/index.ts';
import { type Backing, Kvm, type MemoryRegion, type Vm } from '../../kvm/index.ts';
import { type BackingName, type BenchContext, UnavailableError } from '../bench.ts';

export const PAGE = 4096;
/** Where the pages of interest are: a slot of their own, far from L1's memory. */
const PAGES_GPA = 0xc000_0000;
const PAGES_PER_L2 = 5;
/** KVM refuses to deliver to lower vectors; nobody sends this one. */
const NOTIFICATION_VECTOR = 0xf2;

export interface Machine extends Disposable {
  readonly vm: Vm;
  readonly l1: L1;
}

const L1_MEMORY = 16 * 1024 * 1024;

/** @param evmcs L1 has Hyper-V's enlightenments, as an eVMCS needs them */
export async function bootMachine({ evmcs = false } = {}): Promise<Machine> {
  const kvm = Kvm.open();
  try {
    const vm = kvm.createVm();
    const l1 = await L1.boot(vm, { memory: L1_MEMORY, evmcs });
    return { vm, l1, [Symbol.dispose]: () => kvm.close() };
  } catch (error) {
    kvm.close();
    throw error;
  }
}

/** The backing as lib/kvm wants it. Unmanaged memory is a part of /dev/mem that the kernel has no pages for. */
export function backingOf(name: BackingName, context: BenchContext): Backing {
  if (name === 'guest-memfd') return { type: 'guest-memfd', mmap: true };
  if (name !== 'unmanaged') return name;
  if ('reason' in context.unmanaged) throw new UnavailableError(context.unmanaged.reason);
  return { type: 'file', path: '/dev/mem', offset: context.unmanaged.address };
}

/** Pages of L1's memory that L0 needs to run an L2. */
export type ControlPage = 'msr-bitmap' | 'apic-access' | 'vapic' | 'posted-interrupts' | 'evmcs';

/** What is measured with: one page more with each of the first five; the last two are on an eVMCS. */
export const VARIANTS = {
  none: [],
  'msr-bitmap': ['msr-bitmap'],
  'apic-access': ['msr-bitmap', 'apic-access'],
  vapic: ['msr-bitmap', 'apic-access', 'vapic'],
  'posted-interrupts': ['msr-bitmap', 'apic-access', 'vapic', 'posted-interrupts'],
  evmcs: ['evmcs'],
  // An eVMCS has no field for the address of an APIC-access page
  'evmcs-vapic': ['evmcs', 'msr-bitmap', 'vapic'],
} as const satisfies Record<string, readonly ControlPage[]>;
export type Variant = keyof typeof VARIANTS;

/** The pages that L0 maps at entry, for several L2s, on one backing. */
export class ControlPages {
  readonly region: MemoryRegion;
  readonly #pages: readonly ControlPage[];

  constructor(vm: Vm, l2s: number, backing: Backing, variant: Variant) {
    const size = Math.ceil((l2s * PAGES_PER_L2 * PAGE) / 0x20_0000) * 0x20_0000;
    this.region = vm.memory.add({ gpa: PAGES_GPA, size, backing });
    // Nobody clears unmanaged memory
    new Uint8Array(this.region.buffer, 0, l2s * PAGES_PER_L2 * PAGE).fill(0);
    this.#pages = VARIANTS[variant];
  }

  /** The options that give L2 number `index` its pages. */
  options(index: number): L2Options {
    const at = (page: number) => PAGES_GPA + (index * PAGES_PER_L2 + page) * PAGE;
    const has = (page: ControlPage) => this.#pages.includes(page);
    return {
      vpid: index + 1,
      ...(has('evmcs') ? { evmcs: true, vmcs: at(4) } : {}),
      ...(has('apic-access') ? { apicAccess: at(0) } : {}),
      ...(has('vapic') ? { virtualApic: at(1) } : {}),
      controls: [
        ...(has('msr-bitmap') ? (['primary.use-msr-bitmaps'] as const) : []),
        ...(has('posted-interrupts')
          ? ([
              'pin.external-interrupt-exiting',
              'pin.process-posted-interrupts',
              'secondary.virtual-interrupt-delivery',
              'secondary.apic-register-virtualization',
              'exit.acknowledge-interrupt-on-exit',
            ] as const)
          : []),
      ],
      fields: {
        ...(has('msr-bitmap') ? { MSR_BITMAP: at(2) } : {}),
        ...(has('posted-interrupts')
          ? { POSTED_INTR_DESC_ADDR: at(3), POSTED_INTR_NV: NOTIFICATION_VECTOR }
          : {}),
      },
    };
  }
}

/** Makes an L2 that starts in a function of guests/l2/bench.c with a bench record. */
export async function benchL2(l1: L1, loop: string, options: L2Options, record = l1.allocate()): Promise<L2> {
  const l2 = await l1.createL2({ ...options, entry: symbol(l1, loop) }, (program) => program);
  // These loops bring no control page of their own: this is where an exception of theirs is reported
  l2.control.setU64('self', l2.control.gpa);
  l2.area.setU64('regs', record, 7);
  return l2;
}

export function symbol(l1: L1, name: string): number {
  return l1.images.l2.symbol(name).address;
}

/** A record of guests/l2/bench.c in a page of its own. */
export function benchRecord(l1: L1): RecordView<'bench'> {
  return new RecordView(l1.memory.buffer, 'bench', l1.allocate());
}

/** Room for u32 ticks in L1's memory. */
export class TickBuffer {
  readonly gpa: number;
  readonly #l1: L1;

  constructor(l1: L1, samples: number) {
    this.#l1 = l1;
    this.gpa = l1.allocate(Math.ceil((samples * 4) / PAGE));
  }

  take(count: number): Uint32Array {
    return new Uint32Array(this.#l1.memory.buffer, this.gpa, count).slice();
  }
}

/** Makes L1 keep the ticks of the next entries of this L2. */
export function sampleEntries(l2: L2, buffer: TickBuffer, room: number): void {
  l2.area.setU64('samples', buffer.gpa);
  l2.area.setU64('samples_room', room);
  l2.area.setU64('samples_count', 0);
}

/** For numbers that must be exact: a benchmark that measured something else says so instead of a figure. */
export function mustBe(what: string, seen: unknown, expected: unknown): void {
  if (seen !== expected) throw new Error(`${what}: expected ${String(expected)}, seen ${String(seen)}`);
}
