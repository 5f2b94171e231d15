// SPDX-License-Identifier: Apache-2.0
import { closeSync, openSync } from 'node:fs';
import { checkFlag, checkInteger, checkName, checkObject } from './check.ts';
import type { MemoryRequest } from './loader.ts';

/**
 * What is behind a memslot in this process.
 *
 * - `anonymous`: private memory. `hugePages` sets MADV_HUGEPAGE (true) or MADV_NOHUGEPAGE (false).
 * - `memfd`: shared memory in a file without a name.
 * - `hugetlb`: reserved huge pages of 2 MiB (default) or 1 GiB; ENOMEM when none are reserved.
 * - `file`: a path (opened for this) or an open descriptor (duplicated), from `offset`; `/dev/mem` or any other
 *   device that can be mapped. Shared, unless `copyOnWrite`. With `readOnly` the file is mapped without write
 *   permission and has no ArrayBuffer.
 * - `guest-memfd`: KVM_CREATE_GUEST_MEMFD. With `mmap` (Linux 6.18) this process maps the same pages; without, the
 *   guest's private pages are out of its reach and `buffer` shows the shared ones.
 */
export type BackingSpec =
  | { type: 'anonymous'; hugePages?: boolean }
  | { type: 'memfd'; hugePages?: boolean }
  | { type: 'hugetlb'; pageSize?: '2M' | '1G' }
  | { type: 'file'; path: string; offset?: number; readOnly?: boolean; copyOnWrite?: boolean }
  | { type: 'file'; fd: number; offset?: number; readOnly?: boolean; copyOnWrite?: boolean }
  | { type: 'guest-memfd'; mmap?: boolean };

export type BackingType = BackingSpec['type'];
/** A specification, or the name of one that needs no more than its name. */
export type Backing = Exclude<BackingType, 'file'> | BackingSpec;

const TYPES = ['anonymous', 'memfd', 'hugetlb', 'file', 'guest-memfd'] as const;
const READ_ONLY = 1;
const COPY_ON_WRITE = 2;
const GUEST_MMAP = 4;

export function backingType(backing: Backing): BackingType {
  const type: unknown = typeof backing === 'string' ? backing : checkObject('backing', backing).type;
  return TYPES[checkName('backing', type, TYPES)]!;
}

/** Calls `use` with the request for the addon, undefined for plain memory; a path is open only meanwhile. */
export function withBacking<T>(backing: Backing, use: (request: MemoryRequest | undefined) => T): T {
  if (backing === 'anonymous') return use(undefined);
  const type = backingType(backing);
  const kind = TYPES.indexOf(type);
  const spec = (typeof backing === 'string' ? { type } : backing) as BackingSpec;
  switch (spec.type) {
    case 'anonymous':
    case 'memfd': {
      const huge = spec.hugePages === undefined ? -1 : Number(checkFlag('hugePages', spec.hugePages));
      return use([kind, -1, 0, 21, huge, 0]);
    }
    case 'hugetlb': {
      const shift = checkName('pageSize', spec.pageSize ?? '2M', ['2M', '1G']) === 0 ? 21 : 30;
      return use([kind, -1, 0, shift, -1, 0]);
    }
    case 'guest-memfd':
      return use([kind, -1, 0, 21, -1, checkFlag('mmap', spec.mmap) ? GUEST_MMAP : 0]);
    default:
      return withFile(kind, spec, use);
  }
}

function withFile<T>(
  kind: number,
  spec: Extract<BackingSpec, { type: 'file' }>,
  use: (request: MemoryRequest) => T,
): T {
  const readOnly = checkFlag('readOnly', spec.readOnly);
  const copyOnWrite = checkFlag('copyOnWrite', spec.copyOnWrite);
  const offset = checkInteger('offset', spec.offset ?? 0, 0);
  const bits = (readOnly ? READ_ONLY : 0) | (copyOnWrite ? COPY_ON_WRITE : 0);
  if ('fd' in spec) return use([kind, checkInteger('fd', spec.fd, 0, 0x7fffffff), offset, 21, -1, bits]);
  if (typeof spec.path !== 'string') throw new TypeError("a 'file' backing needs a path or an fd");
  const fd = openSync(spec.path, readOnly || copyOnWrite ? 'r' : 'r+');
  try {
    return use([kind, fd, offset, 21, -1, bits]);
  } finally {
    closeSync(fd);
  }
}
