// SPDX-License-Identifier: Apache-2.0
// The host discards the APIC-access page while L2 is active. Does L2's next access still exit to L1?
import { Kvm } from 'nvmx';
import { atEachSync, L1 } from 'nvmx/guest';

using kvm = Kvm.open();
await using l1 = await L1.boot(kvm.createVm());
const page = l1.vm.memory.add({ gpa: 0xc000_0000, size: 4096 });
const l2 = await l1.createL2({ apicAccess: page.gpa, msrBitmap: true, vpid: 1 }, (program) =>
  program
    .write32(page.gpa + 0x80, 1)
    .sync(1)
    .write32(page.gpa + 0x80, 2)
    .vmcall(),
);
// At a sync L2 is active: it wrote a port that L1 does not intercept, and the host is in between.
await atEachSync(l2, () => page.discard(), { policy: { 'apic-access': 'skip' } });
const word = new DataView(page.buffer).getUint32(0x80, true);
console.log(`APIC-access exits: ${l2.exitCount('apic-access')} of 2; the page holds ${word}`);
console.log(word === 0 ? 'both accesses trapped' : 'the second write landed in memory: a stock kernel');
