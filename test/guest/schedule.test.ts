// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { type Actor, hostActor, InterleavingError, interleave, lockstep } from '../../lib/guest/index.ts';

/** Actors that write down who did what. */
function actors(log: string[], steps: Record<string, number>): Actor[] {
  return Object.entries(steps).map(([name, count]) =>
    hostActor(
      name,
      Array.from({ length: count }, (_, i) => () => log.push(`${name}${i}`)),
    ),
  );
}

test('a seed gives the same order again, another seed another; every actor does all its steps in order', async () => {
  const logs: string[][] = [[], [], []];
  const steps = { a: 5, b: 4, c: 3 };
  const runs = [];
  for (const [i, seed] of [7, 7, 8].entries()) runs.push(await interleave(actors(logs[i]!, steps), { seed }));
  expect(logs[1]).toEqual(logs[0]);
  expect(logs[2]).not.toEqual(logs[0]);
  expect(runs[0]).toEqual({
    seed: 7,
    order: logs[0]!.map((at) => at[0]),
    replay: 'interleave(actors, { seed: 7 })',
  });
  for (const log of logs) {
    for (const [name, count] of Object.entries(steps)) {
      expect(log.filter((at) => at[0] === name)).toEqual(Array.from({ length: count }, (_, i) => name + i));
    }
  }
});

test('an order is followed, and one that cannot be is refused', async () => {
  const log: string[] = [];
  await interleave(actors(log, { a: 2, b: 2 }), { order: ['b', 'a', 'b', 'a'] });
  expect(log).toEqual(['b0', 'a0', 'b1', 'a1']);
  await expect(interleave(actors([], { a: 1 }), { order: ['a', 'a'] })).resolves.toMatchObject({
    order: ['a'],
  });
  await expect(interleave(actors([], { a: 1, b: 1 }), { order: ['a', 'a'] })).rejects.toThrow(
    '"a", step 2 of the order, has no step left',
  );
});

test('a failing step says which it was and how to get there again', async () => {
  const failing = hostActor('x', [
    () => {},
    () => {
      throw new Error('wrong');
    },
  ]);
  const error = await interleave([failing], { seed: 3 }).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(InterleavingError);
  expect((error as Error).message).toBe('wrong\n  in step 2; again with: interleave(actors, { seed: 3 })');
});

test('lockstep: one step of everybody in each turn', async () => {
  const log: string[] = [];
  const turns = await lockstep(actors(log, { a: 3, b: 1 }), (turn) => log.push(`turn ${turn}`));
  expect(turns).toBe(3);
  expect(log).toEqual(['a0', 'b0', 'turn 0', 'a1', 'turn 1', 'a2', 'turn 2']);
});
