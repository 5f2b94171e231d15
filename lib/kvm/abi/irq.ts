// SPDX-License-Identifier: Apache-2.0
import { checkInteger, checkIterable, checkName, checkObject, checkU64 } from '../check.ts';

/** One entry of the GSI routing table: where a global system interrupt goes. */
export type GsiRoute =
  | { type: 'irqchip'; gsi: number; chip: IrqChip; pin: number }
  | { type: 'msi'; gsi: number; address: bigint; data: number };

/** The in-kernel interrupt controllers other than the LAPICs. */
export type IrqChip = 'pic-master' | 'pic-slave' | 'ioapic';
export const IRQ_CHIPS = ['pic-master', 'pic-slave', 'ioapic'] as const;

const TYPES = ['irqchip', 'msi'] as const;
const HEADER_SIZE = 8;
const ENTRY_SIZE = 48;
const U32 = 0xffffffff;

/** struct kvm_irq_routing. */
export function encodeRouting(routes: Iterable<GsiRoute>): Uint8Array {
  const list = checkIterable('routes', routes);
  const view = new DataView(new ArrayBuffer(HEADER_SIZE + list.length * ENTRY_SIZE));
  view.setUint32(0, list.length, true);
  for (const [index, route] of list.entries()) {
    const name = `routes[${index}]`;
    const at = HEADER_SIZE + index * ENTRY_SIZE;
    const type = checkName(`${name}.type`, checkObject(name, route).type, TYPES);
    view.setUint32(at, checkInteger(`${name}.gsi`, route.gsi, 0, U32), true);
    view.setUint32(at + 4, type + 1, true);
    if (route.type === 'irqchip') {
      view.setUint32(at + 16, checkName(`${name}.chip`, route.chip, IRQ_CHIPS), true);
      view.setUint32(at + 20, checkInteger(`${name}.pin`, route.pin, 0, U32), true);
    } else {
      view.setBigUint64(at + 16, checkU64(`${name}.address`, route.address), true);
      view.setUint32(at + 24, checkInteger(`${name}.data`, route.data, 0, U32), true);
    }
  }
  return new Uint8Array(view.buffer);
}

const IRQFD_DEASSIGN = 1;
const IRQFD_RESAMPLE = 2;

/** struct kvm_irqfd. */
export function encodeIrqfd(
  fd: number,
  gsi: number,
  remove: boolean,
  resample: number | undefined,
): Uint8Array {
  const words = new Uint32Array(8);
  words[0] = fd;
  words[1] = checkInteger('gsi', gsi, 0, U32);
  words[2] = (remove ? IRQFD_DEASSIGN : 0) | (resample === undefined ? 0 : IRQFD_RESAMPLE);
  words[3] = resample ?? 0;
  return new Uint8Array(words.buffer);
}

/** A guest write that signals an eventfd instead of leaving KVM_RUN. */
export interface IoEvent {
  /** An I/O port, or a guest-physical address: one of them. */
  port?: number;
  address?: number;
  /** Bytes of the write; 0 (default): any. */
  length?: 0 | 1 | 2 | 4 | 8;
  /** Only writes of this value; needs a length. */
  match?: bigint;
}

const IOEVENTFD_DATAMATCH = 1;
const IOEVENTFD_PIO = 2;
const IOEVENTFD_DEASSIGN = 4;

/** struct kvm_ioeventfd. */
export function encodeIoeventfd(fd: number, event: IoEvent, remove: boolean): Uint8Array {
  const { port, address, match } = checkObject('event', event);
  if ((port === undefined) === (address === undefined)) {
    throw new TypeError('an ioeventfd has either a port or an address');
  }
  const view = new DataView(new ArrayBuffer(64));
  if (match !== undefined) view.setBigUint64(0, checkU64('match', match), true);
  const where =
    port === undefined ? checkInteger('address', address, 0) : checkInteger('port', port, 0, 0xffff);
  view.setBigUint64(8, BigInt(where), true);
  view.setUint32(16, checkInteger('length', event.length ?? 0, 0, 8), true);
  view.setInt32(20, fd, true);
  const flags =
    (match === undefined ? 0 : IOEVENTFD_DATAMATCH) |
    (port === undefined ? 0 : IOEVENTFD_PIO) |
    (remove ? IOEVENTFD_DEASSIGN : 0);
  view.setUint32(24, flags, true);
  return new Uint8Array(view.buffer);
}
