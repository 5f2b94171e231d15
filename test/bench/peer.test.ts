// SPDX-License-Identifier: Apache-2.0
import { execFileSync } from 'node:child_process';
import { accessSync, constants, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { distribution } from '../../lib/bench/index.ts';
import { Kvm, type MemoryRegion, runSteps, type Step } from '../../lib/kvm/index.ts';

/** The same bytes, addresses and rounds as test/peers/bench_memslots.c. */
const CODE = [
  0xb8, 0x00, 0x10, 0x8e, 0xd8, 0xa2, 0x00, 0x00, 0x05, 0x00, 0x01, 0x3d, 0x00, 0x90, 0x75, 0xf3, 0xe6, 0x10,
  0xeb, 0xec,
];
const [GPA, SIZE, AWAY, PORT, PAGE] = [0x1_0000, 0x8_0000, 0x10_0000, 0x10, 4096];
const ROUNDS = 30;
const TURNS = 5;
const KINDS = ['map', 'unmap', 'move'] as const;
type Kind = (typeof KINDS)[number];

const STEPS: Record<Kind, (region: MemoryRegion) => Step[]> = {
  map: (region) => [{ kind: 'discard', region }],
  unmap: (region) => [{ kind: 'discard', region, piece: PAGE }],
  move: (region) => [
    { kind: 'move', region, gpa: AWAY },
    { kind: 'move', region, gpa: GPA },
  ],
};

const usable = (() => {
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK);
    return true;
  } catch {
    return false;
  }
})();

function ours(): Record<Kind, number[]> {
  using kvm = Kvm.open();
  using vm = kvm.createVm();
  const image = vm.memory.add({ gpa: 0, size: PAGE });
  new Uint8Array(image.buffer).set(CODE);
  const region = vm.memory.add({ gpa: GPA, size: SIZE });
  const vcpu = vm.createVcpu(0);
  vcpu.setSregs({ cs: { base: 0n, selector: 0 } });
  vcpu.setRegs({ rip: 0n, rflags: 2n });
  return Object.fromEntries(
    KINDS.map((kind) => {
      const steps: Step[] = [{ kind: 'run', port: PORT }, ...STEPS[kind](region)];
      const { times } = runSteps(vcpu, steps, ROUNDS + 1);
      const rounds = Array.from({ length: ROUNDS }, (_, i) => {
        const at = (i + 1) * steps.length;
        return times.subarray(at, at + steps.length).reduce((sum, time) => sum + time, 0);
      });
      return [kind, rounds];
    }),
  ) as Record<Kind, number[]>;
}

describe.skipIf(!usable)('the measured loops beside a C program with plain ioctls', () => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'nvmx-peer-'));
    const source = new URL('../peers/bench_memslots.c', import.meta.url).pathname;
    execFileSync('cc', ['-O2', '-Wall', '-Wextra', '-Werror', '-o', join(folder, 'peer'), source]);
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test('do the same work; the figures are printed side by side', { timeout: 120_000 }, () => {
    const best = new Map<Kind, { peer: number; ours: number }>(
      KINDS.map((kind) => [kind, { peer: Number.POSITIVE_INFINITY, ours: Number.POSITIVE_INFINITY }]),
    );
    // In turns, and the best of each: a disturbance must not fall on one side alone.
    for (let turn = 0; turn < TURNS; turn += 1) {
      const lines = execFileSync(join(folder, 'peer'), [String(ROUNDS)], { encoding: 'utf8' });
      for (const line of lines.trim().split('\n')) {
        const [kind, rounds, min] = line.split(' ');
        expect(rounds).toBe(String(ROUNDS));
        const one = best.get(kind as Kind)!;
        one.peer = Math.min(one.peer, Number(min));
      }
      for (const [kind, samples] of Object.entries(ours()) as [Kind, number[]][]) {
        expect(samples).toHaveLength(ROUNDS);
        const one = best.get(kind)!;
        one.ours = Math.min(one.ours, distribution(samples).min);
      }
    }
    for (const [kind, { peer, ours: mine }] of best) {
      expect(Number.isFinite(peer) && Number.isFinite(mine)).toBe(true);
      console.log(
        `${kind.padEnd(6)} C ${peer} · nvmx ${mine} cycles (${((mine / peer - 1) * 100).toFixed(1)} %)`,
      );
    }
  });
});
