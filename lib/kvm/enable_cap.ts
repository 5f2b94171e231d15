// SPDX-License-Identifier: Apache-2.0
import { type CapabilityName, capabilityNumber } from './capabilities.ts';
import { checkInteger, checkIterable, checkObject, checkU64 } from './check.ts';

/** struct kvm_enable_cap: `flags` and `args` as the capability's documentation says. */
export interface EnableCapOptions {
  flags?: number;
  args?: readonly bigint[];
}

export function encodeEnableCap(capability: CapabilityName | number, options: EnableCapOptions): Uint8Array {
  checkObject('options', options);
  const view = new DataView(new ArrayBuffer(104));
  view.setUint32(0, capabilityNumber(capability), true);
  view.setUint32(4, checkInteger('flags', options.flags ?? 0, 0, 0xffffffff), true);
  const args = checkIterable('args', options.args ?? []);
  if (args.length > 4) throw new RangeError('a capability takes at most 4 arguments');
  for (const [index, value] of args.entries())
    view.setBigUint64(8 + index * 8, checkU64(`args[${index}]`, value), true);
  return new Uint8Array(view.buffer);
}
