// SPDX-License-Identifier: Apache-2.0
import type { BackingName, Bench } from '../bench.ts';
import { exits } from './exits.ts';
import { invalidation } from './invalidation.ts';
import { memslots } from './memslots.ts';
import { nestedState } from './nested_state.ts';
import { memremaps, roundTrip } from './round_trip.ts';
import { l2Switch } from './switch.ts';

export const BACKINGS: readonly BackingName[] = ['anonymous', 'memfd', 'hugetlb', 'guest-memfd', 'unmanaged'];
export const SLOTS = [32, 512, 8192, 'max'] as const;

/** Everything that can be measured, in the order in which it is. */
export const benches: readonly Bench[] = [
  exits('l1'),
  exits('l2'),
  ...BACKINGS.map(roundTrip),
  ...BACKINGS.map(l2Switch),
  memremaps('anonymous'),
  memremaps('unmanaged'),
  nestedState(),
  invalidation('anonymous'),
  invalidation('unmanaged'),
  ...SLOTS.flatMap((slots) =>
    BACKINGS.flatMap((backing) => [
      // Plain churn never touches the pages that are unmanaged.
      ...(backing === 'unmanaged' ? [] : [memslots('plain', backing, slots)]),
      memslots('nested', backing, slots),
    ]),
  ),
];
