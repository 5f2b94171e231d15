// SPDX-License-Identifier: Apache-2.0
import { spawnSync } from 'node:child_process';
import { posix } from 'node:path';
import { describe, expect, test } from 'vitest';
import { abi } from '../../lib/guest/abi.ts';
import { Image, loadImage } from '../../lib/guest/index.ts';

const root = new URL('../..', import.meta.url).pathname;

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

  test('every instruction has the line that binutils give it, and no path of this machine', async ({
    skip,
  }) => {
    for (const name of ['l1.elf', 'l2.elf'] as const) {
      const image = loadImage(name);
      const { gpa, bytes } = image.segments[0]!;
      const addresses = Array.from({ length: Math.ceil(bytes.length / 3) }, (_, i) => gpa + 3 * i);
      const args = ['-e', `out/cmake/guests/${name}`, ...addresses.map((address) => address.toString(16))];
      const { stdout, error } = spawnSync('addr2line', args, { cwd: root, encoding: 'utf8' });
      if (error) skip('addr2line is not installed (apt-get install binutils)');
      const expected = stdout
        .trim()
        .split('\n')
        .map((line) => line.replace(/ \(discriminator \d+\)$/, ''))
        .map((line) => (/:[?0]$/.test(line) ? undefined : posix.normalize(line)));
      const seen = addresses.map((address) => image.line(address));
      expect(seen).toEqual(expected);
      expect(seen.filter((line) => line !== undefined).length).toBeGreaterThan(500);
      expect(seen.filter((line) => line !== undefined && !/^guests\/[\w/]+\.[chS]:\d+$/.test(line))).toEqual(
        [],
      );
    }
    const image = loadImage('l1.elf');
    expect(image.line(image.symbol('fault_gp').address)).toMatch(/^guests\/common\/faults\.S:\d+$/);
    expect(image.line(0x10)).toBeUndefined();
  });

  test('what is no executable is refused', () => {
    expect(() => new Image('x', new Uint8Array(10))).toThrow('x is not a static x86-64 ELF executable');
    expect(() => new Image('x', new Uint8Array(200))).toThrow('x is not a static x86-64 ELF executable');
  });
});
