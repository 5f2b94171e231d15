// SPDX-License-Identifier: Apache-2.0
// VMX execution controls by name, and which of them a CPU (or KVM, for L1) allows.
import { MissingControlError } from './errors.ts';

const MSR_VMX_BASIC = 0x480;
const BASIC_TRUE_CONTROLS = 1n << 55n;

/** IA32_VMX_BASIC to IA32_VMX_VMFUNC: the MSRs that describe VMX (SDM vol. 3, appendix A). */
export const VMX_CAPABILITY_MSRS: readonly number[] = Array.from({ length: 18 }, (_, i) => MSR_VMX_BASIC + i);

interface Group {
  readonly msr: number;
  readonly trueMsr?: number;
  readonly bits: Readonly<Record<string, number>>;
}

/** Bit numbers, SDM vol. 3, 25.6 to 25.8. */
const GROUPS = {
  pin: {
    msr: 0x481,
    trueMsr: 0x48d,
    bits: {
      'external-interrupt-exiting': 0,
      'nmi-exiting': 3,
      'virtual-nmis': 5,
      'activate-vmx-preemption-timer': 6,
      'process-posted-interrupts': 7,
    },
  },
  primary: {
    msr: 0x482,
    trueMsr: 0x48e,
    bits: {
      'interrupt-window-exiting': 2,
      'use-tsc-offsetting': 3,
      'hlt-exiting': 7,
      'invlpg-exiting': 9,
      'mwait-exiting': 10,
      'rdpmc-exiting': 11,
      'rdtsc-exiting': 12,
      'cr3-load-exiting': 15,
      'cr3-store-exiting': 16,
      'cr8-load-exiting': 19,
      'cr8-store-exiting': 20,
      'use-tpr-shadow': 21,
      'nmi-window-exiting': 22,
      'mov-dr-exiting': 23,
      'unconditional-io-exiting': 24,
      'use-io-bitmaps': 25,
      'monitor-trap-flag': 27,
      'use-msr-bitmaps': 28,
      'monitor-exiting': 29,
      'pause-exiting': 30,
      'activate-secondary-controls': 31,
    },
  },
  secondary: {
    msr: 0x48b,
    bits: {
      'virtualize-apic-accesses': 0,
      'enable-ept': 1,
      'descriptor-table-exiting': 2,
      'enable-rdtscp': 3,
      'virtualize-x2apic-mode': 4,
      'enable-vpid': 5,
      'wbinvd-exiting': 6,
      'unrestricted-guest': 7,
      'apic-register-virtualization': 8,
      'virtual-interrupt-delivery': 9,
      'pause-loop-exiting': 10,
      'rdrand-exiting': 11,
      'enable-invpcid': 12,
      'enable-vm-functions': 13,
      'vmcs-shadowing': 14,
      'rdseed-exiting': 16,
      'enable-pml': 17,
      'enable-xsaves-xrstors': 20,
      'use-tsc-scaling': 25,
    },
  },
  exit: {
    msr: 0x483,
    trueMsr: 0x48f,
    bits: {
      'save-debug-controls': 2,
      'host-address-space-size': 9,
      'load-ia32-perf-global-ctrl': 12,
      'acknowledge-interrupt-on-exit': 15,
      'save-ia32-pat': 18,
      'load-ia32-pat': 19,
      'save-ia32-efer': 20,
      'load-ia32-efer': 21,
      'save-vmx-preemption-timer': 22,
    },
  },
  entry: {
    msr: 0x484,
    trueMsr: 0x490,
    bits: {
      'load-debug-controls': 2,
      'ia-32e-mode-guest': 9,
      'load-ia32-perf-global-ctrl': 13,
      'load-ia32-pat': 14,
      'load-ia32-efer': 15,
    },
  },
} as const satisfies Record<string, Group>;

