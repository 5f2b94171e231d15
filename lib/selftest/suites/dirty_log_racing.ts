// SPDX-License-Identifier: Apache-2.0
// What a live migration does: copy what the log names, again and again, while L2 writes.
import { selftest } from '../engine/define.ts';
import type { Selftest } from '../engine/model.ts';
import { nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1 } from './common.ts';

const GPA = 0xc000_0000;
const PAGE = 4096;
const PAGES = 32;
const ROUNDS = 500;
const LONGEST_MS = 3;

export const racing: Selftest = selftest({
  id: 'dirty-log/racing/copy',
  title: 'memory copied by the log alone while L2 writes is the same as the memory in the end',
  requires: [nestedVmx, vmxControl('secondary.enable-ept')],
  racing: true,
  expectations: {
    any: { last: 'vmcall', different: 0, rightMemory: PAGES, executed: ROUNDS * (2 * PAGES + 2) },
  },
  body: async (context) => {
    const { signal, random } = context;
    await using machine = await bootL1(context);
    const { vm, l1 } = machine;
    const region = vm.memory.add({ gpa: GPA, size: PAGES * PAGE, logDirtyPages: true });
    // inc qword [rdi]; ret
    const increment = l1.place(Uint8Array.of(0x48, 0xff, 0x07, 0xc3));
    const l2 = await l1.createL2({}, (program) =>
      program.loop(ROUNDS, (body) => {
        for (let page = 0; page < PAGES; page++) body.call(increment, GPA + page * PAGE).pause(100);
        body.pause(2000);
      }),
    );
    const copy = new Uint8Array(PAGES * PAGE);
    let copied = 0;
    let looks = 0;
    const look = (): void => {
      const memory = new Uint8Array(region.buffer);
      looks += 1;
      for (const page of region.dirtyPages()) {
        copy.set(memory.subarray(page * PAGE, (page + 1) * PAGE), page * PAGE);
        copied += 1;
      }
    };
    let last = '';
    const run = l2.enter({ signal }).then((stop) => {
      last = stop.kind === 'exit' ? stop.exit.reason : stop.kind;
    });
    while (last === '') {
      await Promise.race([run, context.sleep(Math.floor(random() * (LONGEST_MS + 1)))]);
      look();
    }
    look();
    const memory = new Uint8Array(region.buffer);
    const words = new DataView(region.buffer);
    const numbers = Array.from({ length: PAGES }, (_, page) => words.getBigUint64(page * PAGE, true));
    return {
      observed: {
        last,
        different: copy.reduce((sum, byte, i) => sum + (byte === memory[i] ? 0 : 1), 0),
        rightMemory: numbers.filter((value) => value === BigInt(ROUNDS)).length,
        executed: l2.progress.executed,
      },
      evidence: { looks, copied },
    };
  },
});
