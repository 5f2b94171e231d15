// SPDX-License-Identifier: Apache-2.0
import { getEventListeners } from 'node:events';
import { describe, expect } from 'vitest';
import { KvmClosedError, kvmRunTime, VcpuBusyError } from '../../lib/kvm/index.ts';
import { hlt, load, movAl, outAl, spin, start, test } from './machine.ts';

const later = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

describe('kick', () => {
  test('ends an infinite loop; the guest can go on', async ({ vm }) => {
    const vcpu = load(vm, spin);
    const run = vcpu.run();
    expect(vcpu.state).toBe('running');
    await later(20);
    vcpu.kick();
    expect(await run).toEqual({ type: 'interrupted' });
    expect(vcpu.state).toBe('idle');
    vcpu.setRegs({ rip: vcpu.getRegs().rip + 2n });
    vm.memory.write(0x1002, Uint8Array.from(hlt));
    expect(await vcpu.run()).toEqual({ type: 'hlt' });
  });

  test('the time in KVM_RUN grows while guests run, by no more than that, and not otherwise', async ({
    vm,
  }) => {
    const vcpu = load(vm, spin);
    const before = kvmRunTime();
    await later(5);
    expect(kvmRunTime()).toBe(before);
    const began = performance.now();
    const run = vcpu.run();
    await later(20);
    vcpu.kick();
    await run;
    const spent = kvmRunTime() - before;
    expect(spent).toBeGreaterThan(0);
    expect(spent).toBeLessThanOrEqual(performance.now() - began);
  });

  test('is never lost, however early it comes', async ({ vm }) => {
    const vcpu = load(vm, spin);
    for (let i = 0; i < 300; i++) {
      const run = vcpu.run();
      // Spread over the time the thread needs to wake up and enter the guest.
      for (let wait = 0; wait < i * 40; wait++);
      vcpu.kick();
      expect(await run).toEqual({ type: 'interrupted' });
    }
  });

  test('of an idle vCPU does not spoil its next run', async ({ vm }) => {
    const vcpu = load(vm, [...movAl(1), ...outAl(0x10), ...hlt]);
    vcpu.kick();
    expect(await vcpu.run()).toMatchObject({ type: 'io' });
    vcpu.kick();
    expect(await vcpu.run()).toEqual({ type: 'hlt' });
  });

  test('sixteen vCPUs run at once and each is kicked alone', async ({ vm }) => {
    vm.memory.add({ gpa: 0x1000, size: 0x1000 });
    vm.memory.write(0x1000, Uint8Array.from(spin));
    const vcpus = Array.from({ length: 16 }, (_, id) => start(vm, id));
    const runs = vcpus.map((vcpu) => vcpu.run());
    for (const [id, vcpu] of vcpus.entries()) {
      vcpu.kick();
      expect(await runs[id]).toEqual({ type: 'interrupted' });
      expect(vcpus.filter((other) => other.state === 'running')).toHaveLength(15 - id);
    }
  });

  test('state calls and a second run throw while the guest runs', async ({ vm }) => {
    const vcpu = load(vm, spin);
    const run = vcpu.run();
    expect(() => vcpu.getRegs()).toThrow(VcpuBusyError);
    expect(() => vcpu.setMsrs([[0x174, 1n]])).toThrow(VcpuBusyError);
    expect(() => vcpu.runSync()).toThrow(VcpuBusyError);
    await expect(vcpu.run()).rejects.toThrow(VcpuBusyError);
    vcpu.kick();
    expect(await run).toEqual({ type: 'interrupted' });
    expect(vcpu.getRegs().rip).toBe(0x1000n);
  });
});

describe('a run that is over at once', () => {
  /** OUT 0x10, AL; JMP to it. */
  const writing = [...outAl(0x10), 0xeb, 0xfc];

  test('is busy until its exit is delivered', async ({ vm }) => {
    const vcpu = load(vm, writing);
    for (let i = 0; i < 300; i++) {
      const run = vcpu.run();
      expect(vcpu.state).toBe('running');
      expect(() => vcpu.getRegs()).toThrow(VcpuBusyError);
      expect(() => vcpu.runSync()).toThrow(VcpuBusyError);
      vcpu.kick();
      expect(['io', 'interrupted']).toContain((await run).type);
      expect(vcpu.state).toBe('idle');
    }
  });

  test('does not starve timers and signals, however many are awaited', async ({ vm }) => {
    const vcpu = load(vm, writing);
    let turns = 0;
    let ended = false;
    const turn = () => {
      turns++;
      if (!ended) setImmediate(turn);
    };
    setImmediate(turn);
    // The longest row of runs within one turn of the event loop.
    let longest = 0;
    for (let i = 0, row = 0, last = -1; i < 3000; i++, row++) {
      await vcpu.run();
      if (turns !== last) row = 0;
      last = turns;
      longest = Math.max(longest, row);
    }
    ended = true;
    expect(longest).toBeLessThanOrEqual(32);
    const signal = AbortSignal.timeout(20);
    const endless = async () => {
      for await (const exit of vcpu.exits({ signal })) expect(exit.type).toBe('io');
    };
    await expect(endless()).rejects.toMatchObject({ name: 'TimeoutError' });
  });

  test('rejects when the vCPU is closed before the exit is delivered', async ({ vm }) => {
    for (let i = 0; i < 20; i++) {
      const vcpu = i === 0 ? load(vm, writing) : start(vm, i);
      for (let warm = 0; warm < 20; warm++) await vcpu.run();
      const run = vcpu.run();
      vcpu.close();
      await expect(run).rejects.toThrow(KvmClosedError);
    }
  });
});

describe('AbortSignal', () => {
  test('aborts a run with its reason and leaves no listener', async ({ vm }) => {
    const vcpu = load(vm, spin);
    const controller = new AbortController();
    const reason = new Error('enough');
    const run = vcpu.run({ signal: controller.signal });
    await later(10);
    controller.abort(reason);
    await expect(run).rejects.toBe(reason);
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0);
    expect(vcpu.state).toBe('idle');
  });

  test('an aborted signal prevents the run', async ({ vm }) => {
    const vcpu = load(vm, hlt);
    await expect(vcpu.run({ signal: AbortSignal.abort('no') })).rejects.toBe('no');
    expect(vcpu.getRegs().rip).toBe(0x1000n);
  });

  test('an exit that came first is delivered, not lost', async ({ vm }) => {
    const vcpu = load(vm, [...movAl(7), ...outAl(0x10), ...hlt]);
    const controller = new AbortController();
    expect(await vcpu.run({ signal: controller.signal })).toMatchObject({
      type: 'io',
      data: Uint8Array.of(7),
    });
    controller.abort();
    expect(await vcpu.run()).toEqual({ type: 'hlt' });
  });
});

describe('close while running', () => {
  test('vcpu.close() rejects the run with KvmClosedError', async ({ vm }) => {
    const vcpu = load(vm, spin);
    const run = vcpu.run();
    await later(5);
    vcpu.close();
    await expect(run).rejects.toThrow(KvmClosedError);
    expect(vcpu.state).toBe('closed');
    expect(vm.vcpus).toEqual([]);
  });

  test('vm.close() and kvm.close() do so for every vCPU', async ({ kvm, vm }) => {
    const first = load(vm, spin);
    const runs = [first.run(), start(vm, 1).run()];
    const other = kvm.createVm();
    const third = load(other, spin).run();
    vm.close();
    for (const run of runs) await expect(run).rejects.toThrow(KvmClosedError);
    kvm.close();
    await expect(third).rejects.toThrow(KvmClosedError);
    expect(first.runPage.byteLength).toBe(0);
  });
});
