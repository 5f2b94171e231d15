// SPDX-License-Identifier: Apache-2.0
// How many memslots there may be, with L2 touching some of them.

import { foldChecksum } from '../../guest/index.ts';
import { KvmError, KvmUnsupportedError, type MemoryRegion } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Selftest } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, hex, nestedRuns } from './common.ts';

const PAGE = 4096;
const BASE = 0x8000_0000;
/** Every second page: no two slots touch each other. */
const at = (slot: number) => BASE + 2 * slot * PAGE;
const requires = [nestedVmx, binaryStats, vmxControl('secondary.enable-ept')];

/** The slots that L2 touches: the first, the last, and some between. */
function touched(n: number): number[] {
  return [...new Set([0, 1, n >> 2, n >> 1, n - 2, n - 1])].filter((slot) => slot >= 0 && slot < n);
}

function manyTest(n: number): Selftest {
  const slots = touched(n);
  return selftest({
    id: `memslots/many/n=${n}`,
    title: `${n} slots are there when L2 comes, one goes and comes back, then all but the last go`,
    requires,
    timeoutMs: 20_000 + n * 20,
    expectations: {
      any: {
        written: slots.map((slot) => slot + 1),
        gone: n === 1 ? [] : [`read ${hex(at(0))}`],
        last: n,
        checksum: hex(foldChecksum(n === 1 ? [1] : [...slots.map((slot) => slot + 1), 0x5a, n])),
        nestedRun: 1,
      },
    },
    body: async (context) => {
      const { signal } = context;
      await using machine = await bootL1(context);
      const { vm, l1 } = machine;
      const room = vm.checkExtension('KVM_CAP_NR_MEMSLOTS') - vm.memory.regions.length;
      if (n > room)
        throw new KvmUnsupportedError(`KVM_CAP_NR_MEMSLOTS of ${n + 1}`, 'KVM_SET_USER_MEMORY_REGION');
      const regions: MemoryRegion[] = [];
      for (let slot = 0; slot < n; slot++) {
        regions.push(vm.memory.add({ gpa: at(slot), size: PAGE, slot: slot + 1 }));
        if (slot % 256 === 255) await context.sleep(0);
      }
      const l2 = await l1.createL2({}, (program) => {
        for (const slot of slots) program.write64(at(slot), slot + 1);
        program.sync(1);
        if (n === 1) program.read64(at(0));
        else {
          for (const slot of slots) program.read64(at(slot));
          program
            .sync(2)
            .read8(at(0))
            .read64(at(n - 1));
        }
      });
      const before = nestedRuns(l1);
      await l2.enter({ signal });
      const word = (slot: number) => Number(new DataView(regions[slot]!.buffer).getBigUint64(0, true));
      const written = slots.map(word);
      const gone: string[] = [];
      let stop = await l2.continue({ signal });
      if (n > 1) {
        for (let slot = 0; slot < n - 1; slot++) {
          regions[slot]!.delete();
          if (slot % 256 === 255) await context.sleep(0);
        }
        stop = await l2.continue({ signal });
        while (stop.kind === 'kvm-exit' && stop.exit.type === 'mmio' && gone.length < 4) {
          gone.push(`${stop.exit.isWrite ? 'write' : 'read'} ${hex(stop.exit.address)}`);
          stop.exit.data.fill(0x5a);
          stop = await l2.continue({ signal });
        }
      }
      const { checksum } = l2.progress;
      return {
        observed: {
          written,
          gone,
          last: word(n - 1),
          checksum: hex(checksum),
          nestedRun: nestedRuns(l1) - before,
        },
        evidence: { slots: n, end: stop.kind },
      };
    },
  });
}

const limit = selftest({
  id: 'memslots/limit',
  title: 'a slot number beyond KVM_CAP_NR_MEMSLOTS is EINVAL, the last one works for L2; overlaps are EEXIST',
  requires,
  expectations: { any: { beyond: 'EINVAL', overlap: 'EEXIST', end: 'exit', word: 7, executed: 1 } },
  body: async (context) => {
    const { signal } = context;
    await using machine = await bootL1(context);
    const { vm, l1 } = machine;
    const slots = vm.checkExtension('KVM_CAP_NR_MEMSLOTS');
    const errno = (slot: number, gpa: number): string => {
      try {
        vm.memory.add({ gpa, size: PAGE, slot });
        return 'ok';
      } catch (error) {
        if (error instanceof KvmError) return error.code;
        throw error;
      }
    };
    const region = vm.memory.add({ gpa: at(0), size: PAGE, slot: slots - 1 });
    const beyond = errno(slots, at(1));
    const overlap = errno(5, at(0));
    const l2 = await l1.createL2({}, (program) => program.write64(at(0), 7));
    const stop = await l2.enter({ signal });
    const word = Number(new DataView(region.buffer).getBigUint64(0, true));
    return {
      observed: { beyond, overlap, end: stop.kind, word, executed: l2.progress.executed },
      evidence: { slots },
    };
  },
});

export function many(n: readonly number[]): readonly Selftest[] {
  return [...n.map(manyTest), limit];
}
