// SPDX-License-Identifier: Apache-2.0

/**
 * Whether a test id matches a pattern: the id itself, a leading part of it that ends at a `/`, or a glob in
 * which `*` stands for any text and `?` for one character.
 */
export function matchesPattern(id: string, pattern: string): boolean {
  if (!/[*?]/.test(pattern)) {
    const prefix = pattern.replace(/\/+$/, '');
    return id === prefix || id.startsWith(`${prefix}/`);
  }
  const source = pattern
    .replace(/[.+^${}()|[\]\\]/g, '\\$&')
    .replaceAll('*', '.*')
    .replaceAll('?', '.');
  return new RegExp(`^${source}$`).test(id);
}

/** The tests that match any pattern, in suite order; all of them when there is no pattern. */
export function select<T extends { readonly id: string }>(
  tests: readonly T[],
  patterns: readonly string[],
): T[] {
  if (patterns.length === 0) return [...tests];
  return tests.filter((test) => patterns.some((pattern) => matchesPattern(test.id, pattern)));
}
