// SPDX-License-Identifier: Apache-2.0
// The vCPU is stopped wherever it happens to be, and its state goes out and in again.
import { foldChecksum, vmcallRegsValues } from '../../guest/index.ts';
import { selftest } from '../engine/define.ts';
import type { Selftest } from '../engine/model.ts';
import { bootL1, hex, nestedRuns } from './common.ts';
import { differences, FLAG, stateField } from './nested_state_common.ts';
import { requires, SMALL, wipe } from './nested_state_where.ts';

const LOOPS = 600;
const CALLS = 12;
const PAUSES = 200;
const KICKS = 40;
const ENTRIES = LOOPS * (1 + CALLS) + 1;
const LONGEST_MS = 3;

/** Where a kick found the vCPU. */
function place(bytes: Uint8Array): string {
  const flags = Number(stateField(bytes, 'flags'));
  if (flags & FLAG.runPending) return 'entering';
  return flags & FLAG.guestMode ? 'l2' : 'l1';
}

export const racing: Selftest = selftest({
  id: 'nested-state/racing/kick',
  title: 'kicked at random, saved, wiped and restored: no entry, exit or register is lost or seen twice',
  requires,
  racing: true,
  expectations: {
    any: {
      last: 'vmcall',
      differs: 'differs',
      nestedRun: ENTRIES,
      vmcallExits: ENTRIES,
      executed: LOOPS * (2 + CALLS * 3),
      checksum: hex(foldChecksum(Array.from({ length: LOOPS }, () => vmcallRegsValues(0x100)).flat())),
    },
  },
  body: async (context) => {
    const { signal, random } = context;
    await using machine = await bootL1(context, SMALL);
    const { l1 } = machine;
    const { vcpu } = l1.cpu(0);
    const l2 = await l1.createL2({ vpid: 7, msrBitmap: true }, (program) =>
      program.loop(LOOPS, (body) =>
        body.vmcallRegs(0x100).loop(CALLS, (inner) => inner.vmcall().pause(PAUSES)),
      ),
    );
    const before = nestedRuns(l1);
    const seen: Record<string, number> = { l1: 0, l2: 0, entering: 0 };
    const differs: string[] = [];
    let pending: Promise<unknown> = Promise.resolve();
    let last = 'none';
    for (let kick = 0; last === 'none'; kick++) {
      const abort = new AbortController();
      const options = { signal: AbortSignal.any([signal, abort.signal]), limit: ENTRIES };
      const run = l2.entered ? l2.continue(options) : l2.enter({ ...options, policy: { vmcall: 'skip' } });
      pending = run.then(
        (stop) => {
          last = stop.kind === 'exit' ? stop.exit.reason : stop.kind;
        },
        (error: unknown) => {
          if (!abort.signal.aborted || signal.aborted) throw error;
        },
      );
      if (kick < KICKS) {
        await context.sleep(Math.floor(random() * (LONGEST_MS + 1)));
        abort.abort();
      }
      await pending;
      if (last !== 'none') break;
      const snapshot = vcpu.save();
      seen[place(snapshot.nested!)]! += 1;
      wipe(vcpu);
      vcpu.restore(snapshot);
      differs.push(...differences(vcpu.save(), snapshot));
    }
    return {
      observed: {
        last,
        differs: ['differs', ...differs].join(' '),
        nestedRun: nestedRuns(l1) - before,
        vmcallExits: l2.exitCount('vmcall'),
        executed: l2.progress.executed,
        checksum: hex(l2.progress.checksum),
      },
      evidence: { inL1: seen['l1']!, inL2: seen['l2']!, entering: seen['entering']! },
    };
  },
});
