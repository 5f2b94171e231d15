// SPDX-License-Identifier: Apache-2.0
// Hello, L2: boot L1, run one L2 under it, and prove that it ran.
import { Kvm } from 'nvmx';
import { L1 } from 'nvmx/guest';

using kvm = Kvm.open();
await using l1 = await L1.boot(kvm.createVm());
const page = l1.allocate();
const l2 = await l1.createL2({ vpid: 1, msrBitmap: true }, (program) =>
  program.write64(page, 42).read64(page).vmcall(0xcafe),
);
const stop = await l2.enter();
if (stop.kind !== 'exit') throw new Error(`L2 stopped with ${stop.kind}`);
console.log(`L2 left with ${stop.exit.reason}, RAX 0x${stop.exit.registers.rax.toString(16)}`);
console.log(`it did ${l2.progress.executed} operations; the last value it read was ${l2.progress.last}`);
console.log(`KVM counts ${l1.vcpu(0).stats().get('nested_run')} nested entry`);
