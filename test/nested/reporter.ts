// SPDX-License-Identifier: Apache-2.0
// A node:test reporter: one line of JSON for each test, which nested.test.ts turns into a test of its own.

import type { TestEvent } from 'node:test/reporters';
import { inspect } from 'node:util';

export const MARK = '@nested ';

export interface NestedResult {
  readonly name: string;
  readonly verdict: 'pass' | 'fail' | 'skip';
  readonly detail?: string;
  readonly milliseconds: number;
}

export default async function* reporter(source: AsyncIterable<TestEvent>): AsyncGenerator<string> {
  for await (const event of source) {
    if (event.type !== 'test:pass' && event.type !== 'test:fail') continue;
    const { name, skip, details } = event.data;
    const failed = event.type === 'test:fail';
    const error = 'error' in details ? details.error : undefined;
    const result: NestedResult = {
      name,
      verdict: failed ? 'fail' : skip === undefined ? 'pass' : 'skip',
      milliseconds: details.duration_ms,
      ...(failed
        ? { detail: inspect(error?.cause ?? error) }
        : typeof skip === 'string'
          ? { detail: skip }
          : {}),
    };
    yield `${MARK}${JSON.stringify(result)}\n`;
  }
}
