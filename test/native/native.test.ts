// SPDX-License-Identifier: Apache-2.0
import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, test } from 'vitest';
import { whyNoKvm } from '../kvm/machine.ts';
import { build, runSanitized } from './sanitize.ts';

const run = promisify(execFile);

/** Why the C++ tests cannot be built or run here, or undefined. */
async function whyNot(): Promise<string | undefined> {
  for (const tool of ['cmake', 'g++']) {
    try {
      await run(tool, ['--version']);
    } catch {
      return `${tool} is not installed (apt-get install cmake g++)`;
    }
  }
  return whyNoKvm();
}

describe('native/kvm without Node', () => {
  for (const sanitizer of ['plain', 'address', 'thread'] as const) {
    test(`built with sanitizer: ${sanitizer}`, { timeout: 600_000 }, async ({ skip }) => {
      const reason = await whyNot();
      if (reason !== undefined) skip(reason);
      const binary = join(await build(sanitizer, 'nvmx-native-tests'), 'nvmx-native-tests');
      const { stdout, stderr } = await run(binary, { timeout: 180_000 }).catch((failed) => failed);
      const lines = String(stdout).trimEnd().split('\n');
      expect([lines.filter((line) => !line.startsWith('ok ')), String(stderr)]).toEqual([[lines.at(-1)], '']);
      expect(lines.at(-1)).toBe(`${lines.length - 1} run, 0 failed`);
      expect(lines.length).toBeGreaterThan(1);
    });
  }
});

describe('the addon in Node', () => {
  const cases = [
    // Addresses are in short supply there: what counts mappings and descriptors is not for a sanitizer.
    ['address', ['test/kvm', 'test/lifecycle', '--exclude', '**/leaks*']],
    ['thread', ['test/kvm', 'test/lifecycle/lifecycle.test.ts', '--exclude', '**/leaks*']],
  ] as const;
  for (const [sanitizer, args] of cases) {
    test(`passes its tests under the ${sanitizer} sanitizer`, { timeout: 900_000 }, async ({ skip }) => {
      const reason = await whyNot();
      if (reason !== undefined) skip(reason);
      const { status, said, reports } = await runSanitized(sanitizer, [...args]);
      expect(reports).toEqual([]);
      expect(status, said).toBe(0);
      expect(said).toMatch(/[1-9]\d* passed, 0 failed/);
    });
  }
});
