// SPDX-License-Identifier: Apache-2.0
// What happens to memslots beneath L2, step by step, as data.
import type { L2Program } from '../../guest/index.ts';
import type { KvmError, MemoryRegion, Vm } from '../../kvm/index.ts';
import type { Observed } from '../engine/model.ts';

const PAGE = 4096;
/** The slot that is changed, and one that stays. */
export const A = 0xc000_0000;
export const B = 0xd000_0000;
export const STAYS = 0xbbbb;
/** What L2 reads where nobody answers but userspace. */
const MMIO = 0x5a5a_5a5a_5a5a_5a5an;

/** A region by name, while it exists. */
export class Stage {
  readonly vm: Vm;
  readonly #regions = new Map<string, MemoryRegion>();

  constructor(vm: Vm) {
    this.vm = vm;
  }

  add(
    name: string,
    gpa: number,
    pages = 1,
    options: { readOnly?: boolean; logDirtyPages?: boolean } = {},
  ): void {
    this.#regions.set(name, this.vm.memory.add({ gpa, size: pages * PAGE, ...options }));
  }

  region(name: string): MemoryRegion {
    const region = this.#regions.get(name);
    if (!region) throw new Error(`there is no region ${name}`);
    return region;
  }

  delete(name: string): void {
    this.region(name).delete();
    this.#regions.delete(name);
  }

  write(name: string, page: number, value: number): void {
    new DataView(this.region(name).buffer).setBigUint64(page * PAGE, BigInt(value), true);
  }

  read(name: string, page = 0): number {
    return Number(new DataView(this.region(name).buffer).getBigUint64(page * PAGE, true));
  }
}

export interface Step {
  /** What the host does while L2 stands still. */
  readonly act: (stage: Stage) => unknown;
  readonly run: (program: L2Program) => unknown;
  /** Exits to userspace. */
  readonly stops?: readonly string[];
  readonly values: readonly (bigint | number)[];
  /** What the host sees afterwards. */
  readonly look?: (stage: Stage) => Observed;
  readonly seen?: Observed;
}

export interface Case {
  readonly id: string;
  readonly title: string;
  readonly steps: readonly Step[];
}

