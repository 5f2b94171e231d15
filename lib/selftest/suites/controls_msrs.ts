// SPDX-License-Identifier: Apache-2.0
// The VMX capability MSRs (SDM vol. 3, appendix A): userspace may take from L1 what KVM offers, and nothing else.
import { type ControlName, foldChecksum, MissingControlError } from '../../guest/index.ts';
import { Kvm, KvmMsrError, type Vcpu } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Selftest, SelftestContext } from '../engine/model.ts';
import { nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, hex } from './common.ts';
import { CONTROL_FIELD } from './scenario.ts';
import { trace } from './trace.ts';

const FEAT_CTL = 0x3a;
const VMCS_ENUM = 0x48a;
const VMFUNC = 0x491;
const ALL_ONES = 0xffff_ffff_ffff_ffffn;
/** Lock, and VMX outside SMX: what KVM takes for every L1. */
const FEAT_CTL_TAKEN = [0, 2];
/** VMX inside SMX, SGX, LMCE: what KVM takes depends on its version and on the CPUID. */
const FEAT_CTL_OTHERS = [1, 17, 18, 20];

const range = (from: number, to: number): number[] =>
  Array.from({ length: to - from + 1 }, (_, i) => from + i);

interface Rule {
  readonly msr: number;
  /** Bits that describe a feature each: those that are set may be cleared and set again, no other be set. */
  readonly features?: readonly number[];
  /** Bits that say what must be 1: those that are clear may be set and cleared again, no other be cleared. */
  readonly musts?: readonly number[];
}

const allowed = (msr: number): Rule => ({ msr, musts: range(0, 31), features: range(32, 63) });

const RULES: readonly Rule[] = [
  // INS/OUTS information, true controls
  { msr: 0x480, features: [54, 55] },
  // IA-32e mode, activity states, RDMSR of SMBASE in SMM, VMWRITE to any field, injection with length 0
  { msr: 0x485, features: [5, 6, 7, 8, 15, 28, 29, 30] },
  allowed(0x48b),
  { msr: 0x48c, features: range(0, 63) },
  ...range(0x48d, 0x490).map(allowed),
  { msr: VMFUNC, features: range(0, 63) },
];

function takes(vcpu: Vcpu, msr: number, value: bigint): boolean {
  try {
    vcpu.setMsrs([[msr, value]]);
    return true;
  } catch (error) {
    if (error instanceof KvmMsrError) return false;
    throw error;
  }
}

/** Each bit flipped and flipped back; a text for each that was taken or refused against the rule. */
function tryBits(vcpu: Vcpu, { msr, features = [], musts = [] }: Rule): { wrong: string[]; tried: number } {
  const value = vcpu.getMsrs([msr]).get(msr) ?? 0n;
  const wrong: string[] = [];
  const flip = (bit: number, mayFlip: boolean): void => {
    const taken = takes(vcpu, msr, value ^ (1n << BigInt(bit)));
    const back = takes(vcpu, msr, value);
    if (taken !== mayFlip || !back) wrong.push(`${hex(msr)} bit ${bit}: ${taken ? 'taken' : 'refused'}`);
  };
  const isSet = (bit: number): boolean => ((value >> BigInt(bit)) & 1n) !== 0n;
  for (const bit of features) flip(bit, isSet(bit));
  for (const bit of musts) flip(bit, !isSet(bit));
  return { wrong, tried: features.length + musts.length };
}

async function writable(): Promise<{ observed: Observations; evidence: Observations }> {
  using kvm = Kvm.open();
  using vm = kvm.createVm();
  const vcpu = vm.createVcpu(0);
  vcpu.setCpuid(kvm.supportedCpuid());
  const tried = RULES.map((rule) => tryBits(vcpu, rule));
  const taken = range(0, 63).filter(
    (bit) => !FEAT_CTL_OTHERS.includes(bit) && takes(vcpu, FEAT_CTL, 1n << BigInt(bit)),
  );
  return {
    observed: {
      wrong: tried.flatMap(({ wrong }) => wrong),
      enumeration: [0n, ALL_ONES].map((value) => takes(vcpu, VMCS_ENUM, value)),
      featureControl: taken,
    },
    evidence: { tried: tried.reduce((sum, { tried: count }) => sum + count, 0) },
  };
}

/** A control of each group that L1 does not need, with the MSR and the bit that offers it. */
const TAKEN: readonly (readonly [ControlName, msr: number, bit: bigint])[] = [
  ['pin.nmi-exiting', 0x48d, 1n << 3n],
  ['primary.hlt-exiting', 0x48e, 1n << 7n],
  ['secondary.enable-vpid', 0x48b, 1n << 5n],
  ['exit.acknowledge-interrupt-on-exit', 0x48f, 1n << 15n],
  ['entry.load-debug-controls', 0x490, 1n << 2n],
];

/** L1's vCPU is told that it cannot have the control: VM entry must not take it either. */
async function withheld(
  context: SelftestContext,
  [control, msr, bit]: (typeof TAKEN)[number],
): Promise<{ observed: Observations }> {
  using kvm = Kvm.open();
  const offered = kvm.readFeatureMsrs([msr]).get(msr) ?? 0n;
  await using machine = await bootL1(context, { msrs: [[msr, offered & ~(bit << 32n)]] });
  const { l1 } = machine;
  const missing = await l1
    .createL2({ controls: [control] }, () => {})
    .then(
      () => 'nothing',
      (error) => (error instanceof MissingControlError ? 'the control' : String(error)),
    );
  const l2 = await l1.createL2({}, (program) => program.fold(7));
  const field = CONTROL_FIELD[control.split('.')[0] as keyof typeof CONTROL_FIELD];
  const value = await l2.vmread(field);
  await l2.vmwrite('VIRTUAL_PROCESSOR_ID', 1);
  await l2.vmwrite(field, value | bit);
  const set = (await trace(l2)).exits;
  await l2.vmwrite(field, value);
  const clear = (await trace(l2)).exits;
  const { executed, checksum } = l2.progress;
  return { observed: { missing, set, clear, executed, checksum: hex(checksum) } };
}

export const capabilityMsrs: readonly Selftest[] = [
  selftest({
    id: 'controls/capability-msrs/writable',
    title: 'userspace clears every bit that KVM offers L1 and sets it again; it cannot set another one',
    requires: [nestedVmx],
    expectations: { any: { wrong: [], enumeration: [true, true], featureControl: FEAT_CTL_TAKEN } },
    body: writable,
  }),
  ...TAKEN.map((taken) =>
    selftest({
      id: `controls/capability-msrs/${taken[0].replace('.', '/')}`,
      title: 'userspace withholds the control from L1: VM entry refuses it',
      requires: [nestedVmx, vmxControl(taken[0])],
      expectations: {
        any: {
          missing: 'the control',
          set: ['VMLAUNCH VMfailValid 7'],
          clear: ['vmcall'],
          executed: 1,
          checksum: hex(foldChecksum([7])),
        },
      },
      body: (context) => withheld(context, taken),
    }),
  ),
];
