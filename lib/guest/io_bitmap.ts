// SPDX-License-Identifier: Apache-2.0

const PORTS = 0x1_0000;
/** Bitmaps A (ports 0 to 0x7fff) and B (0x8000 to 0xffff) in adjacent pages. */
const BYTES = 8192;

/** The two pages that say which ports of L2 exit to L1 (SDM vol. 3, 25.6.4). A new one intercepts nothing. */
export class IoBitmap {
  /** Guest-physical address of bitmap A; B is the next page. */
  readonly gpa: number;
  readonly #bytes: Uint8Array;

  constructor(memory: ArrayBuffer, gpa: number) {
    this.gpa = gpa;
    this.#bytes = new Uint8Array(memory, gpa, BYTES);
  }

  /** Makes IN and OUT of `count` ports from `port` on exit, or not. @throws RangeError beyond port 0xffff */
  intercept(port: number, count = 1, on = true): void {
    if (!Number.isSafeInteger(port) || !Number.isSafeInteger(count) || port < 0 || count < 1) {
      throw new RangeError('a port and a count are whole numbers');
    }
    if (port + count > PORTS) throw new RangeError(`there is no port 0x${(port + count - 1).toString(16)}`);
    for (let at = port; at < port + count; at += 1) {
      const mask = 1 << (at & 7);
      this.#bytes[at >> 3] = on ? this.#bytes[at >> 3]! | mask : this.#bytes[at >> 3]! & ~mask;
    }
  }

  /** Whether an access to this port exits. */
  intercepts(port: number): boolean {
    return ((this.#bytes[port >> 3] ?? 0) & (1 << (port & 7))) !== 0;
  }
}
