// SPDX-License-Identifier: Apache-2.0
// What may still be cached after a mapping changed, and what must not be (SDM vol. 3, 29.4).
import { Batch, INVEPT, INVVPID, type L2Options } from '../../guest/index.ts';
import type { Selftest } from '../engine/model.ts';
import { type Bench, type ScenarioCase, scenarioTest } from './scenario.ts';

const OLD = 0xaa;
const NEW = 0xbb;
const VPID = 5;
const OTHER_VPID = 6;
/** mov rax, cr3; mov cr3, rax; mov rax, [rdi] */
const RELOAD_CR3 = [0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0x48, 0x8b, 0x07];
/** invlpg [rdi]; mov rax, [rdi] */
const INVALIDATE = [0x0f, 0x01, 0x3f, 0x48, 0x8b, 0x07];
/** mov cr3, rsi; mov rax, [rdi] */
const LOAD_CR3 = [0x0f, 0x22, 0xde, 0x48, 0x8b, 0x07];

function twoPages(bench: Bench): void {
  bench.view('page').setBigUint64(0, BigInt(OLD), true);
  bench.view('other').setBigUint64(0, BigInt(NEW), true);
  bench.l1.ept.split(bench.page('page'));
  bench.l2.options.pageTables?.split(bench.page('page'));
}

/** Where the change is made: in L1's EPT, or in L2's page tables. */
type Where = 'ept' | 'tables';

/** L1 changes the mapping of the page. */
function change(bench: Bench, where: Where, cpu = bench.cpu): Promise<void> {
  const tree = where === 'ept' ? bench.l1.ept : bench.l2.options.pageTables;
  if (!tree) throw new Error('no page tables of its own');
  return bench.byL1(tree, bench.page('page'), () => tree.map(bench.page('page'), bench.page('other')), cpu);
}

interface StaleRow {
  readonly name: string;
  readonly title: string;
  readonly where: Where;
  readonly options?: Partial<L2Options>;
  /** What L1 does after the change; with nothing, VM entry alone must do. */
  readonly flush?: (bench: Bench) => Promise<unknown>;
}

/** L2 reads the page, exits; L1 changes the mapping and flushes; L2 must read the other page. */
const FRESH: readonly StaleRow[] = [
  {
    name: 'invept/single-context',
    title: 'INVEPT of this EPT',
    where: 'ept',
    flush: ({ cpu, l1 }) => cpu.invept(INVEPT.singleContext, l1.ept.pointer),
  },
  {
    name: 'invept/all-contexts',
    title: 'INVEPT of every EPT',
    where: 'ept',
    flush: ({ cpu }) => cpu.invept(INVEPT.allContexts, 0n),
  },
  {
    name: 'invept/with-vpid',
    title: 'INVEPT, also of combined mappings with a VPID',
    where: 'ept',
    options: { vpid: VPID },
    flush: ({ cpu, l1 }) => cpu.invept(INVEPT.singleContext, l1.ept.pointer),
  },
  {
    name: 'invvpid/individual-address',
    title: 'INVVPID of the address',
    where: 'tables',
    options: { vpid: VPID },
    flush: (bench) => bench.cpu.invvpid(INVVPID.individualAddress, VPID, BigInt(bench.page('page'))),
  },
  {
    name: 'invvpid/single-context',
    title: 'INVVPID of the VPID',
    where: 'tables',
    options: { vpid: VPID },
    flush: ({ cpu }) => cpu.invvpid(INVVPID.singleContext, VPID),
  },
  {
    name: 'invvpid/all-contexts',
    title: 'INVVPID of every VPID',
    where: 'tables',
    options: { vpid: VPID },
    flush: ({ cpu }) => cpu.invvpid(INVVPID.allContexts, 0),
  },
  {
    name: 'invvpid/retaining-globals',
    title: 'INVVPID that retains globals, of which this page is none',
    where: 'tables',
    options: { vpid: VPID },
    flush: ({ cpu }) => cpu.invvpid(INVVPID.singleContextRetainingGlobals, VPID),
  },
  {
    name: 'vpid/changed',
    title: 'another VPID, which has nothing cached',
    where: 'tables',
    options: { vpid: VPID },
    flush: ({ l2 }) => l2.vmwrite('VIRTUAL_PROCESSOR_ID', OTHER_VPID),
  },
  { name: 'vpid/none', title: 'VM entry without VPIDs', where: 'tables' },
  {
    name: 'ept-off/entry',
    title: 'VM entry without VPIDs and EPT',
    where: 'tables',
    options: { ept: false },
  },
  {
    name: 'ept-off/invvpid',
    title: 'INVVPID of the VPID, without EPT',
    where: 'tables',
    options: { ept: false, vpid: VPID },
    flush: ({ cpu }) => cpu.invvpid(INVVPID.singleContext, VPID),
  },
];

