// SPDX-License-Identifier: Apache-2.0
import { checkFlag, checkU64 } from './check.ts';
import { KvmClosedError } from './errors.ts';
import { type EventHandle, native } from './loader.ts';
import { Waiter } from './waiter.ts';

/** An eventfd: KVM_IRQFD's input, KVM_IOEVENTFD's output. Close it yourself; closing a VM leaves it open. */
export class EventFd implements Disposable {
  readonly #handle: EventHandle;
  readonly #waiter = new Waiter('EventFd');
  #closed = false;

  /** With `semaphore`, {@link take} gives 1n for each signal instead of their sum. */
  constructor(options: { semaphore?: boolean } = {}) {
    this.#handle = native().eventCreate(checkFlag('semaphore', options.semaphore), this.#waiter.callback());
  }

  /** The descriptor's number, for as long as it is open. @throws KvmClosedError */
  get fd(): number {
    if (this.#closed) throw new KvmClosedError('EventFd');
    return native().eventFd(this.#handle);
  }

  get closed(): boolean {
    return this.#closed;
  }

  /** Adds to the counter. @throws KvmError EAGAIN when it would pass 2^64 − 2, EINVAL for 2^64 − 1. */
  signal(value = 1n): void {
    native().eventSignal(this.#handle, checkU64('value', value));
  }

  /** Takes the counter and sets it to 0; undefined when it is 0. Never waits. */
  take(): bigint | undefined {
    return native().eventTake(this.#handle);
  }

  /** Waits until the counter is not 0 and takes it. @throws KvmClosedError, or the signal's reason. */
  async read(options: { signal?: AbortSignal } = {}): Promise<bigint> {
    for (;;) {
      const value = this.take();
      if (value !== undefined) return value;
      await this.#waiter.wait(this, () => native().eventWait(this.#handle), options.signal);
    }
  }

  /** Idempotent; a read that waits rejects. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    native().eventClose(this.#handle);
    this.#waiter.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
