// SPDX-License-Identifier: Apache-2.0
import { execFileSync } from 'node:child_process';
import { accessSync, constants, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { describeLab, runInLab } from '../../lib/lab/index.ts';

const PROGRAMS = ['bench_memslots', 'bench_nested'];
const BESIDE = new URL('./beside.mjs', import.meta.url).pathname;
const ROUNDS = 30;
/** As many as nvmx bench makes in the lab. */
const TRIPS = 1500;
const TURNS = 5;

interface Ticks {
  readonly count: number;
  readonly min: number;
  readonly p50: number;
  readonly mean: number;
}
interface Pair {
  readonly kind: string;
  readonly peer: Ticks;
  readonly ours: Ticks;
}

const usable = (() => {
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK);
    return true;
  } catch {
    return false;
  }
})();
const lab = describeLab();

function print(where: string, kind: string, peer: number, ours: number): void {
  const difference = ((ours / peer - 1) * 100).toFixed(1);
  console.log(`${where}: ${kind.padEnd(10)} C ${peer} · nvmx ${ours} cycles (${difference} %)`);
}

describe('the measured loops beside C programs with plain ioctls', () => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'nvmx-peer-'));
    // The guest of bench_nested is a part of the program, at the address it is linked to.
    const guest = ['-static', '-no-pie', '-fno-stack-protector', '-fcf-protection=none'];
    for (const name of PROGRAMS) {
      const source = new URL(`../peers/${name}.c`, import.meta.url).pathname;
      const flags = ['-O2', '-Wall', '-Wextra', '-Werror', ...guest];
      execFileSync('cc', [...flags, '-o', join(folder, name), source]);
    }
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test.skipIf(!usable)('on this machine: the same work, side by side', { timeout: 120_000 }, () => {
    const best = new Map<string, { peer: number; ours: number }>();
    // In turns, and the best of each: a disturbance must not fall on one side alone.
    for (let turn = 0; turn < TURNS; turn += 1) {
      const said = execFileSync(process.execPath, [BESIDE, folder, String(ROUNDS), '0'], {
        encoding: 'utf8',
      });
      for (const line of said.trim().split('\n')) {
        const { kind, peer, ours } = JSON.parse(line) as Pair;
        expect([peer.count, ours.count]).toEqual([ROUNDS, ROUNDS]);
        const one = best.get(kind) ?? { peer: peer.min, ours: ours.min };
        best.set(kind, { peer: Math.min(one.peer, peer.min), ours: Math.min(one.ours, ours.min) });
      }
    }
    expect([...best.keys()]).toEqual(['map', 'unmap', 'move']);
    for (const [kind, { peer, ours }] of best) print('here', kind, peer, ours);
  });

  test.skipIf(!lab.possible)(
    'in the lab, where time is exact: within 5 %',
    { timeout: 600_000 },
    async () => {
      const pairs: Pair[] = [];
      const beside = '/nvmx/test/bench/beside.mjs';
      const result = await runInLab([beside, '/peers', String(ROUNDS), String(TRIPS)], {
        files: { [beside]: BESIDE, '/peers': folder },
        deterministic: true,
        onLine: (line) => pairs.push(JSON.parse(line) as Pair),
      });
      expect(result, result.console).toMatchObject({ outcome: 'exited', exitStatus: 0 });
      expect(pairs.map(({ kind }) => kind)).toEqual(['map', 'unmap', 'move', 'round-trip']);
      for (const { kind, peer, ours } of pairs) {
        expect(ours.count).toBe(peer.count);
        print(`Linux ${result.kernel.release} in the lab`, kind, peer.mean, Math.round(ours.mean));
        expect(Math.abs(ours.mean / peer.mean - 1), kind).toBeLessThan(0.05);
      }
    },
  );
});

test('KVM and a machine to measure in', ({ skip }) => {
  if (!usable) skip('/dev/kvm does not open');
  if (!lab.possible) skip(lab.why);
});