const FRESH_CASES: readonly ScenarioCase[] = FRESH.map((row) => ({
  id: `translation/fresh/${row.name}`,
  title: `after ${row.title} L2 reads through the new mapping`,
  needs: ['primary.hlt-exiting'],
  options: ({ l1 }) => ({
    ...(row.where === 'tables' ? { pageTables: l1.createPageTables() } : {}),
    ...row.options,
  }),
  program: (p, bench) => p.read64(bench.page('page')).hlt().read64(bench.page('page')),
  before: twoPages,
  trace: (bench) => ({
    onExit: async () => {
      await change(bench, row.where);
      await row.flush?.(bench);
    },
  }),
  expect: { exits: ['hlt len=1', 'vmcall'], executed: 3, values: [OLD, NEW] },
}));

/** L2 does it itself, after the host changed its tables while it was active. */
const SELF_CASES: readonly ScenarioCase[] = [
  ...(
    [
      ['reload-cr3', 'reloads CR3', RELOAD_CR3],
      ['invlpg', 'executes INVLPG', INVALIDATE],
    ] as const
  ).flatMap(([name, what, code]) =>
    [true, false].map(
      (hasEpt): ScenarioCase => ({
        id: `translation/fresh/${name}/ept=${hasEpt ? 1 : 0}`,
        title: `after its page tables changed while it was active, L2 ${what} and reads through the new mapping`,
        vcpus: 2,
        options: ({ l1 }) => ({
          pageTables: l1.createPageTables(),
          vpid: VPID,
          ...(hasEpt ? {} : { ept: false as const }),
        }),
        program: (p, bench) =>
          p
            .read64(bench.page('page'))
            .sync(1)
            .call(bench.code(...code), bench.page('page')),
        before: twoPages,
        trace: (bench) => ({ onSync: () => change(bench, 'tables', bench.l1.cpu(1)) }),
        expect: { exits: ['sync 1', 'vmcall'], executed: 3, values: [OLD, NEW] },
      }),
    ),
  ),
  {
    id: 'translation/cr3',
    title: 'L2 changes to other page tables and back: each time it reads through the tables in use',
    options: ({ l1 }) => ({ pageTables: l1.createPageTables(), vpid: VPID }),
    program: (p, bench) => {
      const tables = bench.l1.createPageTables();
      tables.map(bench.page('page'), bench.page('other'));
      const first = bench.l1.pageTables.root;
      const code = bench.code(...LOAD_CR3);
      p.read64(bench.page('page'))
        .call(code, bench.page('page'), tables.root)
        .call(code, bench.page('page'), first);
    },
    before: twoPages,
    after: async (bench) => ({
      cr3: Number(await bench.l2.vmread('GUEST_CR3')) === bench.l1.pageTables.root,
    }),
    expect: { exits: ['vmcall'], executed: 3, values: [OLD, NEW, OLD], more: { cr3: true } },
  },
  {
    id: 'translation/stale/ept',
    // SDM 29.4.3.1: without INVEPT either may be used; KVM drops what it write-protects and may keep the rest
    vcpus: 2,
    title: 'the EPT changed while L2 was active: L2 may read either page, and only the new one after INVEPT',
    needs: ['primary.hlt-exiting'],
    program: (p, bench) =>
      p.read64(bench.page('page')).sync(1).read64(bench.page('page')).hlt().read64(bench.page('page')),
    before: twoPages,
    trace: (bench) => ({
      onSync: () => change(bench, 'ept', bench.l1.cpu(1)),
      onExit: async () => {
        bench.results['between'] = Number(bench.l2.progress.last);
        await bench.cpu.invept(INVEPT.singleContext, bench.l1.ept.pointer);
      },
    }),
    after: (bench) => ({ ...bench.results, last: Number(bench.l2.progress.last) }),
    expect: {
      exits: ['sync 1', 'hlt len=1', 'vmcall'],
      executed: 5,
      more: { between: { oneOf: [OLD, NEW] }, last: NEW },
    },
  },
  {
    id: 'translation/fresh/write-protect',
    title: 'a page that L1 write-protects and invalidates: the next write exits and does not land',
    needs: ['primary.hlt-exiting'],
    before: (bench) => bench.l1.ept.split(bench.page('page')),
    program: (p, bench) => p.write64(bench.page('page'), 1).hlt().write64(bench.page('page'), 2),
    trace: (bench) => ({
      onExit: async (exit) => {
        const { ept } = bench.l1;
        const page = bench.page('page');
        if (exit.reason !== 'hlt') bench.results['atExit'] = bench.view('page').getUint32(0, true);
        await bench.byL1(ept, page, () => {
          if (exit.reason === 'hlt') ept.protect(page, { write: false });
          else ept.map(page);
        });
        await bench.cpu.invept(INVEPT.singleContext, bench.l1.ept.pointer);
      },
    }),
    after: (bench) => ({ ...bench.results, end: bench.view('page').getUint32(0, true) }),
    expect: {
      exits: ['hlt len=1', 'ept-violation q=0x1aa gpa=page+0x0', 'vmcall'],
      executed: 3,
      more: { atExit: 1, end: 2 },
    },
  },
];

