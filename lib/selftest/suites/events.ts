// SPDX-License-Identifier: Apache-2.0
import type { Selftest } from '../engine/model.ts';
import { asyncEvents } from './events_async.ts';
import { injectedEvents } from './events_inject.ts';
import { refusedEntries } from './events_refused.ts';
import { teardown } from './events_teardown.ts';

/** Events at VM entry, while L2 runs, and instead of either. */
export const events: readonly Selftest[] = [
  ...injectedEvents,
  ...asyncEvents,
  ...refusedEntries,
  ...teardown,
];
