// SPDX-License-Identifier: Apache-2.0
import type { TestContext } from 'vitest';
import { type BootOptions, L1 } from '../../lib/guest/index.ts';
import { Kvm } from '../../lib/kvm/index.ts';

/** Boots L1 in a VM of its own on this host's /dev/kvm and closes it afterwards; skips where that does not open. */
export async function withL1(
  context: TestContext,
  options: BootOptions,
  body: (l1: L1) => Promise<void>,
): Promise<void> {
  using kvm = openKvm(context);
  await using l1 = await L1.boot(kvm.createVm(), { signal: context.signal, ...options });
  await body(l1);
}

/** Opens /dev/kvm, or skips the test with the reason. */
export function openKvm(context: TestContext): Kvm {
  try {
    return Kvm.open();
  } catch (error) {
    return context.skip((error as Error).message);
  }
}
