// SPDX-License-Identifier: Apache-2.0
// The price of caching: what an invalidation costs when many VMCSs have been loaded. KVM that remembers the pages of
// each nested context must look through all of them.
import { abiPorts, Batch } from '../../guest/index.ts';
import { runSteps, type Step } from '../../kvm/index.ts';
import type { BackingName, Bench } from '../bench.ts';
import type { Measurement } from '../model.ts';
import { backingOf, benchL2, benchRecord, bootMachine, ControlPages, symbol } from './machine.ts';

const VMCSS = [0, 1, 8, 16, 32] as const;
const VICTIM_GPA = 256 * 1024 * 1024;
const OPERATIONS = {
  madvise: 'madvise(MADV_DONTNEED) of a page the guest just touched',
  move: 'moving the memslot of a page the guest just touched',
  replace: 'deleting and adding that memslot',
} as const;
type Operation = keyof typeof OPERATIONS;
const NAMES = Object.keys(OPERATIONS) as Operation[];

export function invalidation(backing: BackingName): Bench {
  const cases = VMCSS.flatMap((vmcss) => NAMES.map((operation) => ({ vmcss, operation })));
  return {
    family: `invalidate/${backing}`,
    nested: true,
    backing,
    figures: cases.map(({ vmcss, operation }) => ({
      id: `invalidate/${operation}/${backing}/vmcs=${vmcss}`,
      title: `${OPERATIONS[operation]}, after ${vmcss} VMCSs were loaded and entered`,
      missing: () => undefined,
    })),
    async measure(context, wanted) {
      using machine = await bootMachine();
      const { vm, l1 } = machine;
      const pages = new ControlPages(vm, Math.max(...VMCSS), backingOf(backing, context), 'vapic');
      const region = vm.memory.add({ gpa: VICTIM_GPA, size: 4096 });
      const record = benchRecord(l1);
      record.setU64('start', VICTIM_GPA);
      record.setU64('pages', 1);
      record.setU64('share', 1);
      const rounds = context.quick ? 20 : context.slow ? 60 : 2000;
      const results: Measurement[] = [];
      let loaded = 0;
      for (const [i, { vmcss, operation }] of cases.entries()) {
        for (; loaded < vmcss; loaded += 1) {
          const l2 = await benchL2(l1, 'bench_vmcall', pages.options(loaded));
          await l2.enter({ policy: { vmcall: 'skip' }, limit: 1 });
        }
        const { id, title } = this.figures[i]!;
        if (!wanted.has(id)) continue;
        await l1.cpu(0).executeAll(new Batch().call(symbol(l1, 'bench_touch'), record.gpa));
        const steps: Record<Operation, Step> = {
          madvise: { kind: 'discard', region },
          move: { kind: 'move', region, gpa: VICTIM_GPA + 0x1_0000 },
          replace: { kind: 'replace', region },
        };
        const plan: Step[] = [{ kind: 'run', port: abiPorts.done }, steps[operation]];
        if (operation === 'move') plan.push({ kind: 'move', region, gpa: VICTIM_GPA });
        const { times } = runSteps(l1.vcpu(0), plan, rounds + 1);
        const samples = Float64Array.from({ length: rounds }, (_, n) => times[(n + 1) * plan.length + 1]!);
        results.push({ id, title, unit: 'cycles', samples, parameters: { vmcs: vmcss, rounds } });
      }
      return results;
    },
  };
}
