// SPDX-License-Identifier: Apache-2.0
import type { Ending, SeenEnding } from './watch.ts';

type Explained = Extract<Ending, { kind: 'panic' | 'powered-off' }>;

/** What the emulator says when the machine stops it, in the words of its sources. */
const ENDS: readonly (readonly [said: RegExp, ending: Explained])[] = [
  [
    /3rd \(\d+\) exception with no resolution/,
    { kind: 'panic', why: 'triple fault: the kernel could not take an exception' },
  ],
  [
    /ACPI control: soft power off/,
    { kind: 'powered-off', why: 'somebody in it turned the power off, with its kernel alive' },
  ],
  // A second start of the boot sector: there is nothing to boot any more.
  [/Shutdown port: shutdown requested/, { kind: 'panic', why: 'the machine was reset' }],
];
const UNKNOWN: Explained = {
  kind: 'panic',
  why: 'the machine reset itself or shut down (triple fault, or a reboot by the kernel)',
};

/** Why the emulator ended, where the machine did not say: its own last words, from its log. */
export function explainEnding(ending: SeenEnding, log: string): Ending {
  if (ending.kind !== 'gone' && ending.kind !== 'engine-failed') return ending;
  const last = log
    .split('\n')
    .filter((line) => line.includes('PANIC'))
    .at(-1);
  if (last === undefined) return ending.kind === 'gone' ? UNKNOWN : ending;
  const known = ENDS.find(([said]) => said.test(last))?.[1];
  if (ending.kind === 'gone' && known) return known;
  const such = ending.kind === 'gone' ? UNKNOWN : ending;
  return { ...such, why: `${such.why} (emulator: ${last.trim()})` };
}
