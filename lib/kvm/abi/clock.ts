// SPDX-License-Identifier: Apache-2.0
import { checkObject, checkU64 } from '../check.ts';

/** struct kvm_clock_data: the paravirtual clock of a VM. */
export interface Clock {
  /** Nanoseconds. */
  clock: bigint;
  /** CLOCK_REALTIME in nanoseconds at the same moment, where the kernel gives it (KVM_CLOCK_REALTIME). */
  realtime?: bigint;
  /** The host's TSC at the same moment, where the kernel gives it (KVM_CLOCK_HOST_TSC). */
  hostTsc?: bigint;
  /** All vCPUs read the same clock (KVM_CLOCK_TSC_STABLE); only given, never taken. */
  stable?: boolean;
}

export const CLOCK_SIZE = 48;
const TSC_STABLE = 2;
const REALTIME = 4;
const HOST_TSC = 8;

export function decodeClock(bytes: Uint8Array<ArrayBuffer>): Clock {
  const view = new DataView(bytes.buffer);
  const flags = view.getUint32(8, true);
  return {
    clock: view.getBigUint64(0, true),
    ...(flags & REALTIME ? { realtime: view.getBigUint64(16, true) } : {}),
    ...(flags & HOST_TSC ? { hostTsc: view.getBigUint64(24, true) } : {}),
    stable: (flags & TSC_STABLE) !== 0,
  };
}

/** With `realtime` the kernel adds the time that has passed since. */
export function encodeClock(clock: Clock): Uint8Array {
  checkObject('clock', clock);
  const view = new DataView(new ArrayBuffer(CLOCK_SIZE));
  view.setBigUint64(0, checkU64('clock', clock.clock), true);
  if (clock.realtime !== undefined) {
    view.setUint32(8, REALTIME, true);
    view.setBigUint64(16, checkU64('realtime', clock.realtime), true);
  }
  return new Uint8Array(view.buffer);
}
