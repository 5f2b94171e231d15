// SPDX-License-Identifier: Apache-2.0
import { checkFlag, checkInteger, checkName, checkObject, checkU64 } from '../check.ts';

/** struct kvm_debugregs. */
export interface DebugRegs {
  /** DR0 to DR3. */
  db: bigint[];
  dr6: bigint;
  dr7: bigint;
  flags: bigint;
}
export const DEBUGREGS_SIZE = 128;

export function decodeDebugRegs(bytes: Uint8Array<ArrayBuffer>): DebugRegs {
  const words = new BigUint64Array(bytes.buffer, bytes.byteOffset, 7);
  return { db: [...words.subarray(0, 4)], dr6: words[4]!, dr7: words[5]!, flags: words[6]! };
}

export function patchDebugRegs(bytes: Uint8Array<ArrayBuffer>, patch: Partial<DebugRegs>): void {
  checkObject('debug registers', patch);
  const words = new BigUint64Array(bytes.buffer, bytes.byteOffset, 7);
  if (patch.db !== undefined) {
    if (!Array.isArray(patch.db) || patch.db.length !== 4) throw new RangeError('db has exactly 4 addresses');
    for (const [index, address] of patch.db.entries()) words[index] = checkU64(`db[${index}]`, address);
  }
  if (patch.dr6 !== undefined) words[4] = checkU64('dr6', patch.dr6);
  if (patch.dr7 !== undefined) words[5] = checkU64('dr7', patch.dr7);
  if (patch.flags !== undefined) words[6] = checkU64('flags', patch.flags);
}

/** A hardware breakpoint of the host's: the guest does not see it. */
export interface Breakpoint {
  /** Linear. */
  address: bigint;
  /** Default 'execute'. */
  on?: 'execute' | 'write' | 'access';
  /** Bytes watched; 1 for 'execute'. */
  length?: 1 | 2 | 4 | 8;
}

/** What makes KVM_RUN give a `debug` exit. Nothing: guest debugging is off. */
export interface GuestDebug {
  singleStep?: boolean;
  /** INT3 in the guest. */
  softwareBreakpoints?: boolean;
  /** At most four. */
  breakpoints?: readonly Breakpoint[];
  /** With {@link singleStep}: no interrupts are delivered between steps (KVM_GUESTDBG_BLOCKIRQ). */
  blockInterrupts?: boolean;
}

const ENABLE = 1;
const SINGLE_STEP = 2;
const USE_SW_BP = 0x10000;
const USE_HW_BP = 0x20000;
const BLOCK_IRQ = 0x100000;
// DR7's fields, SDM volume 3, "Debug Control Register (DR7)".
const CONDITIONS = ['execute', 'write', 'access'] as const;
const CONDITION_BITS = [0n, 1n, 3n] as const;
const LENGTH_BITS = new Map([
  [1, 0n],
  [2, 1n],
  [4, 3n],
  [8, 2n],
]);

/** struct kvm_guest_debug. */
export function encodeGuestDebug(debug: GuestDebug): Uint8Array {
  checkObject('debug', debug);
  const view = new DataView(new ArrayBuffer(72));
  const breakpoints = debug.breakpoints ?? [];
  if (!Array.isArray(breakpoints)) throw new TypeError('breakpoints must be an array');
  if (breakpoints.length > 4) throw new RangeError('the CPU has four breakpoint registers');
  let control =
    (checkFlag('singleStep', debug.singleStep) ? SINGLE_STEP : 0) |
    (checkFlag('softwareBreakpoints', debug.softwareBreakpoints) ? USE_SW_BP : 0) |
    (checkFlag('blockInterrupts', debug.blockInterrupts) ? BLOCK_IRQ : 0) |
    (breakpoints.length > 0 ? USE_HW_BP : 0);
  if (control !== 0) control |= ENABLE;
  view.setUint32(0, control, true);
  let dr7 = breakpoints.length > 0 ? 0x400n : 0n;
  for (const [index, breakpoint] of breakpoints.entries()) {
    const name = `breakpoints[${index}]`;
    checkObject(name, breakpoint);
    const condition = CONDITION_BITS[checkName(`${name}.on`, breakpoint.on ?? 'execute', CONDITIONS)]!;
    const length = LENGTH_BITS.get(checkInteger(`${name}.length`, breakpoint.length ?? 1, 1, 8));
    if (length === undefined) throw new RangeError(`${name}.length must be 1, 2, 4 or 8`);
    view.setBigUint64(8 + index * 8, checkU64(`${name}.address`, breakpoint.address), true);
    dr7 |= (2n << BigInt(index * 2)) | ((condition | (length << 2n)) << BigInt(16 + index * 4));
  }
  view.setBigUint64(8 + 7 * 8, dr7, true);
  return new Uint8Array(view.buffer);
}
