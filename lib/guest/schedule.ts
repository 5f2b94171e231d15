// SPDX-License-Identifier: Apache-2.0
// Who runs next, decided by the host: every actor stops after each step, so that an interleaving can be repeated.
import type { L2 } from './l2.ts';
import type { EnterOptions, L2Stop } from './l2_enter.ts';

/** Somebody who does one thing at a time. */
export interface Actor {
  readonly name: string;
  /** Does one step; resolves with false when it was the last. */
  step(): Promise<boolean>;
}

export interface L2ActorOptions extends EnterOptions {
  /** Called with each stop, before the step ends; L2 is active at a `sync`. */
  onStop?: (stop: L2Stop) => unknown;
  /** Whether this stop is the last. Default: L2's program is done. */
  isLast?: (stop: L2Stop) => boolean;
}

/**
 * An L2 as an actor: a step runs it to its next stop. A `kvm-exit` is an error unless `onStop` is there for it. L2s
 * that share an L1 vCPU must not stop by `sync`: the vCPU stays theirs until the enter has ended.
 */
export function l2Actor(name: string, l2: L2, options: L2ActorOptions = {}): Actor {
  const { onStop, isLast = () => l2.progress.done, ...enter } = options;
  const run = enter.signal ? { signal: enter.signal } : {};
  return {
    name,
    async step() {
      const stop = l2.entered ? await l2.continue(run) : await l2.enter(enter);
      if (stop.kind === 'kvm-exit' && !onStop) {
        throw new Error(`${name}: KVM_RUN returned "${stop.exit.type}", and there is no onStop to take it`);
      }
      await onStop?.(stop);
      return !isLast(stop);
    },
  };
}

/** The host as an actor: each step is the next of these. */
export function hostActor(name: string, actions: readonly (() => unknown)[]): Actor {
  let next = 0;
  return {
    name,
    async step() {
      await actions[next]?.();
      next += 1;
      return next < actions.length;
    },
  };
}

/**
 * Enters an L2 and runs it to the end of the enter; `act` is called at each sync, with L2 active.
 * @returns the stop that was no sync
 */
export async function atEachSync(
  l2: L2,
  act: (value: number) => unknown,
  options: EnterOptions = {},
): Promise<Exclude<L2Stop, { kind: 'sync' }>> {
  let stop = await l2.enter(options);
  while (stop.kind === 'sync') {
    await act(stop.value);
    stop = await l2.continue(options.signal ? { signal: options.signal } : {});
  }
  return stop;
}

/**
 * Turns: in each, every actor that has steps left does one, all at the same time; then `between` is called. L2s of
 * different L1 vCPUs really run beside each other within a turn.
 * @returns the number of turns
 */
export async function lockstep(
  actors: readonly Actor[],
  between?: (turn: number) => unknown,
): Promise<number> {
  let live = [...actors];
  let turn = 0;
  while (live.length > 0) {
    const more = await Promise.all(live.map((actor) => actor.step()));
    live = live.filter((_, i) => more[i]);
    await between?.(turn);
    turn += 1;
  }
  return turn;
}

export interface InterleaveOptions {
  /** Of the random order, 0 to 2^32-1; default random. */
  seed?: number;
  /** An order to follow instead: actors' names, as in a replay line. */
  order?: readonly string[];
  signal?: AbortSignal;
}

/** The names of the actors in the order of their steps. */
export interface Interleaving {
  readonly seed: number | undefined;
  readonly order: readonly string[];
  /** Options for {@link interleave} that do the same again, as text. */
  readonly replay: string;
}

/** A step failed; the message ends with the line that does it again. */
export class InterleavingError extends Error {
  readonly interleaving: Interleaving;

  constructor(cause: unknown, interleaving: Interleaving) {
    const what = cause instanceof Error ? cause.message : String(cause);
    super(`${what}\n  in step ${interleaving.order.length}; again with: ${interleaving.replay}`, { cause });
    this.name = 'InterleavingError';
    this.interleaving = interleaving;
  }
}

/**
 * One step at a time, of an actor chosen at random (by the seed) among those with steps left, until none has any.
 * @throws InterleavingError when a step does
 */
export async function interleave(
  actors: readonly Actor[],
  options: InterleaveOptions = {},
): Promise<Interleaving> {
  const { seed = Math.floor(Math.random() * 2 ** 32), order, signal } = options;
  const random = generator(seed);
  const live = [...actors];
  const taken: string[] = [];
  const result = (): Interleaving => ({
    seed: order ? undefined : seed,
    order: [...taken],
    replay: order
      ? `interleave(actors, { order: ${JSON.stringify(taken)} })`
      : `interleave(actors, { seed: ${seed} })`,
  });
  while (live.length > 0) {
    signal?.throwIfAborted();
    const wanted = order?.[taken.length];
    if (order && wanted === undefined) break;
    const index = order ? live.findIndex(({ name }) => name === wanted) : Math.floor(random() * live.length);
    const actor = live[index];
    if (!actor) throw new RangeError(`"${wanted}", step ${taken.length + 1} of the order, has no step left`);
    taken.push(actor.name);
    let more: boolean;
    try {
      more = await actor.step();
    } catch (error) {
      throw new InterleavingError(error, result());
    }
    if (!more) live.splice(index, 1);
  }
  return result();
}

/** Mulberry32: 32 bits of state are enough for orders, and a seed stays short. */
function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b_79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
