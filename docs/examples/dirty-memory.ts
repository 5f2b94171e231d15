// SPDX-License-Identifier: Apache-2.0
// Which pages did L2 write? The dirty log sees through both levels of translation.
import { Kvm } from 'nvmx';
import { L1 } from 'nvmx/guest';

using kvm = Kvm.open();
await using l1 = await L1.boot(kvm.createVm());
const region = l1.vm.memory.add({ gpa: 0xc000_0000, size: 8 * 4096, logDirtyPages: true });
const at = (page: number) => region.gpa + page * 4096;
// An address that only L2 knows: the EPT that L1 made leads from there to page 6.
const ept = l1.createEpt();
ept.map(0x8_0000_0000, at(6));
const pageTables = l1.createPageTables();
pageTables.map(0x8_0000_0000);
const l2 = await l1.createL2({ ept, pageTables }, (program) =>
  program.write8(at(1), 1).read64(at(2)).write64(at(4), 1).write32(0x8_0000_0000, 1).vmcall(),
);
await l2.enter();
console.log(`dirty after L2 ran: ${region.dirtyPages().join(', ')}`);
console.log(`dirty since: ${region.dirtyPages().length} pages`);
