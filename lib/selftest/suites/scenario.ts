// SPDX-License-Identifier: Apache-2.0
// One L2 under one L1, as data: what is in its VMCS, what it executes, what L1 must see.
import {
  type ControlGroup,
  type ControlName,
  type Ept,
  foldChecksum,
  type L1,
  type L1Vcpu,
  type L2,
  type L2Options,
  type L2Program,
  type PageTables,
  type VmcsField,
  type VmExit,
} from '../../guest/index.ts';
import type { Vm } from '../../kvm/index.ts';
import type { Change } from '../../probe/index.ts';
import { selftest } from '../engine/define.ts';
import type {
  ExpectationTable,
  Expected,
  Observations,
  Observed,
  Requirement,
  Selftest,
  SelftestContext,
} from '../engine/model.ts';
import { capability, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, hex } from './common.ts';
import { type TraceOptions, trace } from './trace.ts';

export const CONTROL_FIELD: Readonly<Record<ControlGroup, VmcsField>> = {
  pin: 'PIN_BASED_VM_EXEC_CONTROL',
  primary: 'CPU_BASED_VM_EXEC_CONTROL',
  secondary: 'SECONDARY_VM_EXEC_CONTROL',
  exit: 'VM_EXIT_CONTROLS',
  entry: 'VM_ENTRY_CONTROLS',
};

const RET = 0xc3;
/** mov eax, 0x5a: what code folds whose instruction in front was skipped or did nothing. */
export const MARK = [0xb8, 0x5a, 0, 0, 0] as const;
export const MARKED = [0x5a] as const;
const PAGE_SIZE = 4096;
/** Writes to this address are messages to the local APIC whose id is in bits 19:12. */
const MSI_BASE = 0xfee0_0000n;

/** What one run works with: a VM and an L1 of its own, and pages by name. */
export class Bench {
  readonly vm: Vm;
  readonly l1: L1;
  /** For two runs that differ in one bit: which of the two this is. */
  readonly isSet: boolean;
  readonly names: Record<string, number> = {};
  /** What a step leaves for a later one. */
  readonly notes: Record<string, bigint> = {};
  /** What a step found out. */
  readonly results: Record<string, Observed> = {};
  #l2: L2 | undefined;

  constructor(vm: Vm, l1: L1, isSet: boolean) {
    this.vm = vm;
    this.l1 = l1;
    this.isSet = isSet;
  }

  get cpu(): L1Vcpu {
    return this.l1.cpu(0);
  }

