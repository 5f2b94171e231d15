// SPDX-License-Identifier: Apache-2.0
// Hyper-V's enlightened VMCS: where it is and who uses it.
import { EVMCS_BYTES, foldChecksum, type L2, VP_ASSIST, vmcallRegsValues } from '../../guest/index.ts';
import { series } from '../../probe/index.ts';
import { selftest } from '../engine/define.ts';
import type { Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, nestedVmx } from '../engine/requirements.ts';
import { bootL1, nestedRuns, stat } from './common.ts';
import { cleanFields } from './evmcs_clean.ts';
import { evmcsCpuid } from './evmcs_cpuid.ts';
import { flushes } from './evmcs_flush.ts';
import { evmcsSmm } from './evmcs_smm.ts';
import { type Bench, enlightenedVmcs, type ScenarioCase, scenarioTest } from './scenario.ts';
import { trace } from './trace.ts';

const ELSEWHERE = 0xc000_0000;

/** Makes the VP assist page of L1's vCPU name another eVMCS. */
function point(bench: Bench, gpa: number): void {
  bench.cpu.vpAssistPage.setBigUint64(VP_ASSIST.currentNestedVmcs, BigInt(gpa), true);
}

/** What it names. */
function pointer(bench: Bench): number {
  return Number(bench.cpu.vpAssistPage.getBigUint64(VP_ASSIST.currentNestedVmcs, true));
}

const POINTER_CASES: readonly ScenarioCase[] = [
  {
    id: 'evmcs/run',
    title: 'L2 runs on an eVMCS, and its exits are found there',
    program: (p) => p.fold(7).cpuid(0x4000_0000).vmcall(),
    before: (bench) => {
      bench.notes['runs'] = BigInt(nestedRuns(bench.l1));
    },
    requires: [binaryStats],
    after: async (bench) => ({
      reason: Number(await bench.l2.fields.read('VM_EXIT_REASON')),
      nestedRun: nestedRuns(bench.l1) - Number(bench.notes['runs']),
    }),
    expect: { exits: ['cpuid len=2', 'vmcall'], executed: 2, more: { reason: 18, nestedRun: 2 } },
  },
  {
    id: 'evmcs/revision',
    title: 'an eVMCS of version 2: VMLAUNCH is VMfailInvalid',
    program: (p) => p.fold(7),
    before: ({ l2 }) => {
      if (l2.evmcs) l2.evmcs.revision = 2;
    },
    expect: { exits: ['VMLAUNCH VMfailInvalid'], executed: 0, values: [] },
  },
  {
    id: 'evmcs/unbacked',
    title: 'an eVMCS where no memory is: VMLAUNCH is #UD in L1',
    program: (p) => p.fold(7),
    before: (bench) => point(bench, ELSEWHERE),
    expect: { exits: ['L1 exception 6 code=0x0'], executed: 0, values: [] },
  },
  {
    id: 'evmcs/unaligned',
    title: 'a pointer into the middle of the page: stock KVM takes the page, the series refuses it with #UD',
    program: (p) => p.fold(7),
    before: (bench) => point(bench, bench.l2.vmcs + 8),
    after: (bench) => ({ offset: pointer(bench) - bench.l2.vmcs }),
    expect: { exits: ['vmcall'], executed: 1, values: [7], more: { offset: 8 } },
    patched: {
      change: 'evmcs',
      exits: ['L1 exception 6 code=0x0'],
      executed: 0,
      values: [],
      more: { offset: 8 },
    },
  },
  {
    id: 'evmcs/page-swap',
    title: 'other memory comes beneath the eVMCS between two entries: stock KVM runs on from the old page',
    options: (bench) => ({ entry: bench.raw('first', 0xb0, 1, 0x0f, 0x01, 0xc1, 0xb0, 2, 0x0f, 0x01, 0xc1) }),
    before: async (bench) => {
      const second = bench.raw('second', 0xb0, 3, 0x0f, 0x01, 0xc1); // mov al, 3; vmcall
      const bytes = () => bench.l1.bytes(bench.l2.vmcs, EVMCS_BYTES);
      const old = bench.vm.memory.add({ gpa: ELSEWHERE, size: 4096 });
      new Uint8Array(old.buffer).set(bytes());
      point(bench, ELSEWHERE);
      bench.l2.area.setU64('evmcs', ELSEWHERE);
      const { last } = await trace(bench.l2);
      bench.results['before'] = Number((last?.registers.rax ?? 0n) & 0xffn);
      // The same eVMCS as it was left, but L2 goes on elsewhere
      bytes().set(new Uint8Array(old.buffer, 0, EVMCS_BYTES));
      await bench.l2.vmwrite('GUEST_RIP', second);
      if (bench.l2.evmcs) bench.l2.evmcs.cleanFields = 0;
      old.delete();
      new Uint8Array(bench.vm.memory.add({ gpa: ELSEWHERE, size: 4096 }).buffer).set(bytes());
    },
    after: (bench, last) => ({ ...bench.results, after: Number((last?.registers.rax ?? 0n) & 0xffn) }),
    expect: { exits: ['vmcall'], more: { before: 1, after: 2 } },
    patched: { change: 'evmcs', exits: ['vmcall'], more: { before: 1, after: 3 } },
  },
];

