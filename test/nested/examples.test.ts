// SPDX-License-Identifier: Apache-2.0
// Every example of docs/examples, in one boot, by the command that their readers use.
import { readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from 'vitest';
import { describeLab } from '../../lib/lab/index.ts';
import { probeHost } from '../../lib/probe/index.ts';
import { nvmx } from '../cli/nvmx.ts';

const FOLDER = fileURLToPath(new URL('../../docs/examples/', import.meta.url));

const OUTPUT: Record<string, string[]> = {
  'hello-l2': [
    'L2 left with vmcall, RAX 0xcafe',
    'it did 2 operations; the last value it read was 42',
    'KVM counts 1 nested entry',
  ],
  'apic-access-discarded': [
    'APIC-access exits: 1 of 2; the page holds 2',
    'the second write landed in memory: a stock kernel',
  ],
  'migrate-l2': [
    'turn 0 on vCPU 0: R15 is 115 (100 + 15)',
    'turn 1 on vCPU 1: R15 is 215 (200 + 15)',
    'turn 2 on vCPU 0: R15 is 315 (300 + 15)',
    'turn 3 on vCPU 1: R15 is 415 (400 + 15)',
    'registers survived: true',
    'nested entries: 2 and 3',
  ],
  'save-restore': [
    'saved with L2 active',
    'the copy: sync 2, its page holds 2',
    'meanwhile in the original: 1',
    'the original: sync 2, its page holds 2',
  ],
  evmcs: ['clean bits that the write took away: 0x10', 'with hlt-exiting on, L2 left with hlt'],
  'dirty-memory': ['dirty after L2 ran: 1, 4, 6', 'dirty since: 0 pages'],
};

const lab = describeLab();
const isPossible = probeHost().nestedVmx.usable || lab.possible;
if (!isPossible) console.log(`# SKIP the examples: ${lab.why}`);

describe.skipIf(!isPossible)('docs/examples', () => {
  let printed: Map<string, string[]>;
  beforeAll(async () => {
    const { status, stdout, stderr } = await nvmx(['run', `${FOLDER}all.ts`], {});
    expect(status, stderr).toBe(0);
    const parts = stdout.split(/^== /m).slice(1);
    printed = new Map(
      parts.map((part) => {
        const [name, ...lines] = part.trimEnd().split('\n');
        return [name!, lines];
      }),
    );
  }, 300_000);

  test('every file is run', () => {
    const files = readdirSync(FOLDER).filter((name) => name.endsWith('.ts') && name !== 'all.ts');
    expect([...printed.keys()].sort()).toEqual(files.map((name) => name.slice(0, -3)).sort());
  });

  test.each(Object.entries(OUTPUT))('%s prints exactly this', (name, lines) => {
    expect(printed.get(name)).toEqual(lines);
  });
});
