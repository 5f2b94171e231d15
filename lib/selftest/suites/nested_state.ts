// SPDX-License-Identifier: Apache-2.0
// KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE.
import { Batch } from '../../guest/index.ts';
import { selftest } from '../engine/define.ts';
import type { Selftest, Suite } from '../engine/model.ts';
import { bootL1, hex } from './common.ts';
import {
  Copy,
  differing,
  HEADER,
  outcome,
  outsideVmx,
  placesOf,
  stateText,
  WITH_VMCS12,
} from './nested_state_common.ts';
import { enlightened } from './nested_state_evmcs.ts';
import { pending } from './nested_state_pending.ts';
import { racing } from './nested_state_racing.ts';
import { refused } from './nested_state_refused.ts';
import { crashes, systemManagement } from './nested_state_smm.ts';
import { CHECKSUM, makeL2, requires, SMALL, where } from './nested_state_where.ts';

const stages = selftest({
  id: 'nested-state/get/stages',
  title: 'the state follows L1 from VMXON to VMXOFF; too little room is E2BIG',
  requires,
  expectations: {
    any: {
      states: [
        `size=${HEADER}`,
        `size=${HEADER} vmxon=region`,
        `size=${WITH_VMCS12} vmxon=region vmcs12=l2`,
        `size=${WITH_VMCS12} vmxon=region vmcs12=l2`,
        `size=${WITH_VMCS12} flags=guestMode vmxon=region vmcs12=l2`,
        `size=${WITH_VMCS12} vmxon=region vmcs12=l2`,
        `size=${HEADER} vmxon=region`,
        `size=${HEADER}`,
      ],
      room: ['ok', 'E2BIG', 'E2BIG', 'ok'],
      // What VMCLEAR left in memory is the vmcs12 of the last state, but not launched any more
      memoryDiffers: 1,
      launchedDiffers: true,
      executed: 6,
    },
  },
  body: async (context) => {
    await using machine = await bootL1(context, SMALL);
    const { l1 } = machine;
    const cpu = l1.cpu(0);
    const { signal } = context;
    const bytes = [cpu.vcpu.getNestedState()];
    const take = () => bytes.push(cpu.vcpu.getNestedState());
    const room = [outcome(() => cpu.vcpu.getNestedState(HEADER))];
    await l1.vmxon();
    take();
    const l2 = await makeL2(l1);
    take();
    for (const size of [HEADER, WITH_VMCS12 - 1, WITH_VMCS12]) {
      room.push(outcome(() => cpu.vcpu.getNestedState(size)));
    }
    await l2.enter({ signal });
    take();
    await l2.enter({ signal });
    take();
    await l2.continue({ signal });
    take();
    const vmcs12 = (state: number) => bytes[state]!.subarray(HEADER);
    await l2.vmclear();
    const memoryDiffers = differing(l1.bytes(l2.vmcs, WITH_VMCS12 - HEADER), vmcs12(5)).length;
    const launchedDiffers = differing(vmcs12(2), vmcs12(3)).length > 0;
    take();
    await cpu.vmxoff();
    take();
    const states = bytes.map((one) => stateText(one, placesOf(l1, l2)));
    return {
      observed: { states, room, memoryDiffers, launchedDiffers, executed: l2.progress.executed },
    };
  },
});

const headerOnly = selftest({
  id: 'nested-state/set/header-only',
  title: 'a header alone puts a vCPU into VMX operation and out of it; what memory holds of a VMCS stays',
  requires,
  expectations: {
    any: {
      states: [`size=${HEADER} vmxon=region`, `size=${HEADER}`, `size=${HEADER} vmxon=region`],
      vmptrst: ['ok', 'fault', 'ok'],
      stops: ['vmcall', 'sync 1', 'vmcall'],
      executed: 6,
      checksum: CHECKSUM,
    },
  },
  body: async (context) => {
    await using machine = await bootL1(context, SMALL);
    const { l1 } = machine;
    const cpu = l1.cpu(0);
    const l2 = await makeL2(l1);
    await l2.vmclear();
    const header = cpu.vcpu.getNestedState();
    const states: string[] = [];
    const vmptrst: string[] = [];
    for (const bytes of [header, outsideVmx(), header]) {
      cpu.vcpu.setNestedState(bytes);
      states.push(stateText(cpu.vcpu.getNestedState(), placesOf(l1, l2)));
      vmptrst.push((await cpu.execute(new Batch().vmptrst()))[0]!.status);
    }
    const copy = new Copy(cpu.vcpu, l1.memory.buffer, l2);
    const stops = await copy.finish(context.signal, false, true);
    const proof = { stops, executed: copy.executed, checksum: hex(copy.checksum) };
    return { observed: { states, vmptrst, ...proof } };
  },
});

const always: readonly Selftest[] = [
  stages,
  headerOnly,
  ...where,
  ...refused,
  ...pending,
  ...systemManagement,
  ...enlightened,
  racing,
];

export const nestedState: Suite = {
  name: 'nested-state',
  parameters: {
    crash: {
      title: '1: with the tests that are known to take unfixed kernels down',
      min: 0,
      max: 1,
      default: [0],
    },
  },
  tests: ({ crash = [] }) => (crash.includes(1) ? [...always, ...crashes] : always),
};
