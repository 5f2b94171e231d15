// SPDX-License-Identifier: Apache-2.0
import { IRQ_CHIPS } from './abi/irq.ts';
import { VcpuBusyError } from './errors.ts';
import type { Vm } from './vm.ts';

function requireIdle(vm: Vm): void {
  if (vm.vcpus.some((vcpu) => vcpu.state === 'running')) throw new VcpuBusyError();
}

function requireReadable(vm: Vm): void {
  if (vm.hasPrivateMemory)
    throw new RangeError(
      'this VM has private memory, whose contents only its guest can read: make it shared (setMemoryPrivate) first',
    );
}

/** What is neither memory nor a vCPU. */
function copyDevices(source: Vm, target: Vm): void {
  if (source.irqchip === 'kernel') {
    for (const chip of IRQ_CHIPS) target.setIrqchip(source.getIrqchip(chip));
    if (source.setup.some(({ request }) => request === 'KVM_CREATE_PIT2')) target.setPit(source.getPit());
  }
  target.setClock({ clock: source.getClock().clock });
}

/** Memslots and vCPUs, for a comparison. */
function shape(vm: Vm): string {
  const slots = vm.memory.regions.map(({ slot, gpa, size }) => `${slot}: ${gpa.toString(16)} + ${size}`);
  return `memslots ${slots.sort().join(', ')}; vCPUs ${vm.vcpus.map(({ id }) => id).join(', ')}`;
}

/** The body of `Vm.rewind`. */
export function rewindTo(vm: Vm, to: Vm): void {
  requireIdle(vm);
  requireIdle(to);
  requireReadable(vm);
  requireReadable(to);
  if (shape(vm) !== shape(to)) {
    throw new RangeError(`this VM cannot become that one: it has ${shape(vm)}, the other ${shape(to)}`);
  }
  // Before anything is copied: this completes accesses, which may write memory.
  const snapshots = new Map(to.vcpus.map((vcpu) => [vcpu.id, vcpu.save()]));
  const sources = new Map(to.memory.regions.map((region) => [region.slot, region]));
  for (const region of vm.memory.regions) region.overwriteFrom(sources.get(region.slot)!);
  copyDevices(to, vm);
  for (const vcpu of vm.vcpus) vcpu.restore(snapshots.get(vcpu.id)!);
}

/** The body of `Kvm.cloneVm`: makes the fresh VM `clone` like `source`. */
export function cloneInto(source: Vm, clone: Vm): void {
  requireIdle(source);
  requireReadable(source);
  // Before anything is copied: this completes accesses, which may write memory.
  const vcpus = source.vcpus.map((vcpu) => ({ snapshot: vcpu.save(), enabled: vcpu.enabledCaps }));
  for (const { request, argument } of source.setup) clone.ioctl(request, argument);
  for (const region of source.memory.regions) {
    const { gpa, size, slot, readOnly, logDirtyPages, backingSpec } = region;
    const backing = region.backing === 'file' ? 'anonymous' : backingSpec;
    clone.memory.add({ gpa, size, slot, readOnly, logDirtyPages, backing }).copyFrom(region);
  }
  copyDevices(source, clone);
  // All exist before one is restored: LAPICs of one VM know each other.
  const created = vcpus.map(({ snapshot, enabled }) => {
    const vcpu = clone.createVcpu(snapshot.id);
    for (const bytes of enabled.caps) vcpu.ioctl('KVM_ENABLE_CAP', bytes);
    if (enabled.evmcs) vcpu.enableEnlightenedVmcs();
    return { vcpu, snapshot };
  });
  for (const { vcpu, snapshot } of created) vcpu.restore(snapshot);
}