type Groups = typeof GROUPS;
export type ControlGroup = keyof Groups;
/** `secondary.enable-ept` and so on: the group, then the SDM's name of the control in kebab case. */
export type ControlName = { [G in ControlGroup]: `${G}.${keyof Groups[G]['bits'] & string}` }[ControlGroup];

interface Place {
  readonly group: ControlGroup;
  readonly bit: number;
}
const places = new Map<ControlName, Place>();

function bitOf(name: ControlName): Place {
  const known = places.get(name);
  if (known) return known;
  const [group, control] = name.split('.') as [ControlGroup, string];
  const bits: Readonly<Record<string, number>> | undefined = GROUPS[group]?.bits;
  const bit = bits?.[control];
  if (bit === undefined) throw new TypeError(`"${name}" is not a VMX control`);
  const place = { group, bit };
  places.set(name, place);
  return place;
}

/** Which settings of the controls are allowed, from the values of {@link VMX_CAPABILITY_MSRS}. */
export class VmxControls {
  /** The VMCS revision identifier, for the first word of a VMXON region or VMCS. */
  readonly revision: number;
  /** Bits that must be 1, and those that may be. */
  readonly #allowed: Readonly<Record<ControlGroup, { readonly zero: number; readonly one: number }>>;

  /** @param msrs values by MSR number; a missing one counts as "nothing there is allowed" */
  constructor(msrs: ReadonlyMap<number, bigint>) {
    const basic = msrs.get(MSR_VMX_BASIC) ?? 0n;
    const hasTrue = (basic & BASIC_TRUE_CONTROLS) !== 0n;
    const allowed = (group: ControlGroup) => {
      const { msr, trueMsr }: Group = GROUPS[group];
      const value = msrs.get(hasTrue && trueMsr !== undefined ? trueMsr : msr) ?? 0n;
      return { zero: Number(value & 0xffff_ffffn), one: Number(value >> 32n) };
    };
    const primary = allowed('primary');
    const secondary = allowed('secondary');
    const { bit } = bitOf('primary.activate-secondary-controls');
    if ((primary.one & (1 << bit)) === 0) secondary.one = 0;
    this.revision = Number(basic & 0x7fff_ffffn);
    this.#allowed = {
      pin: allowed('pin'),
      primary,
      secondary,
      exit: allowed('exit'),
      entry: allowed('entry'),
    };
  }

  /** Whether a control may be 1. */
  allows(name: ControlName): boolean {
    const { group, bit } = bitOf(name);
    return (this.#allowed[group].one & (1 << bit)) !== 0;
  }

  /**
   * The VMCS fields of all groups with the wanted controls and those that must be 1.
   * @throws MissingControlError for a control that must be 0
   */
  values(wanted: readonly ControlName[]): Record<ControlGroup, number> {
    const allowed = this.#allowed;
    const values = {
      pin: allowed.pin.zero,
      primary: allowed.primary.zero,
      secondary: allowed.secondary.zero,
      exit: allowed.exit.zero,
      entry: allowed.entry.zero,
    };
    for (const name of wanted) {
      const { group, bit } = bitOf(name);
      if ((allowed[group].one & (1 << bit)) === 0) throw new MissingControlError(name);
      values[group] = (values[group] | (1 << bit)) >>> 0;
    }
    return values;
  }

  /** The same of one group. */
  value(group: ControlGroup, wanted: readonly ControlName[]): number {
    return this.values(wanted.filter((name) => bitOf(name).group === group))[group];
  }
}

/** Every control by name and whether it may be 1, from the values of {@link VMX_CAPABILITY_MSRS}. */
export function offeredControls(msrs: ReadonlyMap<number, bigint>): Record<ControlName, boolean> {
  const controls = new VmxControls(msrs);
  const offered = {} as Record<ControlName, boolean>;
  for (const group of Object.keys(GROUPS) as ControlGroup[]) {
    for (const control of Object.keys(GROUPS[group].bits)) {
      const name = `${group}.${control}` as ControlName;
      offered[name] = controls.allows(name);
    }
  }
  return offered;
}
