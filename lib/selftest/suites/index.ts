// SPDX-License-Identifier: Apache-2.0
import type { Suite } from '../engine/model.ts';
import { suitesOf } from '../engine/parameters.ts';
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
export const suites: readonly Suite[] = suitesOf({
  'apic-update': apicUpdate,
  'l2-switch': l2Switch,
  'nested-state': nestedState,
  'dirty-log': dirtyLog,
  memslots,
  controls,
  translation,
  events,
  evmcs,
  'msr-bitmap': msrBitmap,
  'apic-access': apicAccess,
  vapic,
  'posted-interrupt': postedInterrupt,
  hazard: hazards,
});

/**
 * Where a suite's tests are: a module beside this one, and what it exports. A lab machine loads the modules of the
 * suites it runs and no others, because each costs it some millions of instructions.
 */
export const SUITE_MODULES: Readonly<Record<string, readonly [module: string, name: string]>> = {
  'apic-update': ['apic_update', 'apicUpdate'],
  'l2-switch': ['l2_switch', 'l2Switch'],
  'nested-state': ['nested_state', 'nestedState'],
  'dirty-log': ['dirty_log', 'dirtyLog'],
  memslots: ['memslots', 'memslots'],
  controls: ['controls', 'controls'],
  translation: ['translation', 'translation'],
  events: ['events', 'events'],
  evmcs: ['evmcs', 'evmcs'],
  'msr-bitmap': ['msr_bitmap', 'msrBitmap'],
  'apic-access': ['apic_access', 'apicAccess'],
  vapic: ['vapic', 'vapic'],
  'posted-interrupt': ['posted_interrupt', 'postedInterrupt'],
  hazard: ['hazards', 'hazards'],
};