const REFUSALS: readonly { name: string; add: (batch: Batch, pointer: bigint) => Batch }[] = [
  { name: 'INVEPT type 0', add: (batch, pointer) => batch.invept(0, pointer) },
  { name: 'INVEPT type 3', add: (batch, pointer) => batch.invept(3, pointer) },
  { name: 'INVEPT of a bad EPTP', add: (batch, pointer) => batch.invept(1, pointer | 0x5n) },
  { name: 'INVVPID type 4', add: (batch) => batch.invvpid(4, VPID) },
  { name: 'INVVPID of VPID 0', add: (batch) => batch.invvpid(INVVPID.singleContext, 0) },
  {
    name: 'INVVPID of an address and VPID 0',
    add: (batch) => batch.invvpid(INVVPID.individualAddress, 0, 0x1000n),
  },
  {
    name: 'INVVPID of an address that is not canonical',
    add: (batch) => batch.invvpid(INVVPID.individualAddress, VPID, 0x8000_0000_0000_0000n),
  },
];

const REFUSAL_CASE: ScenarioCase = {
  id: 'translation/refused',
  title: 'INVEPT and INVVPID with bad operands: VMfail 28, and L2 runs all the same',
  options: () => ({ vpid: VPID }),
  program: (p) => p.fold(7),
  before: async (bench) => {
    for (const { name, add } of REFUSALS) {
      const [result] = await bench.cpu.execute(add(new Batch(), bench.l1.ept.pointer));
      bench.results[name] = `${result?.status} ${result?.values[0]}`;
    }
  },
  after: (bench) => bench.results,
  expect: {
    exits: ['vmcall'],
    executed: 1,
    values: [7],
    more: Object.fromEntries(REFUSALS.map(({ name }) => [name, 'vmfail-valid 28'])),
  },
};

export const staleTranslation: readonly Selftest[] = [...FRESH_CASES, ...SELF_CASES, REFUSAL_CASE].map(
  scenarioTest,
);
