// SPDX-License-Identifier: Apache-2.0
import { KvmClosedError } from './errors.ts';

interface Waiting {
  resolve(): void;
  reject(reason: unknown): void;
}

/** Keeps whoever waits from being collected. */
const held = new Set<Waiter>();

/** Promises for "the descriptor can be read", over the addon's one callback per handle. */
export class Waiter {
  readonly #what: string;
  #waiting: Waiting[] = [];
  #owner: object | undefined;

  constructor(what: string) {
    this.#what = what;
  }

  /** A callback for the addon that holds this object weakly: the addon keeps it as long as the handle lives. */
  callback(): () => void {
    const weak = new WeakRef<Waiter>(this);
    return () => weak.deref()?.settle((waiting) => waiting.resolve());
  }

  /** `arm` asks the addon for one report; `owner` is kept alive until it comes. */
  wait(owner: object, arm: () => void, signal?: AbortSignal): Promise<void> {
    if (signal?.aborted) return Promise.reject(signal.reason);
    return new Promise((resolve, reject) => {
      arm();
      this.#owner = owner;
      held.add(this);
      const onAbort = () => {
        this.#waiting = this.#waiting.filter((one) => one !== waiting);
        reject(signal?.reason);
      };
      const waiting: Waiting = {
        resolve: () => {
          signal?.removeEventListener('abort', onAbort);
          resolve();
        },
        reject: (reason) => {
          signal?.removeEventListener('abort', onAbort);
          reject(reason);
        },
      };
      signal?.addEventListener('abort', onAbort, { once: true });
      this.#waiting.push(waiting);
    });
  }

  close(): void {
    this.settle((waiting) => waiting.reject(new KvmClosedError(this.#what)));
  }

  settle(end: (waiting: Waiting) => void): void {
    const all = this.#waiting;
    this.#waiting = [];
    this.#owner = undefined;
    held.delete(this);
    for (const waiting of all) end(waiting);
  }

  /** @internal What is kept alive now. */
  get owner(): object | undefined {
    return this.#owner;
  }
}
