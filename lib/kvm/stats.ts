// SPDX-License-Identifier: Apache-2.0
import type { CapabilityName } from './capabilities.ts';
import { KvmUnsupportedError } from './errors.ts';
import type { StatRow } from './loader.ts';

/** By name; a histogram has one number per bucket. */
export type Stats = Map<string, bigint | bigint[]>;

const TYPES = ['cumulative', 'instant', 'peak', 'linear-histogram', 'log-histogram'] as const;
const UNITS = ['none', 'bytes', 'seconds', 'cycles', 'boolean'] as const;
const BASES = [10, 2] as const;

/** How to read a statistic (struct kvm_stats_desc): the quantity is value × base ^ exponent units. */
export interface StatSchema {
  name: string;
  type: (typeof TYPES)[number] | `unknown-${number}`;
  unit: (typeof UNITS)[number] | `unknown-${number}`;
  base: 10 | 2 | undefined;
  exponent: number;
  /** Numbers it has: 1, or the buckets of a histogram. */
  count: number;
  /** Of a linear histogram: the width of a bucket. */
  bucketSize: number;
}

const named = <T extends string>(names: readonly T[], index: number): T | `unknown-${number}` =>
  names[index] ?? `unknown-${index}`;

/** Reads one fd's statistics: the descriptors once, the numbers at every call. */
export class StatsReader {
  readonly #rows: StatRow[];
  readonly #words: BigUint64Array;
  readonly #read: (words: BigUint64Array) => void;

  /** KVM_GET_STATS_FD. @throws KvmUnsupportedError */
  constructor(
    owner: { checkExtension(capability: CapabilityName): number },
    open: () => StatRow[],
    read: (words: BigUint64Array) => void,
  ) {
    if (owner.checkExtension('KVM_CAP_BINARY_STATS_FD') === 0) {
      throw new KvmUnsupportedError('KVM_CAP_BINARY_STATS_FD', 'KVM_GET_STATS_FD');
    }
    const rows = open();
    this.#rows = rows;
    this.#words = new BigUint64Array(Math.max(0, ...rows.map(([, , , , index, count]) => index + count)));
    this.#read = read;
  }

  read(): Stats {
    this.#read(this.#words);
    const stats: Stats = new Map();
    for (const [name, , , , index, count] of this.#rows) {
      stats.set(name, count === 1 ? this.#words[index]! : [...this.#words.subarray(index, index + count)]);
    }
    return stats;
  }

  schema(): StatSchema[] {
    return this.#rows.map(([name, flags, exponent, bucketSize, , count]) => ({
      name,
      type: named(TYPES, flags & 0xf),
      unit: named(UNITS, (flags >> 4) & 0xf),
      base: BASES[(flags >> 8) & 0xf],
      exponent,
      count,
      bucketSize,
    }));
  }
}
