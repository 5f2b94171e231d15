// SPDX-License-Identifier: Apache-2.0
import { type FileHandle, open } from 'node:fs/promises';

const DIRECTORY = 0o40755;
const FILE = 0o100755;
const CONSOLE = 0o20600;
const PAGE = 4096;
/** Written in pieces of this size: small files are many, and each write is a round through Node's threads. */
const PIECE = 1 << 22;

/**
 * Writes an uncompressed initramfs (cpio "newc", kernel documentation: driver-api/early-userspace/buffer-format).
 * Its end is padded to a page, so that archives can lie one behind the other in memory.
 */
export class CpioWriter {
  readonly #out: FileHandle;
  readonly #folders = new Set<string>();
  #size = 0;
  #inode = 1;
  #waiting: Uint8Array[] = [];
  #waitingBytes = 0;

  private constructor(out: FileHandle) {
    this.#out = out;
  }

  static async create(path: string): Promise<CpioWriter> {
    return new CpioWriter(await open(path, 'w'));
  }

  async folder(path: string): Promise<void> {
    const parts = path.split('/').filter(Boolean);
    for (let length = 1; length <= parts.length; length++) {
      const name = parts.slice(0, length).join('/');
      if (this.#folders.has(name)) continue;
      this.#folders.add(name);
      await this.#entry(name, DIRECTORY, Buffer.alloc(0));
    }
  }

  async file(path: string, data: Uint8Array | string): Promise<void> {
    await this.#parentOf(path);
    await this.#entry(path.replace(/^\/+/, ''), FILE, Buffer.from(data));
  }

  /** /dev/console must exist before init can open it. */
  async console(): Promise<void> {
    await this.folder('dev');
    await this.#entry('dev/console', CONSOLE, Buffer.alloc(0), 5, 1);
  }

  async #parentOf(path: string): Promise<void> {
    await this.folder(path.slice(0, path.lastIndexOf('/') + 1));
  }

  async #entry(name: string, mode: number, data: Buffer, major = 0, minor = 0): Promise<void> {
    const nameBytes = Buffer.from(`${name}\0`);
    const numbers = [this.#inode++, mode, 0, 0, 1, 0, data.length, 0, 0, major, minor, nameBytes.length, 0];
    const head = `070701${numbers.map((number) => number.toString(16).padStart(8, '0')).join('')}`;
    await this.#write(Buffer.concat([Buffer.from(head), nameBytes]), 4);
    await this.#write(data, 4);
  }

  async #write(data: Buffer, align: number): Promise<void> {
    const padding = Buffer.alloc((align - ((this.#size + data.length) % align)) % align);
    this.#waiting.push(data, padding);
    this.#waitingBytes += data.length + padding.length;
    this.#size += data.length + padding.length;
    if (this.#waitingBytes >= PIECE) await this.#flush();
  }

  async #flush(): Promise<void> {
    const piece = Buffer.concat(this.#waiting);
    this.#waiting = [];
    this.#waitingBytes = 0;
    for (let done = 0; done < piece.length; ) done += (await this.#out.write(piece, done)).bytesWritten;
  }

  /** @returns bytes written, a multiple of 4096 */
  async end(): Promise<number> {
    await this.#entry('TRAILER!!!', 0, Buffer.alloc(0));
    await this.#write(Buffer.alloc(0), PAGE);
    await this.#flush();
    await this.#out.close();
    return this.#size;
  }

  async abandon(): Promise<void> {
    await this.#out.close().catch(() => undefined);
  }
}
