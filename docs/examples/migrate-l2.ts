// SPDX-License-Identifier: Apache-2.0
// An L2 moves between two vCPUs of L1: VMCLEAR on one, VMPTRLD on the other, VMLAUNCH.
import { Kvm } from 'nvmx';
import { foldChecksum, L1, vmcallRegsValues } from 'nvmx/guest';

using kvm = Kvm.open();
await using l1 = await L1.boot(kvm.createVm(), { vcpus: 2 });
const seeds = [100, 200, 300, 400];
const l2 = await l1.createL2({ vpid: 1, msrBitmap: true }, (program) => {
  // Fills all registers, leaves to L1, and checks afterwards that every one survived.
  for (const seed of seeds) program.vmcallRegs(seed);
});
for (const [turn, seed] of seeds.entries()) {
  const stop = await l2.enter({ on: turn % 2 });
  if (stop.kind !== 'exit') throw new Error(`L2 stopped with ${stop.kind}`);
  console.log(`turn ${turn} on vCPU ${l2.cpu.index}: R15 is ${stop.exit.registers.r15} (${seed} + 15)`);
}
await l2.enter();
const expected = foldChecksum(seeds.flatMap((seed) => vmcallRegsValues(seed)));
console.log(`registers survived: ${l2.progress.checksum === expected}`);
console.log(`nested entries: ${l1.vcpus.map(({ vcpu }) => vcpu.stats().get('nested_run')).join(' and ')}`);
