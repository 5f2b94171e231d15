// SPDX-License-Identifier: Apache-2.0
// States that KVM_SET_NESTED_STATE must refuse, each with its errno.
import { selftest } from '../engine/define.ts';
import type { Selftest } from '../engine/model.ts';
import { bootL1, hex } from './common.ts';
import {
  Copy,
  DEADLINE,
  FLAG,
  HEADER,
  NONE,
  outsideVmx,
  SMM,
  type StatePatch,
  stateDiffers,
  stateText,
  trySet,
  withFields,
  withFlags,
} from './nested_state_common.ts';
import { CHECKSUM, makeL2, requires, SMALL } from './nested_state_where.ts';

const FORMAT_SVM = 1;
const UNALIGNED = 0x1234;
const BEYOND = 1n << 60n;

interface Row {
  readonly name: string;
  /** What it is made of; default the state of an active L2. */
  readonly from?: 'active' | 'current' | 'outside';
  readonly patch: StatePatch;
  readonly cut?: number;
}

/** Refused before anything is touched: the vCPU's state stays as it was. */
const HEADERS: readonly Row[] = [
  { name: 'size 0', patch: { size: 0 } },
  { name: 'size below the header', patch: { size: HEADER - 1 } },
  { name: 'format of SVM', patch: { format: FORMAT_SVM } },
  { name: 'unknown format', patch: { format: 7 } },
  { name: 'unknown flag', patch: { flags: FLAG.guestMode | 0x10 } },
  { name: 'run pending outside guest mode', patch: { flags: FLAG.runPending } },
  { name: 'eVMCS without the capability', patch: { flags: FLAG.evmcs, vmcs12: NONE } },
  { name: 'vmcs12 without VMXON', from: 'outside', patch: { vmcs12: 0x3000 } },
  { name: 'guest mode without VMXON', from: 'outside', patch: { flags: FLAG.guestMode } },
  { name: 'SMM without VMXON', from: 'outside', patch: { smmFlags: SMM.vmxon } },
  { name: 'VMXON region unaligned', patch: { vmxon: UNALIGNED } },
  { name: 'VMXON region beyond MAXPHYADDR', patch: { vmxon: BEYOND } },
  { name: 'SMM from guest mode', patch: { smmFlags: SMM.guestMode | SMM.vmxon } },
  { name: 'SMM flags outside SMM', from: 'current', patch: { smmFlags: SMM.vmxon } },
  { name: 'SMM guest mode without its VMXON', from: 'current', patch: { smmFlags: SMM.guestMode } },
  { name: 'unknown SMM flag', from: 'current', patch: { smmFlags: 4 } },
  { name: 'unknown VMX flag', patch: { vmxFlags: DEADLINE << 1 } },
];

/** Refused later: L2 is gone by then. */
const CONTENTS: readonly Row[] = [
  { name: 'vmcs12 is the VMXON region', patch: {} },
  { name: 'vmcs12 unaligned', patch: { vmcs12: UNALIGNED } },
  { name: 'vmcs12 beyond MAXPHYADDR', patch: { vmcs12: BEYOND } },
  { name: 'room for a vmcs12 and none', from: 'current', patch: { vmcs12: NONE } },
  { name: 'vmcs12 and no room for it', from: 'current', patch: { size: HEADER }, cut: HEADER },
  { name: 'vmcs12 cut off', from: 'current', patch: { size: HEADER + 512 }, cut: HEADER + 512 },
  { name: 'guest mode in a header alone', patch: { size: HEADER, vmcs12: NONE }, cut: HEADER },
  { name: 'revision of vmcs12', patch: { revision: 0x1234 } },
];

const kept = 'EINVAL kept';

export const refused: readonly Selftest[] = [
  selftest({
    id: 'nested-state/set/refused',
    title: 'states with wrong sizes, formats, flags and addresses; L2 then goes on from the right one',
    requires,
    expectations: {
      any: {
        headers: HEADERS.map(({ name }) => `${name}: ${kept}`),
        contents: CONTENTS.map(({ name }) => `${name}: EINVAL`),
        fields: ['guest: EINVAL', 'host: EINVAL', 'controls: EINVAL', 'no VMX in CPUID: EINVAL'],
        stops: ['vmcall'],
        executed: 6,
        checksum: CHECKSUM,
      },
    },
    body: async (context) => {
      const { signal } = context;
      await using machine = await bootL1(context, SMALL);
      const { l1, vm } = machine;
      const { vcpu } = l1.cpu(0);
      const l2 = await makeL2(l1);
      const current = vcpu.getNestedState();
      // Fields that VM entry would refuse: written by L1, so that the offset in vmcs12 is KVM's own business
      const spoiled: [string, Uint8Array][] = [];
      for (const [name, field, value] of [
        ['guest', 'VMCS_LINK_POINTER', 0x123n],
        ['host', 'HOST_CS_SELECTOR', 0n],
        ['controls', 'CR3_TARGET_COUNT', 300n],
      ] as const) {
        const right = await l2.vmread(field);
        await l2.vmwrite(field, value);
        spoiled.push([name, withFlags(vcpu.getNestedState(), FLAG.guestMode)]);
        await l2.vmwrite(field, right);
      }
      await l2.enter({ signal });
      await l2.enter({ signal });
      const snapshot = vcpu.save();
      const active = vcpu.getNestedState();
      const make = ({ from = 'active', patch, cut, name }: Row): Uint8Array => {
        const base = { active, current, outside: outsideVmx() }[from];
        const vmxon = name === 'vmcs12 is the VMXON region' ? { vmcs12: l1.cpu(0).vmxonRegion } : {};
        return withFields(base, { ...vmxon, ...patch }).slice(0, cut);
      };
      const headers = HEADERS.map((row) => {
        const errno = trySet(vcpu, make(row));
        const same = stateDiffers(vcpu.getNestedState(), active) === 0;
        return `${row.name}: ${errno} ${same ? 'kept' : stateText(vcpu.getNestedState())}`;
      });
      const contents = CONTENTS.map((row) => `${row.name}: ${trySet(vcpu, make(row))}`);
      const fields = spoiled.map(([name, bytes]) => `${name}: ${trySet(vcpu, bytes)}`);
      const plain = vm.createVcpu(1);
      fields.push(`no VMX in CPUID: ${trySet(plain, current)}`);
      plain.close();
      vcpu.restore(snapshot);
      const copy = new Copy(vcpu, l1.memory.buffer, l2);
      const stops = await copy.finish(signal, true);
      const proof = { stops, executed: copy.executed, checksum: hex(copy.checksum) };
      return { observed: { headers, contents, fields, ...proof } };
    },
  }),
];
