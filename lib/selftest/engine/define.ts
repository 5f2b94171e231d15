// SPDX-License-Identifier: Apache-2.0
import type { Selftest } from './model.ts';

type Defaults = 'hazard' | 'timeoutMs' | 'racing';

/** Fills in the common case: no hazard, 20 s, deterministic. */
export function selftest(definition: Omit<Selftest, Defaults> & Partial<Pick<Selftest, Defaults>>): Selftest {
  return { hazard: 'none', timeoutMs: 20_000, racing: false, ...definition };
}
