// SPDX-License-Identifier: Apache-2.0

import { type ControlName, MissingControlError } from '../../guest/index.ts';
import { type CapabilityName, KvmUnsupportedError } from '../../kvm/index.ts';
import type { Requirement } from './model.ts';

/** /dev/kvm opens and is driven by kvm_intel with nesting on. */
export const nestedVmx: Requirement = {
  name: 'nested VMX',
  missing: (probe) => (probe.nestedVmx.usable ? undefined : `nested VMX: ${probe.nestedVmx.reason}`),
};

/** A VMX control the kernel must offer L1, by its name in the probe, such as `secondary.enable-vpid`. */
export function vmxControl(name: ControlName): Requirement {
  return {
    name: `VMX control ${name}`,
    missing: (probe) =>
      probe.vmxControls[name]
        ? undefined
        : `VMX control ${name} is not offered to L1 by this kernel and CPU (see nvmx probe)`,
  };
}

/** What KVM_CHECK_EXTENSION must know; `advice` says where it is to be had. */
export function capability(name: CapabilityName, advice: string): Requirement {
  return {
    name,
    missing: ({ kvm }) => (kvm.capabilities[name] ? undefined : `${name} is missing: ${advice}`),
  };
}

/** Binary statistics by file descriptor: counts of nested entries come from there. */
export const binaryStats = capability('KVM_CAP_BINARY_STATS_FD', 'a kernel from 5.14 on has it');

/** A test found out for itself that it cannot run here. */
export class SkipError extends Error {
  override readonly name = 'SkipError';
}

/** A kernel without a known defect that would fail the test; `defect` says what older ones do. */
export function kernelFrom(major: number, minor: number, defect: string): Requirement {
  return {
    name: `Linux ${major}.${minor}`,
    missing: ({ kernel }) => {
      const [, has = 0, hasMinor = 0] = (/^(\d+)\.(\d+)/.exec(kernel.release) ?? []).map(Number);
      return has > major || (has === major && hasMinor >= minor)
        ? undefined
        : `needs Linux ${major}.${minor}: older kernels ${defect}`;
    },
  };
}

/** True for an error that means "this machine lacks a feature", which a test turns into a skip. */
export function isMissingFeature(error: unknown): error is Error {
  return (
    error instanceof SkipError || error instanceof KvmUnsupportedError || error instanceof MissingControlError
  );
}
