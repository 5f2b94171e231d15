// SPDX-License-Identifier: Apache-2.0
// Bounded waits for a vCPU that may never come back.
import type { L2Stop } from '../../guest/index.ts';
import type { Vcpu } from '../../kvm/index.ts';
import type { SelftestContext } from '../engine/model.ts';
import { stat } from './common.ts';

/** What a vCPU gets to do something, in milliseconds of the machine's time; it takes one or two, in the lab some 30. */
const PATIENCE_MS = 500;

/** Waits, a millisecond at a time, for something that needs no more than L2 or KVM running on. */
export async function until(context: SelftestContext, holds: () => boolean): Promise<boolean> {
  for (let waited = 0; waited < PATIENCE_MS; waited++) {
    if (holds()) return true;
    await context.sleep(1);
  }
  return holds();
}

/** KVM has put the vCPU to sleep (statistic `blocking`); ask once before the run, the kernel opens it then. */
export function isHalted(vcpu: Vcpu): boolean {
  return stat(vcpu.stats(), 'blocking') === 1;
}

/**
 * Runs an L2 while the host acts, and kicks the vCPU out when it is not back soon after.
 * @param start enter() or continue() with this signal
 * @returns the stop; undefined when there was no progress
 */
export async function meanwhile(
  context: SelftestContext,
  start: (signal: AbortSignal) => Promise<L2Stop>,
  act: () => Promise<void> | void = () => {},
): Promise<L2Stop | undefined> {
  const enough = new AbortController();
  let over = false;
  const running = start(AbortSignal.any([context.signal, enough.signal]))
    .finally(() => {
      over = true;
    })
    .catch((error: unknown) => {
      if (enough.signal.aborted && !context.signal.aborted) return undefined;
      throw error;
    });
  running.catch(() => {});
  await act();
  if (!(await until(context, () => over))) enough.abort(new Error('no progress'));
  return running;
}
