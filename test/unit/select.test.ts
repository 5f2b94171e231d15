// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { seededRandom } from '../../lib/selftest/engine/random.ts';
import { matchesPattern, select } from '../../lib/selftest/engine/select.ts';
import { decodeEvent, encodeEvent } from '../../lib/selftest/protocol.ts';

test.each([
  ['l2-switch/sched/c=2', 'l2-switch', true],
  ['l2-switch/sched/c=2', 'l2-switch/', true],
  ['l2-switch/sched/c=2', 'l2-switch/sched/c=2', true],
  ['l2-switch/sched/c=20', 'l2-switch/sched/c=2', false],
  ['l2-switch/sched/c=2', 'l2', false],
  ['l2-switch/sched/c=2', 'sched', false],
  ['l2-switch/sched/c=2', '*/c=2', true],
  ['l2-switch/sched/c=2', 'l2-switch/*/c=?', true],
  ['l2-switch/sched/c=12', 'l2-switch/*/c=?', false],
  ['a+b', 'a+*', true],
  ['aab', 'a+*', false],
])('%s against %s: %s', (id, pattern, expected) => {
  expect(matchesPattern(id, pattern)).toBe(expected);
});

test('select keeps the order of the suite, each test once, and takes all without a pattern', () => {
  const tests = [{ id: 'a/1' }, { id: 'b/1' }, { id: 'a/2' }];
  expect(select(tests, ['b', 'a/2', 'a'])).toEqual(tests);
  expect(select(tests, [])).toEqual(tests);
  expect(select(tests, ['c'])).toEqual([]);
});

test('a seed replays: the sequence is fixed for all versions', () => {
  const first = seededRandom(7);
  const again = seededRandom(7);
  const values = [first(), first(), first()];
  expect([again(), again(), again()]).toEqual(values);
  expect(seededRandom(8)()).not.toBe(values[0]);
  expect(values.every((value) => value >= 0 && value < 1)).toBe(true);
});

test('an event survives the line protocol; other lines are not events', () => {
  const event = { event: 'start', id: 'a/ü', iteration: 1 } as const;
  expect(decodeEvent(encodeEvent(event))).toEqual(event);
  expect(decodeEvent('{"event":"end"}')).toBeUndefined();
  expect(decodeEvent('@nvmx {"event":')).toBeUndefined();
});
