// SPDX-License-Identifier: Apache-2.0

/** Interruption types, SDM vol. 3, 25.8.3 and 25.9.2. */
const TYPES = {
  'external-interrupt': 0,
  nmi: 2,
  'hardware-exception': 3,
  'software-interrupt': 4,
  'privileged-software-exception': 5,
  'software-exception': 6,
  'other-event': 7,
} as const;
const NAMES: ReadonlyMap<number, EventType> = new Map(
  Object.entries(TYPES).map(([name, type]) => [type, name as EventType]),
);
const VALID = 0x8000_0000;
const DELIVER_ERROR_CODE = 1 << 11;
const NMI_UNBLOCKING = 1 << 12;

export type EventType = keyof typeof TYPES;

/** An event for VM entry to deliver. */
export interface InjectedEvent {
  readonly type: EventType;
  readonly vector: number;
  /** Delivered with the event when given. */
  readonly errorCode?: number;
  /** Bytes of the instruction: for software interrupts and exceptions, which return behind it. */
  readonly length?: number;
}

/** The VM-entry interruption-information field, error code and instruction length for an event. */
export function encodeEvent(event: InjectedEvent): { info: number; errorCode: number; length: number } {
  const type = TYPES[event.type];
  if (type === undefined) throw new TypeError(`"${event.type}" is not a type of event`);
  if (!Number.isSafeInteger(event.vector) || event.vector < 0 || event.vector > 255) {
    throw new RangeError(`a vector is between 0 and 255, not ${event.vector}`);
  }
  const withError = event.errorCode === undefined ? 0 : DELIVER_ERROR_CODE;
  return {
    info: (VALID | withError | (type << 8) | event.vector) >>> 0,
    errorCode: event.errorCode ?? 0,
    length: event.length ?? 0,
  };
}

/** An event that caused a VM exit, or was being delivered when one happened. */
export interface VectoredEvent {
  readonly type: EventType | 'reserved';
  readonly vector: number;
  readonly errorCode: number | undefined;
  /** NMI unblocking due to IRET (SDM vol. 3, 28.2.3). */
  readonly nmiUnblocking: boolean;
}

/** Decodes interruption information; undefined when its valid bit is 0. */
export function decodeEvent(info: number, errorCode: number): VectoredEvent | undefined {
  if (info >>> 31 === 0) return undefined;
  return {
    type: NAMES.get((info >> 8) & 7) ?? 'reserved',
    vector: info & 0xff,
    errorCode: info & DELIVER_ERROR_CODE ? errorCode : undefined,
    nmiUnblocking: (info & NMI_UNBLOCKING) !== 0,
  };
}
