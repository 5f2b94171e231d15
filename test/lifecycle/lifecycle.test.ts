// SPDX-License-Identifier: Apache-2.0
import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from 'vitest';
import { whyNoKvm } from '../kvm/machine.ts';
import { compile } from './compile.ts';

const child = fileURLToPath(new URL('child.mjs', import.meta.url));
const noKvm = whyNoKvm();

interface Ending {
  code: number | null;
  signal: NodeJS.Signals | null;
  lines: string[];
  stderr: string;
}

function play(scenario: string, signal?: NodeJS.Signals): Promise<Ending> {
  return new Promise((resolve, reject) => {
    const process_ = spawn(process.execPath, ['--expose-gc', child, scenario], {
      timeout: 20_000,
      killSignal: 'SIGKILL',
    });
    let stdout = '';
    let stderr = '';
    process_.stdout.on('data', (chunk) => {
      stdout += chunk;
      if (signal && stdout === 'ready\n') process_.kill(signal);
    });
    process_.stderr.on('data', (chunk) => {
      stderr += chunk;
    });
    process_.on('error', reject);
    process_.on('close', (code, killed) => {
      resolve({ code, signal: killed, lines: stdout.split('\n').filter(Boolean), stderr });
    });
  });
}

describe('a process with KVM handles', () => {
  beforeAll(() => {
    if (noKvm === undefined) compile();
  });

  const scenarios: [what: string, scenario: string, expected: Partial<Ending>, signal?: NodeJS.Signals][] = [
    ['closes twice', 'close-twice', { code: 0, lines: ['KvmClosedError'] }],
    ['is not kept alive by idle vCPUs', 'idle-exits-by-itself', { code: 0, lines: ['interrupted'] }],
    ['forgets to close', 'collected-without-close', { code: 0, lines: ['vCPU threads left: 0'] }],
    [
      'keeps a pending run when its vCPU is unreachable',
      'pending-run-survives-gc',
      { code: 0, lines: ['interrupted'] },
    ],
    ['keeps a view after close', 'buffer-outlives-everything', { code: 0, lines: ['0 undefined'] }],
    ['exits while the guest runs', 'exit', { code: 7 }],
    ['exits while the vCPU thread starts', 'exit-in-a-hurry', { code: 8 }],
    ['throws while the guest runs', 'throw', { code: 1 }],
    ['is terminated while the guest runs', 'sigterm', { code: null, signal: 'SIGTERM' }, 'SIGTERM'],
    [
      'closes in a signal handler',
      'close-from-signal',
      { code: 0, lines: ['ready', 'KvmClosedError'] },
      'SIGTERM',
    ],
    [
      'terminates a worker whose guest runs',
      'worker-terminate',
      { code: 0, lines: ['vCPU threads: 1', 'terminated 1, vCPU threads left: 0'] },
    ],
    ['exits over a worker whose guest runs', 'worker-exit-with-main', { code: 9 }],
    ['uses three environments at once', 'two-environments', { code: 0, lines: ['interrupted', 'done'] }],
  ];
  for (const [what, scenario, expected, signal] of scenarios) {
    test(what, async ({ skip }) => {
      if (noKvm !== undefined) skip(noKvm);
      const ending = await play(scenario, signal);
      expect(ending).toMatchObject({ signal: null, ...expected });
      if (scenario === 'throw') expect(ending.stderr).toMatch(/Error: on purpose/);
      else expect(ending.stderr).toBe('');
    });
  }
});
