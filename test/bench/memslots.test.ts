// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { benches } from '../../lib/bench/index.ts';
import { benchMissing } from '../../lib/bench/measure.ts';
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

test('a guest_memfd that is not there, or cannot be mapped, is told with the kernel that has it', () => {
  const bench = benches.find(({ family }) => family === 'round-trip/guest-memfd')!;
  const reason = (capabilities: Record<string, number>) =>
    benchMissing(bench, {
      probe: { kvm: { device: 'ok', capabilities }, nestedVmx: { usable: true } },
      unmanaged: { reason: 'none' },
    } as never);
  expect(reason({ KVM_CAP_GUEST_MEMFD: 0 })).toContain('has no guest_memfd (Linux 6.8');
  // Debian's 6.12 for servers: it is there for confidential VMs.
  const old = { KVM_CAP_GUEST_MEMFD: 1, KVM_CAP_GUEST_MEMFD_FLAGS: 0 };
  expect(reason(old)).toContain('cannot be mapped into the process (Linux 6.18)');
  expect(reason({ KVM_CAP_GUEST_MEMFD: 1, KVM_CAP_GUEST_MEMFD_FLAGS: 3 })).toBeUndefined();
});

test('a machine of more memory than the emulator takes of the host', () => {
  const describe = (memoryMiB: number): string | undefined =>
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
    )
      .split('\n')
      .find((line) => line.startsWith('memory:'));
  expect(describe(1024)).toBe('memory: guest=1024, host=1024');
  expect(describe(3072)).toBe('memory: guest=3072, host=2048');
});
