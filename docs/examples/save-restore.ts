// SPDX-License-Identifier: Apache-2.0
// Save a vCPU while L2 is active on it, restore it in a second VM, and let L2 go on in both.
import { Kvm } from 'nvmx';
import { abiPorts, L1 } from 'nvmx/guest';

using kvm = Kvm.open();
await using l1 = await L1.boot(kvm.createVm());
const page = l1.allocate();
const l2 = await l1.createL2({ vpid: 1, msrBitmap: true }, (program) =>
  program.write64(page, 1).sync(1).write64(page, 2).sync(2).vmcall(),
);
await l2.enter();
const original = l1.vcpu(0);
const snapshot = original.save(); // L2 stands behind its OUT, and nothing is pending
const flags = new DataView(original.getNestedState().buffer).getUint16(0, true);
console.log(`saved with L2 ${flags & 1 ? 'active' : 'not active'}`);

using second = kvm.createVm();
const memory = second.memory.add({ gpa: 0, size: l1.memory.size });
new Uint8Array(memory.buffer).set(new Uint8Array(l1.memory.buffer));
second.createIrqchip();
const copy = second.createVcpu(0);
copy.restore(snapshot);

const word = (buffer: ArrayBuffer) => new DataView(buffer).getBigUint64(page, true);
const exit = await copy.run();
const isSync = exit.type === 'io' && exit.port === abiPorts.sync;
console.log(
  `the copy: ${isSync ? `sync ${exit.data[0]}` : exit.type}, its page holds ${word(memory.buffer)}`,
);
console.log(`meanwhile in the original: ${word(l1.memory.buffer)}`);
const stop = await l2.continue();
console.log(
  `the original: sync ${stop.kind === 'sync' ? stop.value : stop.kind}, its page holds ${word(l1.memory.buffer)}`,
);
