// SPDX-License-Identifier: Apache-2.0
import type { Fingerprint } from '../lib/probe/index.ts';

/** The fingerprint of a kernel that certainly has nothing of the series. */
export const stock: Fingerprint = {
  kind: 'stock',
  changes: { 'msr-bitmap': 'stock', pages: 'stock', evmcs: 'stock', contexts: 'stock' },
  certain: true,
  patches: [],
  sources: [],
};
