// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { type BootOptions, L1, type L2, type L2Stop, type VmExit } from '../../lib/guest/index.ts';
import { Kvm, VM_TYPE } from '../../lib/kvm/index.ts';

/** A guest that never stops fails its test: closing the VM rejects the run. Far above what any test takes. */
const LIMIT_MS = 15_000;

/** Boots L1 in a VM of its own, of type `type`, and closes it afterwards. */
export async function withL1(
  options: BootOptions,
  body: (l1: L1) => Promise<void>,
  type: number = VM_TYPE.default,
): Promise<void> {
  using kvm = Kvm.open();
  await using l1 = await L1.boot(kvm.createVm({ type }), options);
  const limit = setTimeout(() => l1.vm.close(), LIMIT_MS);
  try {
    await body(l1);
  } finally {
    clearTimeout(limit);
  }
}

/** Why this kernel has no VMs with private memory, or undefined. */
export function whyNotPrivate(kvm: Kvm): string | undefined {
  return kvm.checkExtension('KVM_CAP_VM_TYPES') & (1 << 1)
    ? undefined
    : 'no VM type sw-protected: the kernel needs CONFIG_KVM_SW_PROTECTED_VM';
}

/** VM entries KVM counted on one vCPU of L1. */
export function nestedRuns(l1: L1, index = 0): number {
  return Number(l1.vcpu(index).stats().get('nested_run'));
}

/** The VM exit of a stop that must be one. */
export function exitOf(stop: L2Stop, reason: VmExit['reason']): VmExit {
  assert.equal(stop.kind, 'exit', `expected a VM exit, got ${JSON.stringify(stop, plain)}`);
  assert(stop.kind === 'exit');
  assert.equal(stop.exit.reason, reason, JSON.stringify(stop.exit, plain));
  return stop.exit;
}

/** The value of a stop that must be a sync. */
export function syncOf(stop: L2Stop): number {
  assert.equal(stop.kind, 'sync', `expected a sync, got ${JSON.stringify(stop, plain)}`);
  assert(stop.kind === 'sync');
  return stop.value;
}

/** L2 ran exactly this much. */
export function progressOf(l2: L2, expected: Partial<L2['progress']>): void {
  const seen = l2.progress;
  const picked = Object.fromEntries(
    Object.keys(expected).map((key) => [key, seen[key as keyof typeof seen]]),
  );
  assert.deepEqual(picked, expected);
}

function plain(_key: string, value: unknown): unknown {
  return typeof value === 'bigint' ? `0x${value.toString(16)}` : value;
}
