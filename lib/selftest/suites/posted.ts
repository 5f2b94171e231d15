// SPDX-License-Identifier: Apache-2.0
// What the tests of posted interrupts have in common.
import type { ControlName, L2Options } from '../../guest/index.ts';
import type { Stage } from './page_rounds.ts';

/** The notification vector, and one that is posted. */
export const NOTIFICATION = 0xe2;
export const VECTOR = 0x61;

export const POSTED_CONTROLS: readonly ControlName[] = [
  'primary.use-tpr-shadow',
  'primary.use-msr-bitmaps',
  'secondary.virtual-interrupt-delivery',
  'secondary.virtualize-x2apic-mode',
  'pin.external-interrupt-exiting',
  'pin.process-posted-interrupts',
  'exit.acknowledge-interrupt-on-exit',
];

/** L2 ends its interrupts by the virtualised x2APIC, without an exit. */
export const OPTIONS: L2Options = {
  msrBitmap: true,
  controls: ['secondary.virtualize-x2apic-mode'],
  autoEoi: 'x2apic',
};

/** PIR bit, ON, KVM_SIGNAL_MSI of the notification vector. */
export function post({ l1, l2 }: Pick<Stage, 'l1' | 'l2'>, vector: number | undefined = VECTOR): void {
  l2.postedInterrupts?.post(vector);
  l1.signal(NOTIFICATION);
}
