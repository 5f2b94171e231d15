// SPDX-License-Identifier: Apache-2.0
// KVM_GET_SUPPORTED_HV_CPUID: the leaves that tell L1 of the enlightened VMCS (TLFS, appendix A).
import { type CpuidEntry, Kvm, type Vcpu } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Observed, Selftest } from '../engine/model.ts';
import { nestedVmx } from '../engine/requirements.ts';
import { hex } from './common.ts';
import { enlightenedVmcs } from './scenario.ts';

const BASE = 0x4000_0000;
const FEATURES = 0x4000_0003;
const RECOMMENDATIONS = 0x4000_0004;
const NESTED = 0x4000_000a;
const LAST = 0x4000_0082;
const DIRECT_TIMERS = 1 << 19;
const CLUSTER_IPI = 1 << 10;
const MSR_BITMAP = 1 << 19;
/** Oldest and newest version. */
const VERSIONS = 0x101;

interface Leaves {
  readonly entries: readonly CpuidEntry[];
  leaf(number: number): CpuidEntry;
}

function leavesOf(vcpu: Vcpu): Leaves {
  const entries = vcpu.supportedHvCpuid();
  return {
    entries,
    leaf: (number) => {
      const entry = entries.find((one) => one.function === number);
      if (!entry) throw new Error(`there is no leaf ${hex(number)}`);
      return entry;
    },
  };
}

/** What needs an in-kernel APIC. */
const apicFeatures = ({ leaf }: Leaves): Observed => [
  (leaf(FEATURES).edx & DIRECT_TIMERS) !== 0,
  (leaf(RECOMMENDATIONS).eax & CLUSTER_IPI) !== 0,
];

async function look(): Promise<{ observed: Observations }> {
  using kvm = Kvm.open();
  using bare = kvm.createVm();
  using vm = kvm.createVm();
  vm.createIrqchip();
  const withoutApic = leavesOf(bare.createVcpu(0));
  const vcpu = vm.createVcpu(0);
  const before = leavesOf(vcpu);
  vcpu.enableEnlightenedVmcs();
  const enabled = leavesOf(vcpu);
  return {
    observed: {
      leaves: enabled.entries.map((entry) => hex(entry.function)),
      plain: enabled.entries.every(({ index, flags }) => index === 0 && flags === 0),
      last: hex(enabled.leaf(BASE).eax),
      msrBitmap: (before.leaf(NESTED).eax & MSR_BITMAP) !== 0,
      versions: [before, enabled].map(({ leaf }) => leaf(NESTED).eax & 0xffff),
      apicFeatures: [apicFeatures(withoutApic), apicFeatures(enabled)],
    },
  };
}

export const evmcsCpuid: readonly Selftest[] = [
  selftest({
    id: 'evmcs/cpuid',
    title: 'the Hyper-V leaves name the eVMCS when it is enabled, and what needs an APIC only with one',
    requires: [nestedVmx, enlightenedVmcs],
    expectations: {
      any: {
        leaves: [0, 1, 2, 3, 4, 5, 0x80, 0x81, 0x82, 10].map((leaf) => hex(BASE + leaf)),
        plain: true,
        last: hex(LAST),
        msrBitmap: true,
        versions: [0, VERSIONS],
        apicFeatures: [
          [false, false],
          [true, true],
        ],
      },
    },
    body: look,
  }),
];
