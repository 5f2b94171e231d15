// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { benches } from '../../lib/bench/index.ts';
import { machineDescription } from '../../lib/lab/bochs.ts';

test('what a backing cannot do is told before anything is set up', () => {
  const told = benches
    .filter(({ family }) => /^memslot\/nested\/.*\/slots=32$/.test(family))
    .flatMap(({ figures }) => figures)
    .map(({ id, missing }) => [id, missing({} as never)] as const)
    .filter(([, reason]) => reason !== undefined);
  const place = 'nested/guest-memfd/slots=32';
  expect(told).toEqual([
    ['memslot/unmap/nested/hugetlb/slots=32', expect.stringContaining('see unmap-chunked')],
    [`memslot/move-active/${place}`, expect.stringContaining('no memslot on a guest_memfd')],
    [`memslot/move-inactive/${place}`, expect.stringContaining('no memslot on a guest_memfd')],
  ]);
});

test('a machine of more memory than the emulator takes of the host', () => {
  const describe = (memoryMiB: number): string =>
    machineDescription(
      {
        bios: 'b',
        videoBios: 'v',
        memoryMiB,
        cpus: 1,
        cpuModel: 'c',
        startTime: 'utc',
        boot: { kind: 'cd', image: 'i' },
      },
      { memoryImages: false } as never,
    ).split('\n')[0]!;
  expect(describe(1024)).toBe('memory: guest=1024, host=1024');
  expect(describe(3072)).toBe('memory: guest=3072, host=2048');
});