  get l2(): L2 {
    if (!this.#l2) throw new Error('the L2 is not made yet');
    return this.#l2;
  }

  set l2(l2: L2) {
    this.#l2 = l2;
  }

  /** A zeroed page of L1's memory, the same one each time for a name. */
  page(name: string): number {
    this.names[name] ??= this.l1.allocate();
    return this.names[name];
  }

  /** The bytes of a page. */
  view(name: string): DataView {
    const { buffer, byteOffset } = this.l1.bytes(this.page(name), PAGE_SIZE);
    return new DataView(buffer, byteOffset, PAGE_SIZE);
  }

  /** A function of machine code in L2's (and L1's) memory: RDI and RSI are its arguments, RAX its result. */
  code(...bytes: number[]): number {
    return this.l1.place(Uint8Array.from([...bytes, RET]));
  }

  /** Machine code without a way back, for an L2 that does not run the interpreter. */
  raw(name: string, ...bytes: number[]): number {
    this.names[name] ??= this.l1.place(Uint8Array.from(bytes));
    return this.names[name];
  }

  /** Writes the bit of a control of this L2. */
  async write(control: ControlName, on: boolean): Promise<void> {
    const controls = await this.l1.controls();
    const group = control.split('.')[0] as ControlGroup;
    const bit = BigInt.asUintN(32, BigInt(controls.value(group, [control]) & ~controls.value(group, [])));
    const field = CONTROL_FIELD[group];
    const value = await this.l2.vmread(field);
    await this.l2.vmwrite(field, on ? value | bit : value & ~bit);
  }

  /**
   * Changes the entry of a page as L1 itself would. KVM shadows L1's EPT, and L2's page tables without EPT, and sees
   * what a vCPU writes there; a write of the host goes unnoticed, and INVEPT alone does not bring it to light.
   * @param edit changes this one entry and no other: split() first
   * @param cpu the L1 vCPU that writes: another one while L2 is active
   */
  async byL1(tree: Ept | PageTables, gpa: number, edit: () => void, cpu = this.cpu): Promise<void> {
    const { at, value: old } = tree.entry(gpa);
    edit();
    const { value } = tree.entry(gpa);
    new DataView(this.l1.memory.buffer).setBigUint64(at, old, true);
    await cpu.write(at, 8, value);
  }

  /** Makes an interrupt pending in L1's local APIC; x2apicEnable() must have turned that on. */
  interrupt(vector: number): void {
    this.vm.signalMsi({ address: MSI_BASE, data: vector });
  }
}

/** What is right. */
export interface Variant {
  /** As {@link trace} writes them. */
  readonly exits: readonly string[] | { readonly oneOf: readonly (readonly string[])[] };
  /** Operations L2 completed; left out for raw machine code. */
  readonly executed?: number;
  /** What L2 folded, in order; left out where `more` judges it. */
  readonly values?: readonly (bigint | number)[];
  readonly more?: ExpectationTable;
}

export interface Scenario {
  /** Controls that are on. */
  readonly needs?: readonly ControlName[];
  readonly requires?: readonly Requirement[];
  /** vCPUs of L1; default 1. */
  readonly vcpus?: number;
  /** L1 with Hyper-V's enlightenments, L2 on an eVMCS. */
  readonly evmcs?: boolean;
  readonly options?: (bench: Bench) => L2Options | Promise<L2Options>;
  readonly program?: (program: L2Program, bench: Bench) => unknown;
  /** With the VMCS made and everything in place. */
  readonly before?: (bench: Bench) => unknown;
  readonly trace?: (bench: Bench) => TraceOptions;
  /** What else is judged. */
  readonly after?: (bench: Bench, last: VmExit | undefined) => Promise<Observations> | Observations;
}

/** Hyper-V's enlightened VMCS for L1. */
export const enlightenedVmcs = capability(
  'KVM_CAP_HYPERV_ENLIGHTENED_VMCS',
  'kvm_intel of a kernel with CONFIG_KVM_HYPERV has it',
);

/** The expectations of one run, their names after `prefix`. */
function tableOf(prefix: string, variant: Variant): Record<string, Expected> {
  const name = (text: string): string =>
    prefix === '' ? text : `${prefix}${text[0]?.toUpperCase()}${text.slice(1)}`;
  const table: Record<string, Expected> = { [name('exits')]: variant.exits };
  if (variant.executed !== undefined) table[name('executed')] = variant.executed;
  if (variant.values !== undefined) table[name('checksum')] = hex(foldChecksum(variant.values));
  for (const [key, value] of Object.entries(variant.more ?? {})) table[name(key)] = value;
  return table;
}

async function run(
  context: SelftestContext,
  scenario: Scenario,
  variant: Variant,
  subject?: { control: ControlName; isSet: boolean },
): Promise<Record<string, Observed>> {
  await using machine = await bootL1(context, {
    vcpus: scenario.vcpus ?? 1,
    evmcs: scenario.evmcs ?? false,
  });
  const bench = new Bench(machine.vm, machine.l1, subject?.isSet ?? true);
  const options = (await scenario.options?.(bench)) ?? {};
  const controls = [...(scenario.needs ?? []), ...(options.controls ?? [])];
  bench.l2 = await bench.l1.createL2({ ...options, controls, evmcs: scenario.evmcs ?? false }, (program) =>
    scenario.program?.(program, bench),
  );
  if (subject) await bench.write(subject.control, subject.isSet);
  await scenario.before?.(bench);
  const { exits, last } = await trace(bench.l2, {
    names: bench.names,
    signal: context.signal,
    ...scenario.trace?.(bench),
  });
  const observed: Record<string, Observed> = { exits };
  if (variant.executed !== undefined) observed['executed'] = bench.l2.progress.executed;
  if (variant.values !== undefined) observed['checksum'] = hex(bench.l2.progress.checksum);
  return { ...observed, ...(await scenario.after?.(bench, last)) };
}

function requirements(scenario: Scenario, more: readonly ControlName[] = []): Requirement[] {
  const controls = new Set<ControlName>(['secondary.enable-ept', ...more, ...(scenario.needs ?? [])]);
  const requires = [nestedVmx, ...[...controls].map(vmxControl), ...(scenario.requires ?? [])];
  return scenario.evmcs ? [...requires, enlightenedVmcs] : requires;
}

export interface ScenarioCase extends Scenario {
  readonly id: string;
  readonly title: string;
  readonly expect: Variant;
  /** Where a kernel with the series has another right answer. */
  readonly patched?: Variant & { readonly change: Change };
}

/** A test of one run. */
export function scenarioTest(scenario: ScenarioCase): Selftest {
  return selftest({
    id: scenario.id,
    title: scenario.title,
    requires: requirements(scenario),
    expectations: scenario.patched
      ? {
          change: scenario.patched.change,
          stock: tableOf('', scenario.expect),
          patched: tableOf('', scenario.patched),
        }
      : { any: tableOf('', scenario.expect) },
    body: async (context) => ({ observed: await run(context, scenario, scenario.expect) }),
  });
}

export interface ControlCase extends Scenario {
  readonly control: ControlName;
  /** Tells several cases of one control apart. */
  readonly variant?: string;
  readonly title: string;
  readonly set: Variant;
  readonly clear: Variant;
}

/** A test of two runs that differ in nothing but one control: `controls/<group>/<control>[/<variant>]`. */
export function controlTest(subject: ControlCase): Selftest {
  const { control, variant, title, set, clear } = subject;
  return selftest({
    id: `controls/${control.replace('.', '/')}${variant === undefined ? '' : `/${variant}`}`,
    title,
    requires: requirements(subject, [control]),
    expectations: { any: { ...tableOf('set', set), ...tableOf('clear', clear) } },
    body: async (context) => {
      const observed: Record<string, Observed> = {};
      for (const [prefix, expected] of [
        ['set', set],
        ['clear', clear],
      ] as const) {
        const seen = await run(context, subject, expected, { control, isSet: prefix === 'set' });
        for (const [key, value] of Object.entries(seen)) {
          observed[`${prefix}${key[0]?.toUpperCase()}${key.slice(1)}`] = value;
        }
      }
      return { observed };
    },
  });
}
