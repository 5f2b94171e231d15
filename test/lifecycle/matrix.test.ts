// SPDX-License-Identifier: Apache-2.0
// Every state of the handles × every way to end a process, each in a child of its own.
import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from 'vitest';
import { whyNoKvm } from '../kvm/machine.ts';
import { compile } from './compile.ts';

const program = fileURLToPath(new URL('matrix.mjs', import.meta.url));
const noKvm = whyNoKvm();

const STATES = [
  'opened',
  'vm',
  'memory',
  'idle',
  'exited',
  'awaited over and over',
  'running',
  'filtered',
  'waiting for an event',
  'waiting for a page',
  'closed',
];
const ENDINGS: Record<string, { code: number | null; signal: string | null; said: string }> = {
  'close twice': { code: 0, signal: null, said: 'vCPU threads: 0\n' },
  gc: { code: 0, signal: null, said: '' },
  exit: { code: 7, signal: null, said: '' },
  throw: { code: 1, signal: null, said: '' },
  sigterm: { code: null, signal: 'SIGTERM', said: 'ready\n' },
  terminate: { code: 0, signal: null, said: 'terminated 1, threads of ours: 0\n' },
};

function play(
  state: string,
  ending: string,
): Promise<{ code: number | null; signal: string | null; said: string; errors: string }> {
  return new Promise((resolve, reject) => {
    // Freed memory is filled with a pattern: whoever uses it after the environment is gone does not get away.
    const env = { ...process.env, GLIBC_TUNABLES: 'glibc.malloc.perturb=165' };
    const child = spawn(process.execPath, ['--expose-gc', program, state, ending], {
      timeout: 20_000,
      killSignal: 'SIGKILL',
      env,
    });
    let said = '';
    let errors = '';
    child.stdout.on('data', (chunk) => {
      said += chunk;
      if (ending === 'sigterm' && said === 'ready\n') child.kill('SIGTERM');
    });
    child.stderr.on('data', (chunk) => {
      errors += chunk;
    });
    child.on('error', reject);
    child.on('close', (code, signal) => resolve({ code, signal, said, errors }));
  });
}

describe('handles that are', () => {
  beforeAll(() => {
    if (noKvm === undefined) compile();
  });

  for (const state of STATES) {
    test(`${state}: every way to end`, { timeout: 120_000 }, async ({ skip }) => {
      if (noKvm !== undefined) skip(noKvm);
      for (const [ending, expected] of Object.entries(ENDINGS)) {
        const { errors, ...seen } = await play(state, ending);
        expect({ ending, ...seen }).toEqual({ ending, ...expected });
        if (ending === 'throw') expect(errors).toMatch(/Error: on purpose/);
        else expect(errors).toBe('');
      }
    });
  }
});
