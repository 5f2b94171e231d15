// SPDX-License-Identifier: Apache-2.0
import type { Selftest } from '../engine/model.ts';
import { emulatedInstructions } from './controls_emulated.ts';
import { capabilityMsrs } from './controls_msrs.ts';
import { otherControls } from './controls_other.ts';
import { primaryControls } from './controls_primary.ts';
import { registerControls } from './controls_registers.ts';
import { secondaryControls } from './controls_secondary.ts';

/** Each control that KVM offers L1: set, its effect is seen; clear, it is not. */
export const controls: readonly Selftest[] = [
  ...otherControls,
  ...primaryControls,
  ...secondaryControls,
  ...registerControls,
  ...capabilityMsrs,
  ...emulatedInstructions,
];
