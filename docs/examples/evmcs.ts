// SPDX-License-Identifier: Apache-2.0
// Hyper-V's enlightened VMCS in ten lines: the same calls, another kind of VMCS.
import { Kvm } from 'nvmx';
import { EVMCS_CLEAN, L1 } from 'nvmx/guest';

using kvm = Kvm.open();
await using l1 = await L1.boot(kvm.createVm(), { evmcs: true });
const l2 = await l1.createL2({ evmcs: true }, (program) => program.vmcall(1).hlt().vmcall(2));
await l2.enter();
l2.evmcs!.cleanFields = EVMCS_CLEAN.all; // "nothing changed since the last entry"
await l2.fields.write(
  'CPU_BASED_VM_EXEC_CONTROL',
  (await l2.fields.read('CPU_BASED_VM_EXEC_CONTROL')) | 0x80n,
);
const changed = EVMCS_CLEAN.all & ~l2.evmcs!.cleanFields;
const stop = await l2.enter();
console.log(`clean bits that the write took away: 0x${changed.toString(16)}`);
console.log(`with hlt-exiting on, L2 left with ${stop.kind === 'exit' ? stop.exit.reason : stop.kind}`);
