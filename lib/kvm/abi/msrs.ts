// SPDX-License-Identifier: Apache-2.0
import { checkInteger, checkU64 } from '../check.ts';
import { KvmMsrError } from '../errors.ts';

/** KVM refuses 256 or more in one call (E2BIG). */
const BATCH = 255;
const HEADER_SIZE = 8;
const ENTRY_SIZE = 16;

type Call = (bytes: Uint8Array) => number;

function encode(entries: readonly (readonly [number, bigint])[]): DataView<ArrayBuffer> {
  const view = new DataView(new ArrayBuffer(HEADER_SIZE + entries.length * ENTRY_SIZE));
  view.setUint32(0, entries.length, true);
  for (const [position, entry] of entries.entries()) {
    if (!Array.isArray(entry)) throw new TypeError(`entry ${position} must be [MSR, value]`);
    const [index, value] = entry;
    const at = HEADER_SIZE + position * ENTRY_SIZE;
    view.setUint32(at, checkInteger('MSR index', index, 0, 0xffffffff), true);
    view.setBigUint64(at + 8, checkU64(`value of MSR 0x${index.toString(16)}`, value), true);
  }
  return view;
}

function transfer(
  request: 'KVM_GET_MSRS' | 'KVM_SET_MSRS',
  entries: readonly (readonly [number, bigint])[],
  call: Call,
): Map<number, bigint> {
  const values = new Map<number, bigint>();
  for (let start = 0; start < entries.length; start += BATCH) {
    const batch = entries.slice(start, start + BATCH);
    const view = encode(batch);
    const processed = call(new Uint8Array(view.buffer));
    if (processed < batch.length) throw new KvmMsrError(request, batch[processed]![0], start + processed);
    for (const [position, [index]] of batch.entries()) {
      values.set(index, view.getBigUint64(HEADER_SIZE + position * ENTRY_SIZE + 8, true));
    }
  }
  return values;
}

/** `KVM_GET_MSRS`. Throws KvmMsrError at the first MSR the kernel refuses. */
export function getMsrs(indices: Iterable<number>, call: Call): Map<number, bigint> {
  return transfer(
    'KVM_GET_MSRS',
    Array.from(indices, (index) => [index, 0n] as const),
    call,
  );
}

/** `KVM_SET_MSRS`. Those before a refused one are written. */
export function setMsrs(entries: Iterable<readonly [number, bigint]>, call: Call): void {
  transfer('KVM_SET_MSRS', [...entries], call);
}

/** struct kvm_msr_list with room for `count` indices. */
export function msrListBuffer(count: number): Uint8Array<ArrayBuffer> {
  const words = new Uint32Array(1 + count);
  words[0] = count;
  return new Uint8Array(words.buffer);
}

export function decodeMsrList(bytes: Uint8Array<ArrayBuffer>): number[] {
  const words = new Uint32Array(bytes.buffer);
  return [...words.subarray(1, 1 + words[0]!)];
}
