// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { abi } from '../../lib/guest/abi.ts';
import { Image, loadImage } from '../../lib/guest/index.ts';

describe('guest images', () => {
  for (const [name, base] of [
    ['l1.elf', abi.L1_BASE],
    ['l2.elf', abi.L2_BASE],
  ] as const) {
    test(`${name} is loaded at its base, within the megabyte it has`, () => {
      const image = loadImage(name);
      expect(image.segments[0]!.gpa).toBe(base);
      for (const { gpa, size } of image.segments) expect(gpa + size).toBeLessThanOrEqual(base + 0x10_0000);
      expect(image.symbol('vectors').address).toBe(base);
      expect(image.symbol('idt').size).toBe(4096);
      expect(image.locate(image.entry)).toBe('_start');
    });
  }

  test('an address is located in its function', () => {
    const image = loadImage('l1.elf');
    const { address, size } = image.symbol('fault_gp');
    expect(image.locate(address)).toBe('fault_gp');
    expect(image.locate(BigInt(address + size - 1))).toBe(`fault_gp+0x${(size - 1).toString(16)}`);
    expect(image.locate(0x10)).toBeUndefined();
    expect(() => image.symbol('nonsense')).toThrow('l1.elf has no symbol "nonsense"');
  });

  test('what is no executable is refused', () => {
    expect(() => new Image('x', new Uint8Array(10))).toThrow('x is not a static x86-64 ELF executable');
    expect(() => new Image('x', new Uint8Array(200))).toThrow('x is not a static x86-64 ELF executable');
  });
});
