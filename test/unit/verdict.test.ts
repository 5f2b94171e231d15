// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { compare, show } from '../../lib/selftest/engine/verdict.ts';

describe('compare', () => {
  test('equal observations have no mismatch', () => {
    expect(compare({ exits: 8, list: [1, [2]] }, { exits: 8, list: [1, [2]] })).toEqual([]);
  });

  test('one exit more is a mismatch that shows both', () => {
    expect(compare({ exits: 9 }, { exits: 8 })).toEqual([{ name: 'exits', expected: '9', seen: '8' }]);
  });

  test('an expectation nobody observed and an observation nobody expects are mismatches', () => {
    expect(compare({ a: 1 }, { b: 2 })).toEqual([
      { name: 'a', expected: '1', seen: 'nothing' },
      { name: 'b', expected: 'nothing (not in the table)', seen: '2' },
    ]);
  });

  test('null is a value of its own', () => {
    expect(compare({ a: null }, { a: null })).toEqual([]);
    expect(compare({ a: null }, { a: 0 })).toHaveLength(1);
  });

  test('alternatives and ranges take exactly what they name', () => {
    const table = { one: { oneOf: [1, 'two', [3]] }, range: { min: 2, max: 4 } };
    expect(compare(table, { one: [3], range: 2 })).toEqual([]);
    expect(compare(table, { one: 'two', range: 4 })).toEqual([]);
    expect(compare(table, { one: 2, range: 5 }).map((m) => m.name)).toEqual(['one', 'range']);
    expect(compare(table, { one: 1, range: '3' })).toEqual([
      { name: 'range', expected: '2 to 4', seen: '3' },
    ]);
  });

  test('lists differ by order and length', () => {
    expect(compare({ l: [1, 2] }, { l: [2, 1] })).toHaveLength(1);
    expect(compare({ l: [1, 2] }, { l: [1] })).toEqual([{ name: 'l', expected: '[1, 2]', seen: '[1]' }]);
  });
});

test('show prints what a table allows', () => {
  expect(show({ oneOf: [1, null] })).toBe('1 or null');
  expect(show({ min: 0, max: 9 })).toBe('0 to 9');
  expect(show(['a', true])).toBe('[a, true]');
});
