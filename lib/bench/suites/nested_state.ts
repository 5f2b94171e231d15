// SPDX-License-Identifier: Apache-2.0
import { runSteps, type Vcpu } from '../../kvm/index.ts';
import type { Bench } from '../bench.ts';
import type { Measurement } from '../model.ts';
import { bootMachine, mustBe } from './machine.ts';

const WHERE = ['l1', 'l2'] as const;
const OPERATIONS = ['get', 'set'] as const;

/** KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE: what a live migration pays per vCPU. */
export function nestedState(): Bench {
  const cases = WHERE.flatMap((where) => OPERATIONS.map((operation) => ({ where, operation })));
  return {
    family: 'nested-state',
    nested: true,
    figures: cases.map(({ where, operation }) => ({
      id: `nested-state/${operation}/${where}`,
      title: `KVM_${operation.toUpperCase()}_NESTED_STATE with ${where === 'l1' ? 'L1 running, a VMCS current' : 'L2 active'}`,
      missing: () => undefined,
    })),
    async measure(context, wanted) {
      const results: Measurement[] = [];
      const rounds = context.quick ? 20 : context.slow ? 100 : 5000;
      for (const where of WHERE) {
        using machine = await bootMachine();
        const { l1, vm } = machine;
        const gate = l1.allocate();
        const l2 = await l1.createL2({ vpid: 1, msrBitmap: true }, (program) =>
          program.sync(1).spin(gate, 8, 1).vmcall(),
        );
        if (where === 'l2') {
          mustBe('the stop', (await l2.enter()).kind, 'sync');
          // An exit that userspace has not completed is no state to save: L2 must stand between two instructions.
          await interrupt(l1.vcpu(0));
        }
        const vcpu = l1.vcpu(0);
        const bytes = vcpu.getNestedState().length;
        const { times } = runSteps(
          vcpu,
          [{ kind: 'get-nested-state' }, { kind: 'set-nested-state' }],
          rounds + 1,
          { stateSize: vm.checkExtension('KVM_CAP_NESTED_STATE') },
        );
        // A state that was set must still be the one that runs.
        if (where === 'l2') {
          new DataView(l1.memory.buffer).setBigUint64(gate, 1n, true);
          const stop = await l2.continue();
          mustBe('the exit afterwards', stop.kind === 'exit' ? stop.exit.reason : stop.kind, 'vmcall');
        }
        for (const [i, { id, title }] of this.figures.entries()) {
          const one = cases[i]!;
          if (one.where !== where || !wanted.has(id)) continue;
          const step = OPERATIONS.indexOf(one.operation);
          const samples = Float64Array.from({ length: rounds }, (_, n) => times[(n + 1) * 2 + step]!);
          results.push({ id, title, unit: 'cycles', samples, parameters: { bytes, rounds } });
        }
      }
      return results;
    },
  };
}

/** Lets the guest run and takes it out again, wherever it is. */
async function interrupt(vcpu: Vcpu): Promise<void> {
  const stop = new AbortController();
  const run = vcpu.run({ signal: stop.signal });
  stop.abort(new Error('interrupted'));
  const exit = await run.catch(() => undefined);
  mustBe('the exit of an interrupted run', exit?.type, undefined);
}
