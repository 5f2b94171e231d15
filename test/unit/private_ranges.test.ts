// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { PrivateRanges } from '../../lib/kvm/private_ranges.ts';

const PAGE = 0x1000n;
/** struct kvm_memory_attributes, at an odd place of its buffer. */
function attributes(from: number, pages: number, bits: bigint): Uint8Array {
  const bytes = new Uint8Array(40).subarray(5, 37);
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  for (const [index, word] of [BigInt(from) * PAGE, BigInt(pages) * PAGE, bits, 0n].entries())
    view.setBigUint64(index * 8, word, true);
  return bytes;
}

test('private ranges are what a bit for each page would say', () => {
  const PAGES = 24;
  const ranges = new PrivateRanges();
  const bits = new Set<number>();
  expect(ranges.isEmpty).toBe(true);
  let seed = 1;
  const random = (below: number) => {
    seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff;
    return (seed >> 8) % below;
  };
  let empty = 0;
  for (let turn = 0; turn < 5000; turn++) {
    const from = random(PAGES);
    const pages = 1 + random(PAGES - from);
    const isPrivate = random(4) === 0;
    ranges.set(attributes(from, pages, isPrivate ? 8n : 0n));
    for (let page = from; page < from + pages; page++) {
      if (isPrivate) bits.add(page);
      else bits.delete(page);
    }
    expect(ranges.isEmpty).toBe(bits.size === 0);
    if (bits.size === 0) empty++;
  }
  expect(empty).toBeGreaterThan(100);
  expect(empty).toBeLessThan(4900);
});

test('the end of the address space and other attributes', () => {
  const ranges = new PrivateRanges();
  ranges.set(attributes(2 ** 52 - 1, 1, 8n));
  ranges.set(attributes(0, 2 ** 52 - 1, 0n));
  expect(ranges.isEmpty).toBe(false);
  ranges.set(attributes(2 ** 52 - 2, 2, 7n));
  expect(ranges.isEmpty).toBe(true);
});
