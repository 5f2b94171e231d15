// SPDX-License-Identifier: Apache-2.0
import { Batch } from '../../guest/index.ts';
import type { Bench } from '../bench.ts';
import type { Measurement } from '../model.ts';
import { benchL2, benchRecord, bootMachine, mustBe, symbol, TickBuffer } from './machine.ts';

/** IA32_PLATFORM_ID: KVM emulates it and never passes it through. */
const MSR = 0x17;
/** The in-kernel interrupt controller's mask register. */
const PORT = 0x21;

const LOOPS = [
  { id: 'exit/l1-cpuid', loop: 'bench_cpuid', operand: 0, title: 'CPUID in L1: one exit to L0' },
  { id: 'exit/l1-rdmsr', loop: 'bench_rdmsr', operand: MSR, title: 'RDMSR of IA32_PLATFORM_ID in L1' },
  { id: 'exit/l1-in', loop: 'bench_in', operand: PORT, title: 'IN from the in-kernel PIC in L1' },
  {
    id: 'exit/l2-rdmsr',
    loop: 'bench_rdmsr_l2',
    operand: MSR,
    title: 'RDMSR of IA32_PLATFORM_ID in L2, which L1 does not intercept: L0 alone answers',
  },
  {
    id: 'exit/l2-in',
    loop: 'bench_in_l2',
    operand: PORT,
    title: 'IN from the in-kernel PIC in L2, which L1 does not intercept',
  },
] as const;

const isNested = (loop: string): boolean => loop.endsWith('_l2');

/** Exits that L0 handles by itself, to compare a round trip to L1 with. */
export function exits(level: 'l1' | 'l2'): Bench {
  const loops = LOOPS.filter(({ loop }) => isNested(loop) === (level === 'l2'));
  return {
    family: `exit/${level}`,
    nested: level === 'l2',
    figures: loops.map(({ id, title }) => ({ id, title, missing: () => undefined })),
    async measure(context, wanted) {
      const results: Measurement[] = [];
      const turns = context.quick ? 500 : context.slow ? 2000 : 100_000;
      for (const { id, title, loop, operand } of loops) {
        if (!wanted.has(id)) continue;
        using machine = await bootMachine();
        const { l1 } = machine;
        const record = benchRecord(l1);
        const buffer = new TickBuffer(l1, turns);
        record.setU64('samples', buffer.gpa);
        record.setU64('operand', operand);
        const entries = async (count: number): Promise<void> => {
          record.setU64('turns', count);
          if (level === 'l1') {
            const [result] = await l1.cpu(0).executeAll(new Batch().call(symbol(l1, loop), record.gpa));
            mustBe('turns', result!.values[0], BigInt(count));
          } else {
            const stop = await l2!.enter();
            mustBe('the exit', stop.kind === 'exit' ? stop.exit.reason : stop.kind, 'vmcall');
            mustBe('turns', l2!.area.u64('regs', 0), BigInt(count));
          }
        };
        const l2 =
          level === 'l2' ? await benchL2(l1, loop, { vpid: 1, msrBitmap: true }, record.gpa) : undefined;
        await entries(Math.ceil(turns / 10));
        await entries(turns);
        results.push({ id, title, unit: 'cycles', samples: buffer.take(turns), parameters: { turns } });
      }
      return results;
    },
  };
}
