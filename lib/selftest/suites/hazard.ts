// SPDX-License-Identifier: Apache-2.0
// What took kernels down: each test says what a healthy kernel shows. The kernel log is read around each.
import { foldChecksum, vmcallRegsValues } from '../../guest/index.ts';
import { selftest } from '../engine/define.ts';
import type {
  ExpectationTable,
  Observations,
  Requirement,
  Selftest,
  SelftestContext,
} from '../engine/model.ts';
import { binaryStats, nestedVmx } from '../engine/requirements.ts';
import { bootL1, hex, stopText } from './common.ts';

const SEED = 0x1234n;
const CHECKSUM = hex(foldChecksum([7, ...vmcallRegsValues(SEED)]));

/** A new VM runs an L2: KVM as a whole has survived. */
async function aftermath(context: SelftestContext): Promise<string> {
  await using machine = await bootL1(context);
  const l2 = await machine.l1.createL2({ vpid: 1, msrBitmap: true }, (p) => p.fold(7).vmcallRegs(SEED));
  const { signal } = context;
  const stops = [stopText(await l2.enter({ signal })), stopText(await l2.enter({ signal }))];
  return `${stops.join(' ')} ${hex(l2.progress.checksum)}`;
}
const HEALTHY = `vmcall vmcall ${CHECKSUM}`;

type Both = { readonly stock: ExpectationTable; readonly patched: ExpectationTable };

export interface HazardTest {
  readonly id: string;
  readonly title: string;
  readonly requires?: readonly Requirement[];
  readonly racing?: boolean;
  readonly expect: ExpectationTable | Both;
  readonly body: (context: SelftestContext) => Promise<Observations>;
  /** Of the body's observations, those that are not judged. */
  readonly evidence?: readonly string[];
}

/** A test of class host-crash; a VM made afterwards must work. */
export function hazardTest(test: HazardTest): Selftest {
  const { id, title, requires = [], racing = false, expect, evidence = [] } = test;
  const more = (table: ExpectationTable): ExpectationTable => ({ ...table, afterwards: HEALTHY });
  const isTwo = (one: HazardTest['expect']): one is Both => 'stock' in one && 'patched' in one;
  return selftest({
    id: `hazard/${id}`,
    title,
    hazard: 'host-crash',
    racing,
    requires: [nestedVmx, binaryStats, ...requires],
    expectations: isTwo(expect)
      ? { change: 'pages', stock: more(expect.stock), patched: more(expect.patched) }
      : { any: more(expect) },
    body: async (context) => {
      const seen = await test.body(context);
      const entries = Object.entries(seen);
      const afterwards = await aftermath(context);
      return {
        observed: {
          ...Object.fromEntries(entries.filter(([name]) => !evidence.includes(name))),
          afterwards,
        },
        evidence: Object.fromEntries(entries.filter(([name]) => evidence.includes(name))),
      };
    },
  });
}
