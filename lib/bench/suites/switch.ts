// SPDX-License-Identifier: Apache-2.0
import { Batch } from '../../guest/index.ts';
import type { BackingName, Bench } from '../bench.ts';
import type { Measurement } from '../model.ts';
import { backingOf, benchL2, bootMachine, ControlPages, mustBe } from './machine.ts';

const VMCSS = [1, 2, 4, 8, 9, 16] as const;
/** RDTSC, VMPTRLD, ENTER: as many turns as a batch has room for. */
const TURNS = 336;
const BATCHES = { quick: 1, slow: 2, fast: 60 };

/** Round robin over VMCSs: VMPTRLD, VMRESUME, VMCALL. Nine is one more than the series keeps per vCPU. */
export function l2Switch(backing: BackingName): Bench {
  return {
    family: `switch/${backing}`,
    nested: true,
    backing,
    figures: VMCSS.map((count) => ({
      id: `switch/${backing}/vmcs=${count}`,
      title: `VMPTRLD, VMRESUME, VMCALL in turn over ${count} VMCS${count === 1 ? '' : 's'}`,
      missing: () => undefined,
    })),
    async measure(context, wanted) {
      using machine = await bootMachine();
      const { l1, vm } = machine;
      const most = Math.max(...VMCSS);
      const pages = new ControlPages(vm, most, backingOf(backing, context), 'vapic');
      const all = [];
      for (let i = 0; i < most; i += 1) {
        const l2 = await benchL2(l1, 'bench_vmcall', pages.options(i));
        l2.setPolicy({ vmcall: 'skip' });
        all.push(l2);
      }
      const cpu = l1.cpu(0);
      const results: Measurement[] = [];
      for (const [i, count] of VMCSS.entries()) {
        const figure = this.figures[i]!;
        if (!wanted.has(figure.id)) continue;
        const l2s = all.slice(0, count);
        for (const l2 of l2s) await l2.enter({ policy: { vmcall: 'skip' }, limit: 2 });
        const batch = new Batch();
        for (let turn = 0; turn < TURNS; turn += 1) {
          const l2 = l2s[turn % count]!;
          batch.rdtsc().vmptrld(l2.vmcs).enter(l2.area.gpa, 'resume', 1);
        }
        batch.rdtsc();
        const samples: number[] = [];
        const batches = context.quick ? BATCHES.quick : context.slow ? BATCHES.slow : BATCHES.fast;
        const before = l2s.map((l2) => l2.exitCount('vmcall'));
        for (let n = 0; n < batches; n += 1) {
          const results = await cpu.executeAll(batch);
          const times = results.filter(({ command }) => command === 'RDTSC').map(({ values }) => values[0]);
          for (let turn = 0; turn < TURNS; turn += 1) samples.push(Number(times[turn + 1]! - times[turn]!));
        }
        const exits = l2s.reduce((sum, l2, n) => sum + l2.exitCount('vmcall') - before[n]!, 0);
        mustBe('VMCALL exits', exits, batches * TURNS);
        results.push({
          id: figure.id,
          title: figure.title,
          unit: 'cycles',
          samples,
          parameters: { vmcs: count, turns: batches * TURNS },
          counts: { vmcallExits: exits },
        });
      }
      return results;
    },
  };
}
