// SPDX-License-Identifier: Apache-2.0
import { execFile } from 'node:child_process';
import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { describe, expect, test } from 'vitest';
import { whyNoKvm } from '../kvm/machine.ts';

const run = promisify(execFile);
const source = fileURLToPath(new URL('.', import.meta.url));
const output = fileURLToPath(new URL('../../out/native-tests', import.meta.url));

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

async function build(sanitizer: string): Promise<string> {
  const folder = join(output, sanitizer || 'plain');
  const configure = () => run('cmake', ['-S', source, '-B', folder, `-DNVMX_SANITIZE=${sanitizer}`]);
  try {
    await configure();
  } catch {
    // A cache from another source folder or compiler.
    rmSync(folder, { recursive: true, force: true });
    await configure();
  }
  await run('cmake', ['--build', folder, '-j', '2']);
  return join(folder, 'nvmx-native-tests');
}

describe('native/kvm without Node', () => {
  for (const sanitizer of ['', 'address', 'thread']) {
    test(sanitizer ? `under the ${sanitizer} sanitizer` : 'plain', { timeout: 600_000 }, async ({ skip }) => {
      const reason = await whyNot();
      if (reason !== undefined) skip(reason);
      const binary = await build(sanitizer);
      const { stdout, stderr } = await run(binary, { timeout: 180_000 }).catch((failed) => failed);
      const lines = String(stdout).trimEnd().split('\n');
      expect([lines.filter((line) => !line.startsWith('ok ')), String(stderr)]).toEqual([[lines.at(-1)], '']);
      expect(lines.at(-1)).toBe(`${lines.length - 1} run, 0 failed`);
      expect(lines.length).toBeGreaterThan(1);
    });
  }
});
