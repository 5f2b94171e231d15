// SPDX-License-Identifier: Apache-2.0
import { checkFlag, checkInteger, checkIterable, checkName, checkObject, checkU64 } from './check.ts';

/** Exits that are counted and answered without leaving native code. */
export type ExitRule =
  | {
      type: 'io';
      direction: 'in' | 'out';
      /** One port, or the first and the last of a range. */
      port: number | readonly [number, number];
      /** What `in` reads, little-endian; default 0. */
      answer?: bigint;
    }
  | {
      type: 'mmio';
      isWrite: boolean;
      /** Guest-physical, where the access begins: one address, or the first and the last. */
      address: number | readonly [number, number];
      answer?: bigint;
    };

/** In the order of native/kvm/exit_filter.h. */
const KINDS = { in: 0n, out: 1n, read: 2n, write: 3n } as const;

function range(name: string, given: number | readonly [number, number], high: number): [bigint, bigint] {
  if (!Array.isArray(given)) {
    const one = BigInt(checkInteger(name, given, 0, high));
    return [one, one];
  }
  if (given.length !== 2) throw new RangeError(`${name} is one number or [first, last]`);
  const first = checkInteger(`${name}[0]`, given[0], 0, high);
  return [BigInt(first), BigInt(checkInteger(`${name}[1]`, given[1], first, high))];
}

/** Four words per rule, as the addon takes them. */
export function encodeRules(rules: Iterable<ExitRule>): BigUint64Array {
  const words: bigint[] = [];
  for (const [index, rule] of checkIterable('rules', rules).entries()) {
    const name = `rules[${index}]`;
    checkName(`${name}.type`, checkObject(name, rule).type, ['io', 'mmio']);
    const answer = rule.answer === undefined ? 0n : checkU64(`${name}.answer`, rule.answer);
    if (rule.type === 'io') {
      const isOut = checkName(`${name}.direction`, rule.direction, ['in', 'out']) === 1;
      words.push(isOut ? KINDS.out : KINDS.in, ...range(`${name}.port`, rule.port, 0xffff), answer);
    } else {
      const kind = checkFlag(`${name}.isWrite`, rule.isWrite) ? KINDS.write : KINDS.read;
      words.push(kind, ...range(`${name}.address`, rule.address, Number.MAX_SAFE_INTEGER), answer);
    }
  }
  return BigUint64Array.from(words);
}
