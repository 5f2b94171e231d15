// SPDX-License-Identifier: Apache-2.0
import { checkInteger, checkObject, checkU64 } from '../check.ts';

/** struct kvm_vcpu_events. Flags, interrupts and exceptions are 0/1 unless they are vectors or codes. */
export interface VcpuEvents {
  exception: { injected: number; nr: number; hasErrorCode: number; pending: number; errorCode: number };
  interrupt: { injected: number; nr: number; soft: number; shadow: number };
  nmi: { injected: number; pending: number; masked: number };
  sipiVector: number;
  /** `KVM_VCPUEVENT_VALID_*`: which optional parts the kernel gave or shall take. */
  flags: number;
  smi: { smm: number; pending: number; smmInsideNmi: number; latchedInit: number };
  tripleFault: { pending: number };
  exceptionHasPayload: number;
  exceptionPayload: bigint;
}

/** `KVM_VCPUEVENT_VALID_*`. */
export const VCPUEVENT_VALID = {
  nmiPending: 1,
  sipiVector: 2,
  shadow: 4,
  smm: 8,
  payload: 16,
  tripleFault: 32,
} as const;

export const EVENTS_SIZE = 64;

type Field = readonly [path: readonly [string] | readonly [string, string], offset: number, size: 1 | 4 | 8];

const FIELDS: readonly Field[] = [
  [['exception', 'injected'], 0, 1],
  [['exception', 'nr'], 1, 1],
  [['exception', 'hasErrorCode'], 2, 1],
  [['exception', 'pending'], 3, 1],
  [['exception', 'errorCode'], 4, 4],
  [['interrupt', 'injected'], 8, 1],
  [['interrupt', 'nr'], 9, 1],
  [['interrupt', 'soft'], 10, 1],
  [['interrupt', 'shadow'], 11, 1],
  [['nmi', 'injected'], 12, 1],
  [['nmi', 'pending'], 13, 1],
  [['nmi', 'masked'], 14, 1],
  [['sipiVector'], 16, 4],
  [['flags'], 20, 4],
  [['smi', 'smm'], 24, 1],
  [['smi', 'pending'], 25, 1],
  [['smi', 'smmInsideNmi'], 26, 1],
  [['smi', 'latchedInit'], 27, 1],
  [['tripleFault', 'pending'], 28, 1],
  [['exceptionHasPayload'], 55, 1],
  [['exceptionPayload'], 56, 8],
];

type Tree = { [name: string]: number | bigint | Tree };

export function decodeEvents(bytes: Uint8Array): VcpuEvents {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const tree: Tree = {};
  for (const [[outer, inner], offset, size] of FIELDS) {
    const value =
      size === 8
        ? view.getBigUint64(offset, true)
        : size === 4
          ? view.getUint32(offset, true)
          : view.getUint8(offset);
    if (inner === undefined) {
      tree[outer] = value;
      continue;
    }
    tree[outer] ??= {};
    (tree[outer] as Tree)[inner] = value;
  }
  return tree as unknown as VcpuEvents;
}

/** Each group may be given in part. */
export type VcpuEventsPatch = {
  [Name in keyof VcpuEvents]?: VcpuEvents[Name] extends object ? Partial<VcpuEvents[Name]> : VcpuEvents[Name];
};

/** Writes the given fields over those in `bytes`. */
export function patchEvents(bytes: Uint8Array, patch: VcpuEventsPatch): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const tree = patch as Tree;
  for (const [[outer, inner], offset, size] of FIELDS) {
    const given = tree[outer];
    if (given === undefined) continue;
    const value = inner === undefined ? given : checkObject(outer, given as Tree)[inner];
    if (value === undefined) continue;
    const name = inner === undefined ? outer : `${outer}.${inner}`;
    if (size === 8) view.setBigUint64(offset, checkU64(name, value), true);
    else if (size === 4) view.setUint32(offset, checkInteger(name, value, 0, 0xffffffff), true);
    else view.setUint8(offset, checkInteger(name, value, 0, 0xff));
  }
}
