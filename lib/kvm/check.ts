// SPDX-License-Identifier: Apache-2.0

/** Throws TypeError unless `value` is a number, RangeError unless it is an integer from `low` to `high`. */
export function checkInteger(
  name: string,
  value: unknown,
  low: number,
  high = Number.MAX_SAFE_INTEGER,
): number {
  if (typeof value !== 'number') throw new TypeError(`${name} must be a number, not ${describeType(value)}`);
  if (!Number.isSafeInteger(value) || value < low || value > high) {
    throw new RangeError(`${name} must be an integer from ${low} to ${high}, not ${value}`);
  }
  return value;
}

/**
 * The same of a field of something, from 0 on. Its name, which costs more than all the rest, is made for the error only.
 * @param index which of several
 */
export function checkField(
  owner: string,
  field: string,
  value: number,
  high: number,
  index?: number,
): number {
  if (Number.isInteger(value) && value >= 0 && value <= high) return value;
  return checkInteger(`${owner}${index === undefined ? '' : ` ${index}`}.${field}`, value, 0, high);
}

/** Throws TypeError unless `value` is a bigint, RangeError unless it fits 64 bits unsigned. */
export function checkU64(name: string, value: unknown): bigint {
  if (typeof value !== 'bigint') throw new TypeError(`${name} must be a bigint, not ${describeType(value)}`);
  if (value < 0n || value > 0xffff_ffff_ffff_ffffn) {
    throw new RangeError(`${name} must fit 64 unsigned bits, not ${value}`);
  }
  return value;
}

/** Throws TypeError unless `value` is a Uint8Array. */
export function checkBytes(name: string, value: unknown): Uint8Array {
  if (!(value instanceof Uint8Array))
    throw new TypeError(`${name} must be a Uint8Array, not ${describeType(value)}`);
  return value;
}

/** Throws TypeError unless `value` is an object (and no array). */
export function checkObject<T extends object>(name: string, value: T): T {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new TypeError(`${name} must be an object, not ${describeType(value)}`);
  }
  return value;
}

/** Throws TypeError unless `value` is one of `names`; gives its position. */
export function checkName(name: string, value: unknown, names: readonly string[]): number {
  const index = typeof value === 'string' ? names.indexOf(value) : -1;
  if (index < 0) {
    const shown = typeof value === 'string' ? `'${value}'` : describeType(value);
    throw new TypeError(`${name} must be one of ${names.join(', ')}, not ${shown}`);
  }
  return index;
}

/** Throws TypeError unless `value` is iterable; gives its elements. */
export function checkIterable<T>(name: string, value: Iterable<T>): T[] {
  if (typeof (value as { [Symbol.iterator]?: unknown } | null)?.[Symbol.iterator] !== 'function') {
    throw new TypeError(`${name} must be iterable, not ${describeType(value)}`);
  }
  return [...value];
}

/** Throws TypeError unless `value` is undefined, true or false. */
export function checkFlag(name: string, value: unknown): boolean {
  if (value !== undefined && typeof value !== 'boolean') {
    throw new TypeError(`${name} must be true or false, not ${describeType(value)}`);
  }
  return value ?? false;
}

function describeType(value: unknown): string {
  return value === null ? 'null' : Array.isArray(value) ? 'an array' : typeof value;
}
