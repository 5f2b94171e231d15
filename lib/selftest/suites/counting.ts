// SPDX-License-Identifier: Apache-2.0
// L2 counts by itself what an instruction gave it: proof that does not pass through L1 or KVM.
import type { L1 } from '../../guest/index.ts';

const MARK = 0x5a1d_5a1d;

const dword = (value: bigint | number): number[] =>
  [0n, 8n, 16n, 24n].map((shift) => Number((BigInt(value) >> shift) & 0xffn));

/**
 * A function of (RDI, address of three counters). EAX is marked before the instructions that load it: when L1 skips
 * them the mark is left, which counts in the first; `own` counts in the second, anything else in the third.
 */
export function counting(l1: L1, load: readonly number[], own: bigint): number {
  return l1.place(
    Uint8Array.from([
      ...[0xb8, ...dword(MARK)], // mov eax, MARK
      ...load,
      ...[0x3d, ...dword(MARK), 0x75, 0x04], // cmp eax, MARK; jne
      ...[0x48, 0xff, 0x06, 0xc3], // inc qword [rsi]; ret
      ...[0x3d, ...dword(own), 0x75, 0x05], // cmp eax, own; jne
      ...[0x48, 0xff, 0x46, 0x08, 0xc3], // inc qword [rsi+8]; ret
      ...[0x48, 0xff, 0x46, 0x10, 0xc3], // inc qword [rsi+16]; ret
    ]),
  );
}

/** What the three counters hold. */
export function counted(l1: L1, at: number): { marked: number; own: number; other: number } {
  const [marked = 0n, own = 0n, other = 0n] = new BigUint64Array(l1.memory.buffer, at, 3);
  return { marked: Number(marked), own: Number(own), other: Number(other) };
}
