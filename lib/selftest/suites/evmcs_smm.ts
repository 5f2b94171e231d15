// SPDX-License-Identifier: Apache-2.0
// L2 on an eVMCS, interrupted by an SMI: RSM must not go back to L2 with controls that no VM entry would take.
import { foldChecksum, VMCS_FIELDS } from '../../guest/index.ts';
import { selftest } from '../engine/define.ts';
import type {
  ExpectationTable,
  Observations,
  Requirement,
  Selftest,
  SelftestContext,
} from '../engine/model.ts';
import { kernelFrom } from '../engine/requirements.ts';
import { hex } from './common.ts';
import { Copy } from './nested_state_common.ts';
import { inHandler } from './nested_state_smm.ts';
import { requires } from './nested_state_where.ts';
import { enlightenedVmcs } from './scenario.ts';

/** Without NMI exiting no VM entry takes it (SDM vol. 3, 27.2.1.1). */
const VIRTUAL_NMIS = 1n << 5n;

async function rsm(context: SelftestContext, more: bigint): Promise<{ observed: Observations }> {
  const { machine, l2, vcpu } = await inHandler(context, { evmcs: true });
  await using _closed = machine;
  const { evmcs } = l2;
  if (!evmcs) throw new Error('no eVMCS');
  const pin = VMCS_FIELDS.PIN_BASED_VM_EXEC_CONTROL;
  evmcs.write(pin, evmcs.read(pin) | more);
  // KVM reads an eVMCS at VM entries, and to answer this
  vcpu.getNestedState();
  const copy = new Copy(vcpu, machine.l1.memory.buffer, l2);
  const stop = await copy.run(context.signal);
  const { executed, checksum } = l2.progress;
  return { observed: { stop, executed, checksum: hex(checksum) } };
}

const checksum = (...values: number[]): string => hex(foldChecksum(values));

function rsmTest(
  name: string,
  title: string,
  more: bigint,
  any: ExpectationTable,
  needs: readonly Requirement[] = [],
): Selftest {
  return selftest({
    id: `evmcs/smm/${name}`,
    title,
    requires: [...requires, enlightenedVmcs, ...needs],
    expectations: { any },
    body: (context) => rsm(context, more),
  });
}

export const evmcsSmm: readonly Selftest[] = [
  rsmTest('rsm', 'SMM interrupted L2 on an eVMCS: RSM goes back to L2', 0n, {
    stop: 'vmcall',
    executed: 3,
    checksum: checksum(1, 2),
  }),
  rsmTest(
    'invalid-control',
    'the same with a control in the eVMCS that no VM entry takes: the vCPU shuts down',
    VIRTUAL_NMIS,
    { stop: 'shutdown', executed: 1, checksum: checksum(1) },
    [kernelFrom(7, 3, 'go back to L2 (seen on 6.1 and 6.12)')],
  ),
];
