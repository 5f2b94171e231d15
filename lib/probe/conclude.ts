// SPDX-License-Identifier: Apache-2.0
import type { HostProbe } from './host.ts';

/** One thing a user may want to do here, and whether this machine lets them. */
export interface Conclusion {
  readonly what: string;
  readonly possible: boolean;
  /** Why, and where it is not possible what to do about it. */
  readonly why: string;
}

/** In plain words: what can run on this machine itself. */
export function conclude(probe: HostProbe): Conclusion[] {
  const kvm = probe.kvm;
  const has = (name: string): boolean => (kvm.capabilities[name] ?? 0) > 0;
  const nested = probe.nestedVmx;
  const ifNested = (what: string, possible: boolean, yes: string, no: string): Conclusion =>
    nested.usable
      ? { what, possible, why: possible ? yes : no }
      : { what, possible: false, why: `needs nested VMX; ${nested.reason}` };
  const control = (name: string): boolean => probe.vmxControls[name] === true;
  return [
    {
      what: 'ordinary VMs',
      possible: kvm.device === 'ok',
      why: kvm.device === 'ok' ? `/dev/kvm opens (${kvm.backend ?? 'unknown backend'})` : (kvm.problem ?? ''),
    },
    { what: 'nested VMX (L1 and L2)', possible: nested.usable, why: nested.reason },
    ifNested(
      'APIC-access tests',
      control('secondary.virtualize-apic-accesses'),
      'L1 is offered "virtualize APIC accesses"',
      'L1 is not offered "virtualize APIC accesses"',
    ),
    ifNested(
      'VPID tests',
      control('secondary.enable-vpid'),
      'L1 is offered VPIDs',
      'L1 is not offered VPIDs',
    ),
    ifNested(
      'posted-interrupt tests',
      control('pin.process-posted-interrupts'),
      'L1 is offered posted interrupts',
      'L1 is not offered posted interrupts: kvm_intel.enable_apicv is off or the CPU lacks APICv',
    ),
    ifNested(
      'eVMCS tests',
      has('KVM_CAP_HYPERV_ENLIGHTENED_VMCS'),
      'KVM_CAP_HYPERV_ENLIGHTENED_VMCS is there',
      'KVM_CAP_HYPERV_ENLIGHTENED_VMCS is missing: the kernel needs CONFIG_KVM_HYPERV',
    ),
    {
      what: 'exact counts from binary statistics',
      possible: has('KVM_CAP_BINARY_STATS_FD'),
      why: has('KVM_CAP_BINARY_STATS_FD')
        ? 'KVM_CAP_BINARY_STATS_FD is there'
        : 'KVM_CAP_BINARY_STATS_FD is missing: a kernel from 5.14 on has it',
    },
  ];
}
