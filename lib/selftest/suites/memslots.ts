// SPDX-License-Identifier: Apache-2.0
// Memslots that come, go, move and change while L2 is active and touches them: one VM entry from begin to end.
import { foldChecksum, type L2, L2Program, type L2Stop } from '../../guest/index.ts';
import type { Exit } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observed, Selftest, SelftestContext, Suite } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, hex, nestedRuns } from './common.ts';
import { A, B, CASES, type Case, STAYS, Stage, type Step } from './memslots_cases.ts';
import { many } from './memslots_many.ts';
import { racing } from './memslots_racing.ts';

function place(gpa: number): string {
  const [name, base] = gpa >= B ? ['B', B] : ['A', A];
  return `${name}+${hex(gpa - base)}`;
}

/** Answers a read with {@link MMIO}. */
export function mmioText(exit: Exit): string {
  if (exit.type === 'internal-error') return `internal-error ${exit.suberror}`;
  if (exit.type !== 'mmio') return exit.type;
  if (!exit.isWrite) {
    exit.data.fill(0x5a);
    return `read ${place(exit.address)}`;
  }
  const value = exit.data.reduceRight((sum, byte) => sum * 256 + byte, 0);
  return `write ${place(exit.address)}=${hex(value)}`;
}

/** Runs to the next sync or exit to L1 and writes the others down. */
async function toSync(l2: L2, first: Promise<L2Stop>, signal: AbortSignal): Promise<string[]> {
  const stops: string[] = [];
  let stop = await first;
  while (stop.kind === 'kvm-exit' && stops.length < 16) {
    const text = mmioText(stop.exit);
    stops.push(text);
    if (stop.exit.type !== 'mmio') return stops;
    stop = await l2.continue({ signal });
  }
  if (stop.kind === 'exit') stops.push(stop.exit.reason);
  return stops;
}

/** A stop before each step, and one at the end. */
function programOf(steps: readonly Step[], program = new L2Program()): L2Program {
  program.sync(0);
  for (const [i, step] of steps.entries()) {
    step.run(program);
    program.sync(i + 1);
  }
  return program;
}

async function play(context: SelftestContext, { steps }: Case, ept: boolean) {
  const { signal } = context;
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const stage = new Stage(vm);
  stage.add('b', B);
  stage.write('b', 0, STAYS);
  const l2 = await l1.createL2(ept ? {} : { ept: false }, (program) => programOf(steps, program));
  const before = nestedRuns(l1);
  await l2.enter({ signal });
  const stops: string[][] = [];
  const looks: Observed[] = [];
  for (const step of steps) {
    step.act(stage);
    stops.push(await toSync(l2, l2.continue({ signal }), signal));
    if (step.look) looks.push(step.look(stage));
  }
  const end = await toSync(l2, l2.continue({ signal }), signal);
  return {
    observed: {
      stops,
      looks,
      end,
      executed: l2.progress.executed,
      checksum: hex(l2.progress.checksum),
      nestedRun: nestedRuns(l1) - before,
    },
  };
}

function define(one: Case, ept: boolean): Selftest {
  const { id, title, steps } = one;
  return selftest({
    id: `memslots/${ept ? 'ept' : 'no-ept'}/${id}`,
    title: `${title}${ept ? '' : '; L2 without EPT'}`,
    requires: [nestedVmx, binaryStats, ...(ept ? [vmxControl('secondary.enable-ept')] : [])],
    expectations: {
      any: {
        stops: steps.map((step) => step.stops ?? []),
        looks: steps.flatMap(({ seen }) => (seen === undefined ? [] : [seen])),
        end: ['vmcall'],
        checksum: hex(foldChecksum(steps.flatMap(({ values }) => values))),
        executed: programOf(steps).length,
        nestedRun: 1,
      },
    },
    body: (context) => play(context, one, ept),
  });
}

export const memslots: Suite = {
  name: 'memslots',
  parameters: {
    n: { title: 'slots of one page each', min: 1, max: 32_764, default: [1, 64, 509] },
  },
  tests: ({ n = [] }) => [
    ...[true, false].flatMap((ept) => CASES.map((one) => define(one, ept))),
    ...many(n),
    ...racing,
  ],
};
