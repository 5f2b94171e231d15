// SPDX-License-Identifier: Apache-2.0
import { describe, expect } from 'vitest';
import {
  CODE,
  hlt,
  inAl,
  load,
  loadAl,
  loadEax,
  movAl,
  outAl,
  spin,
  storeAl,
  storeEax,
  test,
} from './machine.ts';

describe('exits', () => {
  for (const mode of ['run', 'runSync'] as const) {
    test(`OUT and HLT by ${mode}()`, async ({ vm }) => {
      const vcpu = load(vm, [...movAl(0x41), ...outAl(0x10), ...hlt]);
      expect(await vcpu[mode]()).toEqual({
        type: 'io',
        direction: 'out',
        port: 0x10,
        size: 1,
        count: 1,
        data: Uint8Array.of(0x41),
      });
      expect(await vcpu[mode]()).toEqual({ type: 'hlt' });
      expect(vcpu.getRegs().rip).toBe(BigInt(CODE + 5));
    });
  }

  test('IN takes what the host puts into the live view', async ({ vm }) => {
    const vcpu = load(vm, [...inAl(0x21), ...outAl(0x22), ...hlt]);
    const read = await vcpu.run();
    if (read.type !== 'io' || read.direction !== 'in') throw new Error(`not an IN: ${read.type}`);
    expect([read.port, read.size, read.count]).toEqual([0x21, 1, 1]);
    read.data[0] = 0x9c;
    expect(await vcpu.run()).toMatchObject({ direction: 'out', port: 0x22, data: Uint8Array.of(0x9c) });
  });

  test('a 16-bit and a 32-bit OUT', async ({ vm }) => {
    const vcpu = load(vm, [0xef, 0x66, 0xef, ...hlt]);
    vcpu.setRegs({ rax: 0x1234_5678n, rdx: 0x3f8n });
    expect(await vcpu.run()).toMatchObject({ port: 0x3f8, size: 2, data: Uint8Array.of(0x78, 0x56) });
    expect(await vcpu.run()).toMatchObject({ size: 4, data: Uint8Array.of(0x78, 0x56, 0x34, 0x12) });
  });

  test('REP OUTSB hands over every byte', async ({ vm }) => {
    const vcpu = load(vm, [0xf3, 0x6e, ...hlt]);
    vm.memory.write(CODE + 0x100, Uint8Array.of(1, 2, 3, 4, 5));
    vcpu.setRegs({ rcx: 5n, rsi: BigInt(CODE + 0x100), rdx: 0x50n });
    const bytes: number[] = [];
    for (let exit = await vcpu.run(); exit.type === 'io'; exit = await vcpu.run()) {
      expect([exit.port, exit.size, exit.data.length]).toEqual([0x50, 1, exit.count]);
      bytes.push(...exit.data);
    }
    expect(bytes).toEqual([1, 2, 3, 4, 5]);
  });

  test('MMIO write and read of 1 and 4 bytes', async ({ vm }) => {
    const vcpu = load(vm, [
      ...storeAl(0x8001),
      ...storeEax(0x8004),
      ...loadAl(0x8002),
      ...loadEax(0x8008),
      ...hlt,
    ]);
    vcpu.setRegs({ rax: 0xa1b2_c3d4n });
    expect(await vcpu.run()).toEqual({
      type: 'mmio',
      address: 0x8001,
      isWrite: true,
      data: Uint8Array.of(0xd4),
    });
    expect(await vcpu.run()).toEqual({
      type: 'mmio',
      address: 0x8004,
      isWrite: true,
      data: Uint8Array.of(0xd4, 0xc3, 0xb2, 0xa1),
    });
    const byte = await vcpu.run();
    if (byte.type !== 'mmio') throw new Error(byte.type);
    expect([byte.address, byte.isWrite, byte.data.length]).toEqual([0x8002, false, 1]);
    byte.data[0] = 0x77;
    const long = await vcpu.run();
    if (long.type !== 'mmio') throw new Error(long.type);
    expect(vcpu.getRegs().rax & 0xffn).toBe(0x77n);
    expect([long.address, long.isWrite, long.data.length]).toEqual([0x8008, false, 4]);
    long.data.set([0xef, 0xbe, 0xad, 0xde]);
    expect(await vcpu.run()).toEqual({ type: 'hlt' });
    expect(vcpu.getRegs().rax).toBe(0xdead_beefn);
  });

  test('a triple fault is a shutdown', async ({ vm }) => {
    // Protected mode with an empty IDT: UD2 cannot be delivered, nor #GP, nor #DF.
    const vcpu = load(vm, [0x0f, 0x0b]);
    const flat = { base: 0n, limit: 0xffff_ffff, present: 1, s: 1, db: 1, g: 1, dpl: 0, unusable: 0 };
    const data = { ...flat, selector: 16, type: 3 };
    const segments = { cs: { ...flat, selector: 8, type: 11 }, ds: data, es: data, ss: data };
    vcpu.setSregs({ cr0: vcpu.getSregs().cr0 | 1n, idt: { base: 0n, limit: 0 }, ...segments });
    expect(await vcpu.run()).toEqual({ type: 'shutdown' });
  });

  test('an x87 access to MMIO is more than KVM emulates: internal error', async ({ vm }) => {
    // FADD dword [0x8000].
    const vcpu = load(vm, [0xd8, 0x06, 0x00, 0x80, ...hlt]);
    expect(await vcpu.run()).toMatchObject({ type: 'internal-error', suberror: 1 });
    expect(vcpu.getRegs().rip).toBe(BigInt(CODE));
  });

  test('a write to a read-only slot exits as MMIO and changes nothing; a read does not exit', async ({
    vm,
  }) => {
    const rom = vm.memory.add({ gpa: 0x4000, size: 0x1000, readOnly: true });
    vm.memory.write(0x4005, Uint8Array.of(0x5a));
    const vcpu = load(vm, [...loadAl(0x4005), ...outAl(0x10), ...movAl(0x66), ...storeAl(0x4005), ...hlt]);
    expect(await vcpu.run()).toMatchObject({ type: 'io', data: Uint8Array.of(0x5a) });
    expect(await vcpu.run()).toEqual({
      type: 'mmio',
      address: 0x4005,
      isWrite: true,
      data: Uint8Array.of(0x66),
    });
    expect(await vcpu.run()).toEqual({ type: 'hlt' });
    expect(new Uint8Array(rom.buffer)[5]).toBe(0x5a);
  });

  test('an interrupt that cannot be delivered yet opens a window exit', async ({ vm }) => {
    // STI; NOP; then loop: the window opens after the instruction that follows STI.
    const vcpu = load(vm, [0xfb, 0x90, ...spin]);
    new DataView(vcpu.runPage).setUint8(0, 1);
    expect(await vcpu.run()).toEqual({ type: 'irq-window-open' });
  });
});