const ROUNDS = 4;

/** c L2s take turns on one L1 vCPU, VMLAUNCH and VMRESUME in each turn; every `plain`th has an ordinary VMCS. */
async function takeTurns(context: SelftestContext, c: number, plain: number) {
  await using machine = await bootL1(context, { evmcs: true });
  const { vm, l1 } = machine;
  const runsBefore = nestedRuns(l1);
  const seed = (index: number, turn: number) => BigInt(index * 1000 + turn + 1);
  const l2s: L2[] = [];
  let vmcalls = 0;
  for (let round = 0; round < ROUNDS; round++) {
    for (let index = 0; index < c; index++) {
      const evmcs = plain === 0 || index % plain !== 0;
      l2s[index] ??= await l1.createL2({ evmcs, vpid: index + 1, msrBitmap: true }, (program) => {
        for (let turn = 0; turn < 2 * ROUNDS; turn++) program.vmcallRegs(seed(index, turn));
      });
      for (let part = 0; part < 2; part++) {
        const stop = await l2s[index]!.enter({ signal: context.signal });
        if (stop.kind === 'exit' && stop.exit.reason === 'vmcall') vmcalls += 1;
      }
    }
  }
  const expected = (index: number) =>
    foldChecksum(
      Array.from({ length: 2 * ROUNDS - 1 }, (_, turn) => vmcallRegsValues(seed(index, turn))).flat(),
    );
  const stats = vm.stats();
  const counter = (name: string) => (stats.has(name) ? stat(stats, name) : null);
  return {
    observed: {
      nestedRun: nestedRuns(l1) - runsBefore,
      vmcalls,
      operations: l2s.reduce((sum, l2) => sum + l2.progress.executed, 0),
      rightChecksums: l2s.filter((l2, index) => l2.progress.checksum === expected(index)).length,
    },
    evidence: {
      contextReuse: counter(series().contextStats.reuse),
      contextRecycle: counter(series().contextStats.recycle),
    },
  };
}

function turnsTest(id: string, title: string, c: number, plain: number): Selftest {
  return selftest({
    id,
    title,
    requires: [nestedVmx, enlightenedVmcs, binaryStats],
    expectations: {
      any: {
        nestedRun: 2 * c * ROUNDS,
        vmcalls: 2 * c * ROUNDS,
        operations: c * (2 * ROUNDS - 1),
        rightChecksums: c,
      },
    },
    body: (context) => takeTurns(context, c, plain),
  });
}

export const evmcs: readonly Selftest[] = [
  ...[...POINTER_CASES, ...flushes].map((one) => scenarioTest({ ...one, evmcs: true })),
  ...cleanFields,
  ...evmcsSmm,
  ...evmcsCpuid,
  ...[2, 8, 16].map((c) => turnsTest(`evmcs/switch/c=${c}`, `${c} L2s with eVMCSs take turns`, c, 0)),
  turnsTest('evmcs/switch/mixed', 'three L2s take turns, one of them with an ordinary VMCS', 3, 3),
];
