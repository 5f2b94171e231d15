// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { decodeExit, type Exit } from '../../lib/kvm/exit.ts';
import { loadFailure } from '../../lib/kvm/loader.ts';

// Exits that this machine's KVM cannot be made to produce: their layout is checked against the uapi header.
function runPage(reason: number, fill: (view: DataView<ArrayBuffer>) => void): DataView<ArrayBuffer> {
  const view = new DataView(new ArrayBuffer(4096));
  view.setUint32(8, reason, true);
  fill(view);
  return view;
}

const u32 = (view: DataView, at: number, value: number) => view.setUint32(at, value, true);
const u64 = (view: DataView, at: number, value: bigint) => view.setBigUint64(at, value, true);

describe('struct kvm_run decoding', () => {
  const cases: [string, number, number, (view: DataView<ArrayBuffer>) => void, Exit][] = [
    [
      'fail-entry',
      9,
      0,
      (view) => {
        u64(view, 32, 0x8000_0021n);
        u32(view, 40, 3);
      },
      { type: 'fail-entry', hardwareReason: 0x8000_0021n, cpu: 3 },
    ],
    [
      'internal error with data',
      17,
      0,
      (view) => {
        u32(view, 32, 3);
        u32(view, 36, 2);
        u64(view, 40, 7n);
        u64(view, 48, 1n << 63n);
      },
      { type: 'internal-error', suberror: 3, data: [7n, 1n << 63n] },
    ],
    [
      'system event',
      24,
      0,
      (view) => {
        u32(view, 32, 2);
        u32(view, 36, 1);
        u64(view, 40, 5n);
      },
      { type: 'system-event', event: 2, data: [5n] },
    ],
    [
      'memory fault with EFAULT',
      39,
      14,
      (view) => {
        u64(view, 32, 8n);
        u64(view, 40, 0xc000_0000n);
        u64(view, 48, 0x1000n);
      },
      { type: 'memory-fault', flags: 8n, isPrivate: true, gpa: 0xc000_0000, size: 0x1000, errno: -14 },
    ],
    [
      'memory fault with EHWPOISON',
      39,
      133,
      (view) => u64(view, 32, 7n),
      { type: 'memory-fault', flags: 7n, isPrivate: false, gpa: 0, size: 0, errno: -133 },
    ],
    ['EINTR over a stale exit', 5, 4, () => {}, { type: 'interrupted' }],
    ['EAGAIN', 0, 11, () => {}, { type: 'interrupted' }],
    ['KVM_EXIT_INTR', 10, 0, () => {}, { type: 'interrupted' }],
    ['an exit nobody knows', 77, 0, () => {}, { type: 'unknown', reason: 77 }],
  ];
  for (const [name, reason, errno, fill, expected] of cases) {
    test(name, () => expect(decodeExit(runPage(reason, fill), errno)).toEqual(expected));
  }

  test('any other errno is a KvmError of KVM_RUN', () => {
    expect(() =>
      decodeExit(
        runPage(0, () => {}),
        5,
      ),
    ).toThrow(/^EIO: the kernel refused ioctl KVM_RUN$/);
    expect(() =>
      decodeExit(
        runPage(0, () => {}),
        14,
      ),
    ).toThrow(/^EFAULT/);
  });
});

describe('a missing addon', () => {
  test('is explained with what was tried and what to do', () => {
    const error = loadFailure([{ path: '/x/nvmx.node', reason: 'no such file' }], 'linux', 'x64');
    expect(error.message).toMatch(/tried \/x\/nvmx.node: no such file/);
    expect(error.message).toMatch(/Possible solutions:\n- .*npm run build/);
    expect(loadFailure([], 'darwin', 'arm64').message).toMatch(/this is darwin arm64/);
  });
});
