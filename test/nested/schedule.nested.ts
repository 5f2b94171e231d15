// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  type Actor,
  atEachSync,
  hostActor,
  interleave,
  type L1,
  l2Actor,
  lockstep,
} from '../../lib/guest/index.ts';
import { exitOf, nestedRuns, withL1 } from './machine.ts';

/** An L2 on each of two vCPUs that stops twice with L2 active, and the host; everybody writes into the log. */
async function cast(l1: L1, log: string[]): Promise<Actor[]> {
  const actors = [];
  for (const [cpu, name] of ['a', 'b'].entries()) {
    const l2 = await l1.createL2({ cpu }, (program) => program.sync(1).sync(2).vmcall());
    actors.push(
      l2Actor(name, l2, {
        onStop: (stop) => log.push(`${name} ${stop.kind === 'sync' ? stop.value : stop.kind}`),
        isLast: (stop) => stop.kind === 'exit',
      }),
    );
  }
  return [...actors, hostActor('host', [() => log.push('host 0'), () => log.push('host 1')])];
}

test('L2s of two vCPUs in lockstep, both active between turns', () =>
  withL1({ vcpus: 2 }, async (l1) => {
    const log: string[] = [];
    const [a, b] = await cast(l1, log);
    const active: number[] = [];
    const turns = await lockstep([a!, b!], () => {
      const flags = l1.vcpus.map(
        ({ vcpu }) => new DataView(vcpu.getNestedState().buffer).getUint16(0, true) & 1,
      );
      active.push(flags.reduce((sum, flag) => sum + flag, 0));
    });
    assert.deepEqual([turns, active], [3, [2, 2, 0]]);
    assert.deepEqual(log.sort(), ['a 1', 'a 2', 'a exit', 'b 1', 'b 2', 'b exit']);
    assert.deepEqual([nestedRuns(l1, 0), nestedRuns(l1, 1)], [1, 1]);
  }));

test('an interleaving of L2s and the host is the same again by its seed and by its order', () =>
  withL1({ vcpus: 2 }, async (l1) => {
    const logs: string[][] = [[], [], []];
    const first = await interleave(await cast(l1, logs[0]!), { seed: 11 });
    await interleave(await cast(l1, logs[1]!), { seed: 11 });
    await interleave(await cast(l1, logs[2]!), { order: first.order });
    assert.equal(logs[0]!.length, 8);
    assert.deepEqual(logs[1], logs[0]);
    assert.deepEqual(logs[2], logs[0]);
  }));

test('something is done at each sync, and the exit comes back', () =>
  withL1({}, async (l1) => {
    const page = l1.allocate();
    const l2 = await l1.createL2({}, (program) =>
      program
        .sync(5)
        .read8(page)
        .sync(6)
        .read8(page + 1)
        .vmcall(),
    );
    const seen: number[] = [];
    const stop = await atEachSync(l2, (value) => {
      l1.bytes(page + seen.length, 1)[0] = 10 * value;
      seen.push(value);
    });
    exitOf(stop, 'vmcall');
    assert.deepEqual([seen, l2.progress.last, l2.progress.folds], [[5, 6], 60n, 2]);
  }));

test('settle() leaves nothing pending: L2 stands behind its port access', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({}, (program) => program.sync(1).vmcall());
    await l2.enter();
    const { vcpu } = l1.cpu(0);
    const before = vcpu.getRegs().rip;
    assert.equal(vcpu.settle(), undefined);
    assert.equal(vcpu.getRegs().rip - before, 1n, 'OUT DX, EAX has one byte');
    assert.equal(vcpu.settle(), undefined);
    assert.equal(vcpu.getRegs().rip - before, 1n);
    exitOf(await l2.continue(), 'vmcall');
    assert.equal(nestedRuns(l1), 1);
  }));
