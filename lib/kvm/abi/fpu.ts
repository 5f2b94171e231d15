// SPDX-License-Identifier: Apache-2.0
import { checkInteger, checkIterable, checkU64 } from '../check.ts';

/** struct kvm_fpu, as FXSAVE has it, without MXCSR: KVM gives and takes that with XSAVE only. */
export interface Fpu {
  /** ST0 to ST7 (or MM0 to MM7), 16 bytes each. */
  st: Uint8Array[];
  fcw: number;
  fsw: number;
  /** The abridged tag word: one bit per register. */
  ftw: number;
  lastOpcode: number;
  lastIp: bigint;
  lastDp: bigint;
  /** XMM0 to XMM15, 16 bytes each. */
  xmm: Uint8Array[];
}
export const FPU_SIZE = 416;

const XMM_AT = 152;

const viewOf = (bytes: Uint8Array) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
const rows = (bytes: Uint8Array, at: number, count: number) =>
  Array.from({ length: count }, (_, row) => bytes.slice(at + row * 16, at + row * 16 + 16));

export function decodeFpu(bytes: Uint8Array): Fpu {
  const view = viewOf(bytes);
  return {
    st: rows(bytes, 0, 8),
    fcw: view.getUint16(128, true),
    fsw: view.getUint16(130, true),
    ftw: view.getUint8(132),
    lastOpcode: view.getUint16(134, true),
    lastIp: view.getBigUint64(136, true),
    lastDp: view.getBigUint64(144, true),
    xmm: rows(bytes, XMM_AT, 16),
  };
}

function patchRows(bytes: Uint8Array, at: number, name: string, given: Uint8Array[], count: number): void {
  const list = checkIterable(name, given);
  if (list.length !== count) throw new RangeError(`${name} has exactly ${count} registers`);
  for (const [row, value] of list.entries()) {
    if (!(value instanceof Uint8Array)) throw new TypeError(`${name}[${row}] must be a Uint8Array`);
    if (value.length !== 16) throw new RangeError(`${name}[${row}] has exactly 16 bytes`);
    bytes.set(value, at + row * 16);
  }
}

export function patchFpu(bytes: Uint8Array, patch: Partial<Fpu>): void {
  const view = viewOf(bytes);
  if (patch.st) patchRows(bytes, 0, 'st', patch.st, 8);
  if (patch.fcw !== undefined) view.setUint16(128, checkInteger('fcw', patch.fcw, 0, 0xffff), true);
  if (patch.fsw !== undefined) view.setUint16(130, checkInteger('fsw', patch.fsw, 0, 0xffff), true);
  if (patch.ftw !== undefined) view.setUint8(132, checkInteger('ftw', patch.ftw, 0, 0xff));
  if (patch.lastOpcode !== undefined) {
    view.setUint16(134, checkInteger('lastOpcode', patch.lastOpcode, 0, 0xffff), true);
  }
  if (patch.lastIp !== undefined) view.setBigUint64(136, checkU64('lastIp', patch.lastIp), true);
  if (patch.lastDp !== undefined) view.setBigUint64(144, checkU64('lastDp', patch.lastDp), true);
  if (patch.xmm) patchRows(bytes, XMM_AT, 'xmm', patch.xmm, 16);
}

export const XCRS_SIZE = 392;

/** struct kvm_xcrs: number to value (XCR0 is 0). */
export function decodeXcrs(bytes: Uint8Array): Map<number, bigint> {
  const view = viewOf(bytes);
  const count = Math.min(view.getUint32(0, true), 16);
  return new Map(
    Array.from({ length: count }, (_, index) => {
      const at = 8 + index * 16;
      return [view.getUint32(at, true), view.getBigUint64(at + 8, true)] as const;
    }),
  );
}

export function encodeXcrs(values: Iterable<readonly [number, bigint]>): Uint8Array {
  const bytes = new Uint8Array(XCRS_SIZE);
  const view = viewOf(bytes);
  const list = checkIterable('xcrs', values);
  if (list.length > 16) throw new RangeError('there are at most 16 XCRs');
  view.setUint32(0, list.length, true);
  for (const [index, entry] of list.entries()) {
    if (!Array.isArray(entry)) throw new TypeError(`xcrs[${index}] must be [number, value]`);
    view.setUint32(8 + index * 16, checkInteger(`number of xcrs[${index}]`, entry[0], 0, 0xffffffff), true);
    view.setBigUint64(16 + index * 16, checkU64(`xcrs[${index}]`, entry[1]), true);
  }
  return bytes;
}
