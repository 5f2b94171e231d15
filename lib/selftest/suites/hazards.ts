// SPDX-License-Identifier: Apache-2.0
import type { Selftest } from '../engine/model.ts';
import { hazardTest } from './hazard.ts';
import { EVMCS_HAZARDS } from './hazard_evmcs.ts';
import { PAGE_HAZARDS } from './hazard_pages.ts';
import { SPIN_HAZARDS } from './hazard_spin.ts';
import { STORM } from './hazard_storm.ts';

export const hazards: readonly Selftest[] = [...PAGE_HAZARDS, ...SPIN_HAZARDS, STORM, ...EVMCS_HAZARDS].map(
  hazardTest,
);
