// SPDX-License-Identifier: Apache-2.0
import type { Selftest } from '../engine/model.ts';
import { eptTranslation } from './translation_ept.ts';
import { staleTranslation } from './translation_stale.ts';

/** From L2's linear addresses to L1's memory. */
export const translation: readonly Selftest[] = [...eptTranslation, ...staleTranslation];
