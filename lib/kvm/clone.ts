// SPDX-License-Identifier: Apache-2.0
import { IRQ_CHIPS } from './abi/irq.ts';
import { VcpuBusyError } from './errors.ts';
import type { Vm } from './vm.ts';

/** The body of `Kvm.cloneVm`: makes the fresh VM `clone` like `source`. */
export function cloneInto(source: Vm, clone: Vm): void {
  if (source.vcpus.some((vcpu) => vcpu.state === 'running')) throw new VcpuBusyError();
  // Before anything is copied: this completes accesses, which may write memory.
  const vcpus = source.vcpus.map((vcpu) => ({ snapshot: vcpu.save(), enabled: vcpu.enabledCaps }));
  for (const { request, argument } of source.setup) clone.ioctl(request, argument);
  for (const region of source.memory.regions) {
    const { gpa, size, slot, readOnly, logDirtyPages, backingSpec } = region;
    const backing = region.backing === 'file' ? 'anonymous' : backingSpec;
    clone.memory.add({ gpa, size, slot, readOnly, logDirtyPages, backing }).copyFrom(region);
  }
  if (source.irqchip === 'kernel') {
    for (const chip of IRQ_CHIPS) clone.setIrqchip(source.getIrqchip(chip));
    if (source.setup.some(({ request }) => request === 'KVM_CREATE_PIT2')) clone.setPit(source.getPit());
  }
  clone.setClock({ clock: source.getClock().clock });
  // All exist before one is restored: LAPICs of one VM know each other.
  const created = vcpus.map(({ snapshot, enabled }) => {
    const vcpu = clone.createVcpu(snapshot.id);
    for (const bytes of enabled.caps) vcpu.ioctl('KVM_ENABLE_CAP', bytes);
    if (enabled.evmcs) vcpu.enableEnlightenedVmcs();
    return { vcpu, snapshot };
  });
  for (const { vcpu, snapshot } of created) vcpu.restore(snapshot);
}
