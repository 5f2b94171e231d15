// SPDX-License-Identifier: Apache-2.0
import { type BootOptions, L1, type L2Stop } from '../../guest/index.ts';
import { Kvm, type Vm } from '../../kvm/index.ts';
import type { SelftestContext } from '../engine/model.ts';

/** A VM of its own for one test, with L1 up; disposing it leaves nothing behind. */
export interface Machine extends AsyncDisposable {
  readonly vm: Vm;
  readonly l1: L1;
}

/** Boots L1, by default on one vCPU, and closes everything at once when the test is aborted. */
export async function bootL1(context: SelftestContext, options: number | BootOptions = 1): Promise<Machine> {
  const kvm = Kvm.open();
  let vm: Vm | undefined;
  const close = (): void => {
    vm?.close();
    kvm.close();
  };
  context.signal.addEventListener('abort', close, { once: true });
  const dispose = async (): Promise<void> => {
    context.signal.removeEventListener('abort', close);
    close();
  };
  try {
    vm = kvm.createVm();
    const l1 = await L1.boot(vm, {
      ...(typeof options === 'number' ? { vcpus: options } : options),
      signal: context.signal,
    });
    return { vm, l1, [Symbol.asyncDispose]: dispose };
  } catch (error) {
    await dispose();
    throw error;
  }
}

/** L2 entries KVM counted on all of L1's vCPUs (vCPU statistic `nested_run`). */
export function nestedRuns(l1: L1): number {
  return l1.vcpus.reduce((sum, { vcpu }) => sum + stat(vcpu.stats(), 'nested_run'), 0);
}

/** One counter out of binary statistics. */
export function stat(stats: ReadonlyMap<string, bigint | readonly bigint[]>, name: string): number {
  const value = stats.get(name);
  if (typeof value !== 'bigint') throw new Error(`this kernel has no statistic "${name}"`);
  return Number(value);
}

export function hex(value: bigint | number): string {
  return `0x${value.toString(16)}`;
}

/** A stop in a word or two. */
export function stopText(stop: L2Stop): string {
  if (stop.kind === 'sync') return `sync ${stop.value}`;
  return stop.kind === 'exit' ? stop.exit.reason : `userspace ${stop.exit.type}`;
}

/** Calls `change` at random times until stopped; the seed gives the times. */
export function churn(
  context: SelftestContext,
  periodMs: number,
  change: (turn: number) => unknown,
): { stop(): Promise<number> } {
  const over = new AbortController();
  let turns = 0;
  const running = (async () => {
    for (;;) {
      await context.sleep(1 + Math.floor(context.random() * (2 * periodMs - 1)));
      if (over.signal.aborted) return;
      await change(turns);
      turns += 1;
    }
  })();
  return {
    async stop() {
      over.abort();
      await running;
      return turns;
    },
  };
}
