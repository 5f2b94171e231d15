// SPDX-License-Identifier: Apache-2.0
import type { Suite } from '../engine/model.ts';
import { fixedSuite } from '../engine/parameters.ts';
import { apicAccess } from './apic_access.ts';
import { apicUpdate } from './apic_update.ts';
import { controls } from './controls.ts';
import { dirtyLog } from './dirty_log.ts';
import { events } from './events.ts';
import { evmcs } from './evmcs.ts';
import { hazards } from './hazards.ts';
import { l2Switch } from './l2_switch.ts';
import { memslots } from './memslots.ts';
import { msrBitmap } from './msr_bitmap.ts';
import { nestedState } from './nested_state.ts';
import { postedInterrupt } from './posted_interrupt.ts';
import { translation } from './translation.ts';
import { vapic } from './vapic.ts';

/** Every suite, in the order they run. */
export const suites: readonly Suite[] = [
  fixedSuite('apic-update', apicUpdate),
  l2Switch,
  nestedState,
  fixedSuite('dirty-log', dirtyLog),
  memslots,
  fixedSuite('controls', controls),
  fixedSuite('translation', translation),
  fixedSuite('events', events),
  fixedSuite('evmcs', evmcs),
  fixedSuite('msr-bitmap', msrBitmap),
  fixedSuite('apic-access', apicAccess),
  fixedSuite('vapic', vapic),
  fixedSuite('posted-interrupt', postedInterrupt),
  fixedSuite('hazard', hazards),
];
