// SPDX-License-Identifier: Apache-2.0
// L2's operations by their width, and what L1's objects say of themselves.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { foldChecksum, type L2Stop } from '../../lib/guest/index.ts';
import { exitOf, progressOf, withL1 } from './machine.ts';

const WORD = 0x8877_6655_4433_2211n;

test('memory is read and written in every width', () =>
  withL1({}, async (l1) => {
    const page = l1.allocate();
    const memory = l1.memoryAt(page, 64);
    new DataView(memory.buffer, memory.byteOffset).setBigUint64(0, WORD, true);
    const l2 = await l1.createL2({}, (program) =>
      program
        .read8(page)
        .read16(page)
        .read32(page)
        .read64(page)
        .read16(page + 3)
        .write8(page + 8, 0x1a1)
        .write16(page + 16, 0x1_b2b1)
        .write32(page + 24, 0x1_c4c3_c2c1)
        .write64(page + 32, WORD)
        .vmcall(),
    );
    exitOf(await l2.enter(), 'vmcall');
    progressOf(l2, { executed: 9, checksum: foldChecksum([0x11, 0x2211, 0x4433_2211, WORD, 0x5544]) });
    const words = new BigUint64Array(memory.slice(8, 40).buffer);
    assert.deepEqual([...words], [0xa1n, 0xb2b1n, 0xc4c3_c2c1n, WORD]);
  }));

test('ports that L1 leaves alone reach userspace in every width', () =>
  withL1({}, async (l1) => {
    const l2 = await l1.createL2({}, (program) =>
      program
        .in8(0x60)
        .in16(0x61)
        .in32(0x62)
        .out8(0x63, 0x1a1)
        .out16(0x64, 0x1_b2b1)
        .out32(0x65, 0x1_c4c3_c2c1)
        .vmcall(),
    );
    const seen = [];
    let stop: L2Stop = await l2.enter();
    while (stop.kind === 'kvm-exit' && stop.exit.type === 'io') {
      const { port, direction, data } = stop.exit;
      if (direction === 'in') data.set([0x11, 0x22, 0x33, 0x44].slice(0, data.length));
      seen.push([port, direction, ...data]);
      stop = await l2.continue();
    }
    exitOf(stop, 'vmcall');
    assert.deepEqual(seen, [
      [0x60, 'in', 0x11],
      [0x61, 'in', 0x11, 0x22],
      [0x62, 'in', 0x11, 0x22, 0x33, 0x44],
      [0x63, 'out', 0xa1],
      [0x64, 'out', 0xb1, 0xb2],
      [0x65, 'out', 0xc1, 0xc2, 0xc3, 0xc4],
    ]);
    progressOf(l2, { executed: 6, checksum: foldChecksum([0x11, 0x2211, 0x4433_2211]) });
  }));

test('L1 knows its memory, and a vCPU whether it is in VMX operation or x2APIC mode', () =>
  withL1({}, async (l1) => {
    const cpu = l1.cpu(0);
    assert.deepEqual([cpu.inVmxOperation, cpu.inX2apicMode], [false, false]);
    await l1.createL2({}, (program) => program.vmcall());
    await cpu.x2apicEnable();
    assert.deepEqual([cpu.inVmxOperation, cpu.inX2apicMode], [true, true]);
    await cpu.vmxoff();
    assert.equal(cpu.inVmxOperation, false);

    const slot = l1.vm.memory.add({ gpa: 0xc000_0000, size: 4096 });
    l1.memoryAt(0xc000_0ffe, 2).set([7, 8]);
    assert.deepEqual([...slot.bytes(4093)], [0, 7, 8]);
    assert.throws(() => l1.memoryAt(0xc000_0fff, 2), RangeError);
    assert.throws(() => l1.memoryAt(0xd000_0000, 1), /no memory at guest address 0xd0000000/);
  }));
