// SPDX-License-Identifier: Apache-2.0
// Dirty pages, by the log or by the ring.
import { L1 } from '../../guest/index.ts';
import { Kvm, type MemoryRegion, type Vm } from '../../kvm/index.ts';
import type { Requirement, SelftestContext } from '../engine/model.ts';
import { nestedVmx, vmxControl } from '../engine/requirements.ts';
import type { Machine } from './common.ts';

export const RING = 1024;
export const requires = [nestedVmx, vmxControl('secondary.enable-ept')];
export const dirtyRing: Requirement = {
  name: 'KVM_CAP_DIRTY_LOG_RING',
  missing: (probe) =>
    probe.kvm.capabilities['KVM_CAP_DIRTY_LOG_RING'] ||
    probe.kvm.capabilities['KVM_CAP_DIRTY_LOG_RING_ACQ_REL']
      ? undefined
      : 'KVM_CAP_DIRTY_LOG_RING is missing: a kernel from 5.11 on has it',
};

/** A machine whose VM is prepared before it has a vCPU. */
export async function bootPrepared(
  context: SelftestContext,
  prepare: (vm: Vm) => void,
  evmcs = false,
): Promise<Machine> {
  const kvm = Kvm.open();
  const close = () => kvm.close();
  context.signal.addEventListener('abort', close, { once: true });
  const dispose = async (): Promise<void> => {
    context.signal.removeEventListener('abort', close);
    close();
  };
  try {
    const vm = kvm.createVm();
    prepare(vm);
    const l1 = await L1.boot(vm, { signal: context.signal, evmcs });
    return { vm, l1, [Symbol.asyncDispose]: dispose };
  } catch (error) {
    await dispose();
    throw error;
  }
}

/** How dirty pages come out: each call gives those since the last one. */
export type Take = () => number[];

export function fromBitmap(region: MemoryRegion): Take {
  return () => region.dirtyPages();
}

/** Pages of one slot in ascending order, each once. */
export function fromRing(machine: Machine, region: MemoryRegion): Take {
  return () => {
    const pages = machine.l1.vcpus.flatMap(({ vcpu }) => vcpu.harvestDirtyRing());
    machine.vm.resetDirtyRings();
    const numbers = pages.filter(({ slot }) => slot === region.slot).map(({ page }) => page);
    return [...new Set(numbers)].sort((a, b) => a - b);
  };
}
