// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Batch, foldChecksum, type L1, type L2, vmcallRegsValues } from '../../lib/guest/index.ts';
import { exitOf, nestedRuns, progressOf, withL1 } from './machine.ts';

const ROUNDS = 3;
const seed = (index: number, round: number) => 0x10_0000 * index + 0x100 * round;

/** L2s that check all their registers in every round. */
async function makeL2s(l1: L1, count: number): Promise<L2[]> {
  const l2s: L2[] = [];
  for (let index = 0; index < count; index += 1) {
    l2s.push(
      await l1.createL2({ vpid: index + 1, msrBitmap: true }, (program) => {
        for (let round = 0; round < ROUNDS; round += 1) program.vmcallRegs(seed(index, round));
      }),
    );
  }
  return l2s;
}

/** In each round but the last, the registers were checked; the last is checked by one more turn. */
function expectedChecksum(index: number, rounds: number): bigint {
  const values: bigint[] = [];
  for (let round = 0; round < rounds; round += 1) values.push(...vmcallRegsValues(seed(index, round)));
  return foldChecksum(values);
}

test('L2s take turns on one vCPU, loaded and resumed', () =>
  withL1({}, async (l1) => {
    const l2s = await makeL2s(l1, 4);
    for (let round = 0; round <= ROUNDS; round += 1) {
      for (const [index, l2] of l2s.entries()) {
        const exit = exitOf(await l2.enter({ mode: round === 0 ? 'launch' : 'resume' }), 'vmcall');
        if (round < ROUNDS) assert.equal(exit.registers.r15, BigInt(seed(index, round) + 15));
        assert.equal(l1.cpu(0).current, l2.vmcs);
      }
    }
    for (const [index, l2] of l2s.entries()) {
      progressOf(l2, { executed: ROUNDS, done: true, checksum: expectedChecksum(index, ROUNDS) });
    }
    assert.equal(nestedRuns(l1), 4 * (ROUNDS + 1));
  }));

test('the same in one batch, and with VMCLEAR in every turn', () =>
  withL1({}, async (l1) => {
    const l2s = await makeL2s(l1, 3);
    for (const migrate of [false, true]) {
      const batch = new Batch();
      for (const l2 of l2s) l2.setPolicy({});
      for (let round = 0; round < 2; round += 1) {
        for (const l2 of l2s) {
          batch.vmptrld(l2.vmcs).enter(l2.area.gpa, 'auto');
          if (migrate) batch.vmclear(l2.vmcs, l2.area.gpa);
        }
      }
      const stop = await l1.cpu(0).start(batch);
      assert(stop.kind === 'done');
      assert.deepEqual(new Set(stop.results.map((result) => result.status)), new Set(['ok']));
      assert.deepEqual(
        l2s.map((l2) => l2.launched),
        l2s.map(() => !migrate),
      );
    }
    for (const [index, l2] of l2s.entries()) {
      progressOf(l2, { executed: ROUNDS, checksum: expectedChecksum(index, ROUNDS), done: true });
    }
    assert.equal(nestedRuns(l1), 3 * 4);
  }));

test('an L2 moves between two vCPUs of L1 in every turn', () =>
  withL1({ vcpus: 2 }, async (l1) => {
    const l2s = await makeL2s(l1, 2);
    for (let round = 0; round <= ROUNDS; round += 1) {
      for (const [index, l2] of l2s.entries()) {
        exitOf(await l2.enter({ on: (index + round) % 2 }), 'vmcall');
      }
    }
    for (const [index, l2] of l2s.entries()) {
      progressOf(l2, { executed: ROUNDS, done: true, checksum: expectedChecksum(index, ROUNDS) });
    }
    assert.deepEqual([nestedRuns(l1, 0), nestedRuns(l1, 1)], [ROUNDS + 1, ROUNDS + 1]);
  }));

test('two vCPUs run their L2s at the same time', () =>
  withL1({ vcpus: 2 }, async (l1) => {
    const page = l1.allocate();
    const make = (cpu: number) =>
      l1.createL2({ cpu }, (program) =>
        program
          .write32(page + 64 * cpu, 1)
          .spin(page + 64 * (1 - cpu), 4, 1)
          .vmcall(cpu),
      );
    const l2s = [await make(0), await make(1)];
    const stops = await Promise.all(l2s.map((l2) => l2.enter()));
    for (const [cpu, stop] of stops.entries())
      assert.equal(exitOf(stop, 'vmcall').registers.rax, BigInt(cpu));
  }));

test('a VMCS that is active elsewhere is refused, and IPIs arrive', () =>
  withL1({ vcpus: 2 }, async (l1) => {
    const l2 = await l1.createL2({}, (program) => program.vmcall());
    await assert.rejects(l2.load(1), /active on L1 vCPU 0: VMCLEAR it there/);
    const ids = [await l1.cpu(0).x2apicEnable(), await l1.cpu(1).x2apicEnable()];
    assert.deepEqual(ids, [0, 1]);
    const halted = l1.cpu(1).executeAll(new Batch().halt());
    await l1.cpu(0).executeAll(new Batch().ipi((1n << 32n) | 0x55n));
    await halted;
    assert.equal(l1.cpu(1).interruptCount(0x55), 1);
    assert.equal(l1.cpu(0).interruptCount(0x55), 0);
  }));
