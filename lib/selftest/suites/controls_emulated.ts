// SPDX-License-Identifier: Apache-2.0
// Instructions of L2 that KVM emulates instead of the CPU: L1's controls count for them too.
import type { ControlName } from '../../guest/index.ts';
import type { Requirement, Selftest } from '../engine/model.ts';
import { kernelFrom } from '../engine/requirements.ts';
import { hex } from './common.ts';
import { type ControlCase, controlTest, MARK, MARKED } from './scenario.ts';
import { PORT_INPUT } from './trace.ts';

/** UD2 and "kvm": KVM emulates the instruction behind it (kvm.force_emulation_prefix). */
const PREFIX = [0x0f, 0x0b, 0x6b, 0x76, 0x6d];
const VECTOR = 0x61;
const PORT = 0x80;
/** xor eax, eax; out 0x80, al */
const OUT = [0x31, 0xc0, ...PREFIX, 0xe6, PORT];
/** in al, 0x80 */
const IN = [...PREFIX, 0xe4, PORT];
const IN_EXIT = 'io-instruction q=0x800048';
const OUT_EXIT = 'io-instruction q=0x800040';
const userspace = (direction: string, data: number): string =>
  `userspace ${direction} port=0x80 data=${hex(data)}`;

const forcedEmulation: Requirement = {
  name: 'kvm.force_emulation_prefix',
  missing: ({ kvm }) =>
    ['1', 'Y'].includes(kvm.parameters['kvm.force_emulation_prefix'] ?? '')
      ? undefined
      : 'needs kvm.force_emulation_prefix=1: --append kvm.force_emulation_prefix=1, or write 1 to that parameter in sysfs',
};

const either = (...exits: string[]) => ({ oneOf: exits.map((exit) => [exit, 'vmcall']) });
const PORT_BIT: Partial<ControlCase> = {
  options: (bench) => ({ fields: { IO_BITMAP_A: bench.page('A'), IO_BITMAP_B: bench.page('B') } }),
  before: (bench) => bench.view('A').setUint8(PORT >> 3, 1),
};
const asked = kernelFrom(7, 3, 'do not ask for them, or inject #UD (seen on 6.1 and 6.12)');

function emulated(
  control: ControlName,
  title: string,
  code: readonly number[],
  exit: string,
  more: Partial<ControlCase> = {},
): Selftest {
  return controlTest({
    control,
    variant: 'emulated',
    title: `${title}, emulated: exits exactly when the control is set`,
    program: (p, bench) => p.call(bench.code(...code, ...MARK), bench.page('page')),
    set: { exits: [exit, 'vmcall'], executed: 1, values: MARKED },
    clear: { exits: ['vmcall'], executed: 1, values: MARKED },
    ...more,
    requires: [forcedEmulation, asked, ...(more.requires ?? [])],
  });
}

export const emulatedInstructions: readonly Selftest[] = [
  emulated('primary.pause-exiting', 'PAUSE', [...PREFIX, 0xf3, 0x90], 'pause len=2'),
  emulated('primary.hlt-exiting', 'HLT', [], 'hlt len=1', {
    // As it is asleep, an interrupt wakes it
    program: (p, bench) => p.sync(1).call(bench.code(0xfb, ...PREFIX, 0xf4, ...MARK)),
    options: () => ({ fields: { GUEST_RFLAGS: 2 } }),
    before: ({ cpu }) => cpu.x2apicEnable(),
    trace: (bench) => ({ onSync: () => bench.interrupt(VECTOR), onExit: () => {} }),
    set: { exits: ['sync 1', 'hlt len=1', 'vmcall'], executed: 2, values: MARKED },
    clear: { exits: ['sync 1', 'vmcall'], executed: 2, values: MARKED },
  }),
  emulated('primary.use-io-bitmaps', 'OUT', OUT, `${OUT_EXIT} len=2`, {
    ...PORT_BIT,
    clear: { exits: [userspace('out', 0), 'vmcall'], executed: 1, values: MARKED },
  }),
  // KVM 7.3 leaves out the bit that says IN, and the whole qualification where there is no bitmap
  emulated('primary.use-io-bitmaps', 'IN', IN, '', {
    ...PORT_BIT,
    variant: 'emulated-in',
    set: { exits: either(`${IN_EXIT} len=2`, `${OUT_EXIT} len=2`), executed: 1, values: MARKED },
    clear: { exits: [userspace('in', PORT_INPUT), 'vmcall'], executed: 1, values: MARKED },
  }),
  emulated('primary.unconditional-io-exiting', 'OUT', OUT, '', {
    set: {
      exits: either(`${OUT_EXIT} len=2`, 'io-instruction len=2'),
      executed: 1,
      values: MARKED,
    },
    clear: { exits: [userspace('out', 0), 'vmcall'], executed: 1, values: MARKED },
  }),
  // sidt [rdi]
  emulated(
    'secondary.descriptor-table-exiting',
    'SIDT',
    [...PREFIX, 0x0f, 0x01, 0x0f],
    'gdtr-idtr-access len=3',
  ),
];
