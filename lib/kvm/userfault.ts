// SPDX-License-Identifier: Apache-2.0
import { checkBytes, checkInteger } from './check.ts';
import { KvmClosedError } from './errors.ts';
import { native, type UserfaultHandle } from './loader.ts';
import { Waiter } from './waiter.ts';

/** Somebody waits for a page. `offset` is the page's, in bytes from the start of the region. */
export interface Fault {
  offset: number;
  write: boolean;
}

/** A userfaultfd over part of a region's memory. Made by `MemoryRegion.watchFaults`. */
export class Userfault implements Disposable {
  readonly #handle: UserfaultHandle;
  readonly #waiter: Waiter;
  readonly #onClose: (closed: Userfault) => void;
  #closed = false;

  /** @internal */
  constructor(make: (onReady: () => void) => UserfaultHandle, onClose: (closed: Userfault) => void) {
    this.#waiter = new Waiter('Userfault');
    this.#handle = make(this.#waiter.callback());
    this.#onClose = onClose;
  }

  get closed(): boolean {
    return this.#closed;
  }

  /** The next fault, without waiting. */
  take(): Fault | undefined {
    const fault = native().userfaultRead(this.#handle);
    return fault && { offset: fault[0], write: fault[1] };
  }

  /** The next fault. @throws KvmClosedError, or the signal's reason. */
  async read(options: { signal?: AbortSignal } = {}): Promise<Fault> {
    for (;;) {
      const fault = this.take();
      if (fault) return fault;
      await this.#waiter.wait(this, () => native().userfaultWait(this.#handle), options.signal);
    }
  }

  /** Faults until it is closed. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Fault, void, undefined> {
    while (!this.#closed) {
      try {
        yield await this.read();
      } catch (error) {
        if (error instanceof KvmClosedError) return;
        throw error;
      }
    }
  }

  /** UFFDIO_COPY: whole pages; wakes who waits for them. @throws KvmError EEXIST when the page is there already. */
  copy(offset: number, bytes: Uint8Array): void {
    native().userfaultCopy(this.#handle, checkInteger('offset', offset, 0), checkBytes('bytes', bytes));
  }

  /** UFFDIO_ZEROPAGE. */
  zero(offset: number, length = 4096): void {
    native().userfaultZero(
      this.#handle,
      checkInteger('offset', offset, 0),
      checkInteger('length', length, 0),
    );
  }

  /** UFFDIO_CONTINUE: maps the page that the memfd already has (minor mode). */
  continue(offset: number, length = 4096): void {
    native().userfaultContinue(
      this.#handle,
      checkInteger('offset', offset, 0),
      checkInteger('length', length, 0),
    );
  }

  /** The kernel answers faults again, those that wait now included. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    native().userfaultClose(this.#handle);
    this.#waiter.close();
    this.#onClose(this);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
