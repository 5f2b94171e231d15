// SPDX-License-Identifier: Apache-2.0
// Nested state while the vCPU is in system-management mode, which takes it out of VMX operation for a while.
import type { L2 } from '../../guest/index.ts';
import type { Vcpu } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Selftest, SelftestContext } from '../engine/model.ts';
import { bootL1, hex, type Machine } from './common.ts';
import {
  Copy,
  FLAG,
  HEADER,
  outsideVmx,
  stateField,
  trySet,
  WITH_VMCS12,
  withFields,
} from './nested_state_common.ts';
import type { Pending } from './nested_state_pending.ts';
import { requires, SMALL } from './nested_state_where.ts';

const SMBASE = 0x3_0000;
const SMM_PORT = 0x55;

export const smm: Pending = {
  id: 'smm',
  title: "the vCPU stands in L1's SMM handler, which interrupted L2: RSM goes back to L2",
  irqchip: true,
  options: ({ vm }) => {
    // SMM has memslots of its own: those whose number is from 0x10000 on
    const smram = vm.memory.add({ gpa: SMBASE, size: 0x1_0000, slot: 0x1_0000 });
    // out SMM_PORT, al; rsm
    new Uint8Array(smram.buffer, 0x8000).set([0xe6, SMM_PORT, 0x0f, 0xaa]);
    return {};
  },
  program: (p) => p.fold(1).sync(1).fold(2),
  reach: async (_, l2, context) => {
    await l2.enter({ signal: context.signal });
    l2.cpu.vcpu.injectSmi();
    const stop = await l2.continue({ signal: context.signal });
    const exit = stop.kind === 'kvm-exit' ? stop.exit : undefined;
    if (exit?.type !== 'io' || exit.port !== SMM_PORT) throw new Error('the SMI handler did not report');
  },
  more: (copy) => [copy.vcpu.getEvents().smi.smm],
  expect: {
    state: `size=${WITH_VMCS12} vmxon=region vmcs12=l2 smm=guestMode+vmxon`,
    stops: ['vmcall'],
    entries: 1,
    executed: 3,
    more: [0],
  },
  values: [1, 2],
};

/** An L2 that an SMI has interrupted; the handler stands at its OUT. */
export async function inHandler(
  context: SelftestContext,
  options: { evmcs?: boolean } = {},
): Promise<{ machine: Machine; l2: L2; vcpu: Vcpu }> {
  const machine = await bootL1(context, { memory: SMALL.memory, ...options });
  const { l1 } = machine;
  const l2 = await l1.createL2({ ...(await smm.options(machine)), ...options }, (program) =>
    smm.program(program, l1),
  );
  l2.setPolicy({});
  await smm.reach(machine, l2, context);
  const { vcpu } = l1.cpu(0);
  vcpu.settle();
  return { machine, l2, vcpu };
}

const rules = selftest({
  id: 'nested-state/set/smm-rules',
  title: 'in SMM a state with L2 active is refused, and one with the flags of SMM is not',
  requires,
  expectations: {
    any: {
      active: 'EINVAL',
      outside: 'ok',
      saved: 'ok',
      smmFlags: 3,
      sizes: [HEADER, WITH_VMCS12],
      stop: 'vmcall',
      executed: 3,
    },
  },
  body: async (context) => {
    const { machine, l2, vcpu } = await inHandler(context);
    await using _closed = machine;
    const saved = vcpu.getNestedState();
    const sizes: number[] = [];
    const size = () => sizes.push(Number(stateField(vcpu.getNestedState(), 'size')));
    const active = trySet(vcpu, withFields(saved, { flags: FLAG.guestMode, smmFlags: 0 }));
    const outside = trySet(vcpu, outsideVmx());
    size();
    const again = trySet(vcpu, saved);
    size();
    const smmFlags = Number(stateField(vcpu.getNestedState(), 'smmFlags'));
    const copy = new Copy(vcpu, machine.l1.memory.buffer, l2);
    const stop = await copy.run(context.signal);
    const { executed } = copy;
    return { observed: { active, outside, saved: again, smmFlags, sizes, stop, executed } };
  },
});

/**
 * KVM 6.1 and 7.3 dereference NULL at the RSM: leaving VMX operation frees the vmcs12 and keeps the note that SMM
 * interrupted L2.
 */
const outside = selftest({
  id: 'nested-state/crash/smm-outside-vmx',
  title: 'SMM interrupted L2, userspace takes the vCPU out of VMX operation, RSM: the host kernel lives',
  requires,
  hazard: 'host-crash',
  expectations: { any: { flags: 0, after: 'vmcall 1' } },
  body: async (context) => {
    const { machine, l2, vcpu } = await inHandler(context);
    await using _closed = machine;
    vcpu.setNestedState(outsideVmx());
    const rsm = await new Copy(vcpu, machine.l1.memory.buffer, l2).run(context.signal);
    const flags = Number(stateField(vcpu.getNestedState(), 'flags'));
    await using other = await bootL1(context, SMALL);
    const next = await other.l1.createL2({}, (program) => program.fold(7));
    const stop = await next.enter({ signal: context.signal });
    const after = `${stop.kind === 'exit' ? stop.exit.reason : stop.kind} ${next.progress.executed}`;
    return { observed: { flags, after }, evidence: { rsm, checksum: hex(next.progress.checksum) } };
  },
});

export const systemManagement: readonly Selftest[] = [rules];
/** What takes down a kernel that is not fixed. */
export const crashes: readonly Selftest[] = [outside];
