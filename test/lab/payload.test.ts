// SPDX-License-Identifier: Apache-2.0
import { execFileSync } from 'node:child_process';
import { chmodSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { loadedPart } from '../../lib/lab/payload.ts';

test('Node without its symbols is a smaller Node that runs', () => {
  const whole = readFileSync(process.execPath);
  const part = loadedPart(whole);
  expect(part.length).toBeLessThanOrEqual(whole.length);
  const folder = mkdtempSync(join(tmpdir(), 'nvmx-node-'));
  try {
    const file = join(folder, 'node');
    writeFileSync(file, part);
    chmodSync(file, 0o755);
    const script =
      'console.log(process.version, [3, 1, 2].sort().join(), Intl.NumberFormat("de").format(1.5))';
    expect(execFileSync(file, ['-e', script], { encoding: 'utf8' })).toBe(`${process.version} 1,2,3 1,5\n`);
    // What debuggers read is found by the table of sections, at the end.
    const sections = Number(whole.readBigUInt64LE(0x28));
    expect(statSync(file).size).toBeLessThan(sections);
    expect(part.readBigUInt64LE(0x28)).toBe(0n);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});
