// SPDX-License-Identifier: Apache-2.0
import { setFlagsFromString } from 'node:v8';

/**
 * What the emulator would spend two thirds of its time on: optimizing what runs for a second at most, dropping code
 * that the next test compiles again, and collecting. V8 would begin with a young generation of half a megabyte; with
 * one of 16 it would mark all the time, because it begins when the old generation has less room left than the young
 * one is large; and what it leaves of an old generation of 10 MB is full after a few tests.
 */
const V8_FLAGS = [
  '--interrupt-budget=1000000',
  '--no-flush-bytecode',
  '--semi-space-growth-factor=16',
  '--no-incremental-marking',
  '--heap-growing-percent=1000',
];

/** When all is loaded, because V8 takes no compiled code after that. */
export function spareWork(): void {
  for (const flag of V8_FLAGS) setFlagsFromString(flag);
}
