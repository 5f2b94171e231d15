// SPDX-License-Identifier: Apache-2.0
import type { Fingerprint, KernelKind } from '../../probe/index.ts';
import type {
  ExpectationName,
  Expectations,
  ExpectationTable,
  Expected,
  Observations,
  Observed,
} from './model.ts';

/** One observation that is not what the table says. */
export interface Mismatch {
  readonly name: string;
  readonly expected: string;
  readonly seen: string;
}

/** The table to judge by: the one asked for, or with `auto` that of the kernel with this fingerprint. */
export function expectationFor(
  expectations: Expectations,
  expect: KernelKind | 'auto',
  { changes }: Fingerprint,
): { name: ExpectationName; table: ExpectationTable } {
  if ('any' in expectations) return { name: 'any', table: expectations.any };
  const kind = expect === 'auto' ? changes[expectations.change] : expect;
  return { name: kind, table: expectations[kind] };
}

/**
 * Compares what was seen with a table. Every name in the table must have been observed and every observation
 * must be in the table: an oracle nobody compares with is a defect.
 */
export function compare(table: ExpectationTable, observed: Observations): Mismatch[] {
  const names = new Set([...Object.keys(table), ...Object.keys(observed)]);
  const mismatches: Mismatch[] = [];
  for (const name of names) {
    const expected = table[name];
    const seen = observed[name];
    if (expected === undefined || seen === undefined) {
      mismatches.push({
        name,
        expected: expected === undefined ? 'nothing (not in the table)' : show(expected),
        seen: seen === undefined ? 'nothing' : show(seen),
      });
    } else if (!matches(expected, seen)) {
      mismatches.push({ name, expected: show(expected), seen: show(seen) });
    }
  }
  return mismatches;
}

function matches(expected: Expected, seen: Observed): boolean {
  if (typeof expected === 'object' && expected !== null && !Array.isArray(expected)) {
    if ('oneOf' in expected) return expected.oneOf.some((one) => equal(one, seen));
    if ('min' in expected) return typeof seen === 'number' && seen >= expected.min && seen <= expected.max;
  }
  return equal(expected as Observed, seen);
}

function equal(a: Observed, b: Observed): boolean {
  if (Array.isArray(a) && Array.isArray(b)) return a.length === b.length && a.every((x, i) => equal(x, b[i]));
  return a === b;
}

export function show(value: Expected): string {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
    if ('oneOf' in value) return value.oneOf.map(show).join(' or ');
    if ('min' in value) return `${value.min} to ${value.max}`;
  }
  return Array.isArray(value) ? `[${value.map(show).join(', ')}]` : String(value);
}