export const CASES: readonly Case[] = [
  {
    id: 'add-delete',
    title: 'a slot is added, deleted and added again: no access meets memory that is gone',
    steps: [
      {
        act: () => {},
        run: (p) =>
          p
            .read64(A)
            .write32(A + 8, 1)
            .read64(B),
        stops: ['read A+0x0', 'write A+0x8=0x1'],
        values: [MMIO, STAYS],
      },
      {
        act: (s) => s.add('a', A),
        run: (p) => p.read64(A).write64(A, 0x11).read64(A).read64(B),
        values: [0, 0x11, STAYS],
        look: (s) => s.read('a'),
        seen: 0x11,
      },
      {
        act: (s) => s.delete('a'),
        run: (p) => p.read64(A).write32(A, 2).read64(B),
        stops: ['read A+0x0', 'write A+0x0=0x2'],
        values: [MMIO, STAYS],
      },
      {
        act: (s) => s.add('a', A, 2),
        run: (p) =>
          p
            .read64(A)
            .read64(A + PAGE)
            .write64(A + PAGE, 0x22)
            .read64(B),
        values: [0, 0, STAYS],
        look: (s) => [s.read('a', 0), s.read('a', 1)],
        seen: [0, 0x22],
      },
    ],
  },
  {
    id: 'move',
    title: 'a slot moves away, by one page over itself, and back: each page is where it is now',
    steps: [
      {
        act: (s) => {
          s.add('a', A, 3);
          for (const page of [0, 1, 2]) s.write('a', page, 0x10 + page);
        },
        run: (p) =>
          p
            .read64(A)
            .read64(A + PAGE)
            .read64(A + 2 * PAGE),
        values: [0x10, 0x11, 0x12],
      },
      {
        act: (s) => s.region('a').move(A + 16 * PAGE),
        run: (p) =>
          p
            .read64(A)
            .read64(A + 16 * PAGE)
            .write64(A + 18 * PAGE, 0x33)
            .read64(B),
        stops: ['read A+0x0'],
        values: [MMIO, 0x10, STAYS],
        look: (s) => s.read('a', 2),
        seen: 0x33,
      },
      {
        act: (s) => s.region('a').move(A),
        run: (p) =>
          p
            .read64(A + 16 * PAGE)
            .read64(A)
            .read64(A + 2 * PAGE),
        stops: ['read A+0x10000'],
        values: [MMIO, 0x10, 0x33],
      },
      {
        act: (s) => s.region('a').move(A + PAGE),
        run: (p) =>
          p
            .read64(A)
            .read64(A + PAGE)
            .read64(A + 2 * PAGE)
            .write64(A + 3 * PAGE, 0x44),
        stops: ['read A+0x0'],
        values: [MMIO, 0x10, 0x11],
        look: (s) => [s.read('a', 0), s.read('a', 1), s.read('a', 2)],
        seen: [0x10, 0x11, 0x44],
      },
    ],
  },
  {
    id: 'swap',
    title: 'other memory comes beneath the same addresses, empty and with the same contents',
    steps: [
      {
        act: (s) => s.add('a', A, 2),
        run: (p) =>
          p
            .write64(A, 0x11)
            .write64(A + PAGE, 0x12)
            .read64(A),
        values: [0x11],
      },
      {
        act: (s) => s.region('a').swap({ copy: true }),
        run: (p) =>
          p
            .read64(A)
            .read64(A + PAGE)
            .write64(A, 0x21),
        values: [0x11, 0x12],
        look: (s) => [s.read('a', 0), s.read('a', 1)],
        seen: [0x21, 0x12],
      },
      {
        act: (s) => s.region('a').swap(),
        run: (p) =>
          p
            .read64(A)
            .read64(A + PAGE)
            .write64(A + PAGE, 0x32)
            .read64(B),
        values: [0, 0, STAYS],
        look: (s) => [s.read('a', 0), s.read('a', 1)],
        seen: [0, 0x32],
      },
    ],
  },
  {
    id: 'read-only',
    title:
      'in a read-only slot L2 reads memory, and its writes come to userspace; flags of a slot cannot become so',
    steps: [
      {
        act: (s) => {
          s.add('a', A, 1, { readOnly: true });
          s.write('a', 0, 0x77);
        },
        run: (p) => p.read64(A).write32(A, 1).read64(A),
        stops: ['write A+0x0=0x1'],
        values: [0x77, 0x77],
        look: (s) => s.read('a'),
        seen: 0x77,
      },
      {
        act: (s) => {
          s.delete('a');
          s.add('a', A);
        },
        run: (p) => p.read64(A).write64(A, 2).read64(A),
        values: [0, 2],
        look: (s) => {
          try {
            s.region('a').setFlags({ readOnly: true });
            return 'ok';
          } catch (error) {
            return (error as KvmError).code;
          }
        },
        seen: 'EINVAL',
      },
      {
        act: (s) => {
          s.delete('a');
          s.add('a', A, 1, { readOnly: true });
        },
        run: (p) =>
          p
            .read64(A)
            .write32(A + 8, 3)
            .write64(B + 8, 9),
        stops: ['write A+0x8=0x3'],
        values: [0],
        look: (s) => s.read('a'),
        seen: 0,
      },
    ],
  },
  {
    id: 'dirty-logging',
    title: 'dirty logging goes on, off and on again beneath L2: no write is lost, none is named twice',
    steps: [
      {
        act: (s) => s.add('a', A, 4),
        run: (p) => p.write64(A, 1).write64(A + PAGE, 1),
        values: [],
        look: (s) => s.region('a').logDirtyPages,
        seen: false,
      },
      {
        act: (s) => s.region('a').setFlags({ logDirtyPages: true }),
        run: (p) =>
          p
            .write64(A + PAGE, 2)
            .write64(A + 3 * PAGE, 2)
            .read64(A),
        values: [1],
        look: (s) => s.region('a').dirtyPages(),
        seen: [1, 3],
      },
      {
        act: (s) => s.region('a').setFlags({ logDirtyPages: false }),
        run: (p) => p.write64(A + 2 * PAGE, 3).read64(A + PAGE),
        values: [2],
        look: (s) => [0, 1, 2, 3].map((page) => s.read('a', page)),
        seen: [1, 2, 3, 2],
      },
      {
        act: (s) => s.region('a').setFlags({ logDirtyPages: true }),
        run: (p) => p.read64(A + 2 * PAGE).write64(A, 4),
        values: [3],
        look: (s) => s.region('a').dirtyPages(),
        seen: [0],
      },
      {
        // the log goes with the slot's move; KVM may name a page that is then read first, so L2 reads none
        act: (s) => s.region('a').move(A + 8 * PAGE),
        run: (p) => p.write64(A + 10 * PAGE, 5).read64(B),
        values: [STAYS],
        look: (s) => s.region('a').dirtyPages(),
        seen: [2],
      },
    ],
  },
  {
    id: 'others',
    title: 'slots above, below and around come and go: the one that L2 uses stays as it is',
    steps: [
      {
        act: (s) => {
          s.add('a', A);
          s.add('below', A - PAGE);
        },
        run: (p) => p.write64(A, 0x11).read64(A - PAGE),
        values: [0],
      },
      {
        act: (s) => {
          s.delete('below');
          s.add('above', A + PAGE, 512);
        },
        run: (p) =>
          p
            .read64(A)
            .write64(A + PAGE, 0x12)
            .read64(A + PAGE),
        values: [0x11, 0x12],
      },
      {
        act: (s) => {
          s.region('above').move(A + 1024 * PAGE);
          s.add('below', A - 512 * PAGE, 512);
        },
        run: (p) =>
          p
            .read64(A)
            .read64(A + 1024 * PAGE)
            .read64(A - PAGE)
            .read64(B),
        values: [0x11, 0x12, 0, STAYS],
        look: (s) => s.read('a'),
        seen: 0x11,
      },
    ],
  },
];
