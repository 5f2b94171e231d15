// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { abi, RecordView, records } from '../../lib/guest/abi.ts';

/** What the C compiler says of guests/abi.h; the guest build writes it. */
interface CompiledAbi {
  constants: Record<string, string>;
  records: Record<string, { size: number; fields: Record<string, [number, number]> }>;
}
const compiled = JSON.parse(
  readFileSync(new URL('../../out/cmake/abi.json', import.meta.url), 'utf8'),
) as CompiledAbi;

describe('lib/guest/abi.ts and guests/abi.h', () => {
  test('have the same constants', () => {
    const ours = Object.fromEntries(Object.entries(abi).map(([name, value]) => [name, String(value)]));
    expect(ours).toEqual(compiled.constants);
  });

  test('have the same records: fields, offsets, sizes', () => {
    expect(records).toEqual(compiled.records);
  });
});

test('a record view reads and writes little-endian at its offsets', () => {
  const memory = new ArrayBuffer(8192);
  const cpu = new RecordView(memory, 'cpu', 4096);
  cpu.setU32('irq_counts', 0x0102_0304, 3);
  const at = 4096 + records.cpu.fields.irq_counts[0] + 12;
  expect([...new Uint8Array(memory, at, 4)]).toEqual([4, 3, 2, 1]);
  cpu.setU16('irq_counts', 0x0506, 7);
  cpu.setU8('irq_counts', 0x07, 12);
  expect([...new Uint8Array(memory, at, 4)]).toEqual([7, 3, 6, 5]);
  expect([cpu.u8('irq_counts', 13), cpu.u16('irq_counts', 6), cpu.u32('irq_counts', 3)]).toEqual([
    0x03, 0x0307, 0x0506_0307,
  ]);
  expect(cpu.u64('irq_counts', 1)).toBe(0x0506_0307_0000_0000n);
  cpu.inner('fault', 'fault').setU64('cr2', 0xf102_0304_0506_0708n);
  const cr2 = 4096 + records.cpu.fields.fault[0] + records.fault.fields.cr2[0];
  expect([...new Uint8Array(memory, cr2, 8)]).toEqual([8, 7, 6, 5, 4, 3, 2, 0xf1]);
  expect(cpu.inner('fault', 'fault').u64('cr2')).toBe(0xf102_0304_0506_0708n);
  expect(() => new RecordView(memory, 'cpu', 8192 - 16)).toThrow(RangeError);
});
