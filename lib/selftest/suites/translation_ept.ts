// SPDX-License-Identifier: Apache-2.0
// EPT: permissions, misconfigurations, flags, page sizes, and L2 without it (SDM vol. 3, 29.3).
import { type EptPermissions, INVEPT } from '../../guest/index.ts';
import type { Observed, Selftest } from '../engine/model.ts';
import { type Bench, type ScenarioCase, scenarioTest } from './scenario.ts';

const GIB = 0x4000_0000;
const MARK = 0x5a;
/** mov eax, 0x5a; ret */
const MARK_CODE = [0xb8, MARK, 0, 0, 0, 0xc3];
/** Exit qualification: what was wanted in 2:0, what is allowed in 5:3, a linear address that was translated. */
const WANTED = { read: 1, write: 2, fetch: 4 } as const;
const TRANSLATED = 0x180;

const PERMISSIONS: readonly { name: string; bits: number; allowed: EptPermissions }[] = [
  { name: 'none', bits: 0, allowed: { read: false, write: false, execute: false } },
  { name: 'r', bits: 1, allowed: { write: false, execute: false } },
  { name: 'rw', bits: 3, allowed: { execute: false } },
  { name: 'x', bits: 4, allowed: { read: false, write: false } },
  { name: 'rx', bits: 5, allowed: { write: false } },
  { name: 'rwx', bits: 7, allowed: {} },
];

async function mapAll(bench: Bench, gpa: number): Promise<void> {
  const page = gpa - (gpa % 4096);
  await bench.byL1(bench.l1.ept, page, () => bench.l1.ept.map(page));
  await bench.cpu.invept(INVEPT.singleContext, bench.l1.ept.pointer);
}

const PERMISSION_CASES: readonly ScenarioCase[] = (['read', 'write', 'fetch'] as const).map((access) => ({
  id: `translation/permissions/${access}`,
  title: `a ${access} of pages with each permission: exactly the forbidden ones exit, and say what is allowed`,
  program: (p, bench) => {
    for (const { name } of PERMISSIONS) {
      const page = bench.page(name);
      if (access === 'read') p.read64(page + 8);
      else if (access === 'write') p.write64(page + 8, MARK);
      else p.call(page);
    }
  },
  before: (bench) => {
    for (const { name, allowed } of PERMISSIONS) {
      bench.l1.bytes(bench.page(name), 4096).set(MARK_CODE);
      bench.view(name).setBigUint64(8, BigInt(MARK), true);
      bench.l1.ept.protect(bench.page(name), allowed);
    }
  },
  trace: (bench) => ({ onExit: (exit) => mapAll(bench, exit.guestPhysicalAddress) }),
  expect: {
    exits: [
      ...PERMISSIONS.filter(({ bits }) => (bits & WANTED[access]) === 0).map(({ name, bits }) => {
        const qualification = WANTED[access] | (bits << 3) | TRANSLATED;
        return `ept-violation q=0x${qualification.toString(16)} gpa=${name}+${access === 'fetch' ? '0x0' : '0x8'}`;
      }),
      'vmcall',
    ],
    executed: PERMISSIONS.length,
    values: access === 'write' ? [] : PERMISSIONS.map(() => MARK),
  },
}));

const EXIT_CASES: readonly ScenarioCase[] = [
  {
    id: 'translation/violation/crossing',
    title:
      'a write across a page boundary into a page that is not mapped exits for that page and writes nothing',
    program: (p, bench) => {
      const [first] = [bench.page('first'), bench.page('second')];
      p.write64(first + 0xffc, 0x1111_1111_2222_2222n).read64(first + 0xffc);
    },
    before: (bench) => {
      if (bench.page('second') !== bench.page('first') + 4096) throw new Error('the pages are not adjacent');
      bench.l1.ept.unmap(bench.page('second'));
    },
    trace: (bench) => ({
      onExit: async (exit) => {
        bench.results['atExit'] = bench.view('first').getUint32(0xffc, true);
        await mapAll(bench, exit.guestPhysicalAddress);
      },
    }),
    after: (bench) => bench.results,
    expect: {
      exits: ['ept-violation q=0x182 gpa=second+0x0', 'vmcall'],
      executed: 2,
      values: [0x1111_1111_2222_2222n],
      more: { atExit: 0 },
    },
  },
  {
    id: 'translation/violation/page-table',
    title: "a page of L2's page tables that the EPT lacks: the exit says that the address was not translated",
    options: ({ l1 }) => ({ pageTables: l1.createPageTables() }),
    program: (p) => p.read64(GIB + 8),
    before: (bench) => {
      bench.vm.memory.add({ gpa: GIB, size: 4096 });
      const table = bench.l2.options.pageTables?.entry(GIB).at ?? 0;
      bench.names['table'] = table - (table % 4096);
      bench.l1.ept.unmap(bench.page('table'));
    },
    trace: (bench) => ({
      onExit: async (exit) => {
        bench.results['linear'] = exit.guestLinearAddress.toString(16);
        await mapAll(bench, exit.guestPhysicalAddress);
      },
    }),
    after: (bench) => bench.results,
    expect: {
      exits: ['ept-violation q=0x81 gpa=table+0x0', 'vmcall'],
      executed: 1,
      values: [0],
      more: { linear: (GIB + 8).toString(16) },
    },
  },
  {
    id: 'translation/violation/no-invept',
    title: 'a page that L1 maps at the violation is there at once: no INVEPT is needed',
    program: (p, bench) => p.write64(bench.page('page') + 8, MARK).read64(bench.page('page') + 8),
    before: (bench) => bench.l1.ept.unmap(bench.page('page')),
    trace: (bench) => ({
      onExit: () => bench.byL1(bench.l1.ept, bench.page('page'), () => bench.l1.ept.map(bench.page('page'))),
    }),
    expect: { exits: ['ept-violation q=0x182 gpa=page+0x8', 'vmcall'], executed: 2, values: [MARK] },
  },
  {
    id: 'translation/misconfiguration',
    title: 'write without read, a reserved memory type and a reserved bit: exit 49 with the address',
    program: (p, bench) =>
      p
        .read64(bench.page('write-only') + 8)
        .read64(bench.page('memory-type') + 8)
        .read64(bench.page('reserved-bit') + 8),
    before: (bench) => {
      for (const how of ['write-only', 'memory-type', 'reserved-bit'] as const) {
        bench.view(how).setBigUint64(8, BigInt(MARK), true);
        bench.l1.ept.misconfigure(bench.page(how), how);
      }
    },
    trace: (bench) => ({ onExit: (exit) => mapAll(bench, exit.guestPhysicalAddress) }),
    expect: {
      exits: [
        'ept-misconfiguration gpa=write-only+0x8',
        'ept-misconfiguration gpa=memory-type+0x8',
        'ept-misconfiguration gpa=reserved-bit+0x8',
        'vmcall',
      ],
      executed: 3,
      values: [MARK, MARK, MARK],
    },
  },
  {
    id: 'translation/misconfiguration/2M',
    title: 'a 2 MiB page whose address is not a multiple of its size',
    program: (p) => p.read64(GIB + 8),
    before: (bench) => {
      bench.vm.memory.add({ gpa: GIB, size: 4096 });
      bench.names['large'] = GIB;
      bench.l1.ept.setEntry(GIB, '2M', BigInt(GIB) | 0x1000n | 0xb7n);
    },
    trace: (bench) => ({
      onExit: async () => {
        bench.l1.ept.map(GIB, { size: '2M' });
        await bench.cpu.invept(INVEPT.singleContext, bench.l1.ept.pointer);
      },
    }),
    expect: { exits: ['ept-misconfiguration gpa=large+0x8', 'vmcall'], executed: 1, values: [0] },
  },
  {
    id: 'translation/mmio',
    title: 'an address that the EPT maps and no memslot has reaches userspace',
    program: (p) => p.fold(7).write32(GIB, 1),
    expect: { exits: ['userspace mmio'], executed: 1, values: [7] },
  },
];

const flagsOf = (bench: Bench, name: string): string => {
  const { accessed, dirty } = bench.l1.ept.flags(bench.page(name));
  return `${accessed ? 'A' : '-'}${dirty ? 'D' : '-'}`;
};
const PAGES = ['read', 'written', 'executed', 'untouched'] as const;

const FLAG_CASES: readonly ScenarioCase[] = [true, false].map((isOn) => ({
  id: `translation/accessed-dirty/${isOn ? 'on' : 'off'}`,
  title: isOn
    ? 'reads and fetches set A, writes A and D; what L1 cleared is set again after INVEPT'
    : 'without the EPTP bit nobody touches the flags',
  program: (p, bench) => {
    for (let round = 0; round < 2; round++) {
      p.read64(bench.page('read')).write64(bench.page('written'), 1).call(bench.page('executed')).hlt();
    }
  },
  needs: ['primary.hlt-exiting'],
  before: async (bench) => {
    bench.l1.bytes(bench.page('executed'), 4096).set(MARK_CODE);
    for (const name of PAGES) bench.l1.ept.split(bench.page(name));
    for (const name of PAGES) bench.l1.ept.clearFlags(bench.page(name));
    if (isOn) await bench.l2.vmwrite('EPT_POINTER', bench.l1.ept.pointer | 0x40n);
  },
  trace: (bench) => ({
    onExit: async (exit, index) => {
      if (exit.reason !== 'hlt') return;
      bench.results[`round${index}`] = PAGES.map((name) => flagsOf(bench, name));
      for (const name of PAGES) {
        const page = bench.page(name);
        await bench.byL1(bench.l1.ept, page, () => bench.l1.ept.clearFlags(page));
      }
      await bench.cpu.invept(INVEPT.allContexts, 0n);
    },
  }),
  after: (bench): Record<string, Observed> => bench.results,
  expect: {
    exits: ['hlt len=1', 'hlt len=1', 'vmcall'],
    executed: 8,
    values: [0, MARK, 0, MARK],
    more: Object.fromEntries(
      [0, 1].map((round) => [`round${round}`, isOn ? ['A-', 'AD', 'A-', '--'] : ['--', '--', '--', '--']]),
    ),
  },
}));

const TARGET = 0x8000_0000;
const SIZE_CASES: readonly ScenarioCase[] = (['4K', '2M', '1G'] as const).map((size) => ({
  id: `translation/page-size/${size}`,
  title: `an EPT page of ${size} leads to another address: reads and writes arrive there, at the same offset`,
  program: (p) => p.write64(GIB + 0x18, 0x1234).read64(GIB + 0x20),
  before: (bench) => {
    const region = bench.vm.memory.add({ gpa: TARGET, size: 0x20_0000 });
    bench.vm.memory.add({ gpa: GIB, size: 0x20_0000 });
    new DataView(region.buffer).setBigUint64(0x20, 0x5678n, true);
    bench.l1.ept.map(GIB, { to: TARGET, size });
  },
  after: ({ vm }) => {
    const word = (gpa: number) => Number(new DataView(vm.memory.read(gpa, 8).buffer).getBigUint64(0, true));
    return { there: word(TARGET + 0x18), here: word(GIB + 0x18) };
  },
  expect: { exits: ['vmcall'], executed: 2, values: [0x5678], more: { there: 0x1234, here: 0 } },
}));

const SHADOW_CASES: readonly ScenarioCase[] = [
  ...(['4K', '2M', '1G'] as const).map(
    (size): ScenarioCase => ({
      id: `translation/ept-off/page-size/${size}`,
      title: `without EPT, page tables of L2 with pages of ${size}: KVM shadows them`,
      options: ({ l1 }) => {
        const pageTables = l1.createPageTables();
        pageTables.map(GIB, { to: TARGET, size });
        return { ept: false, pageTables };
      },
      program: (p) => p.write64(GIB + 0x18, 0x1234).read64(GIB + 0x18),
      before: (bench) => bench.vm.memory.add({ gpa: TARGET, size: 0x20_0000 }),
      after: ({ vm }) => ({
        there: Number(new DataView(vm.memory.read(TARGET + 0x18, 8).buffer).getBigUint64(0, true)),
      }),
      expect: { exits: ['vmcall'], executed: 2, values: [0x1234], more: { there: 0x1234 } },
    }),
  ),
  ...(
    [
      ['read', 'L2 exception 14 code=0x0', 0],
      ['write', 'L2 exception 14 code=0x2', 0],
      ['read', 'exception-or-nmi info=0x80000b0e code=0x0 q=page+0x8', 1 << 14],
      ['write', 'exception-or-nmi info=0x80000b0e code=0x2 q=page+0x8', 1 << 14],
    ] as const
  ).map(
    ([access, exit, exceptionBitmap]): ScenarioCase => ({
      id: `translation/ept-off/page-fault/${access}/${exceptionBitmap === 0 ? 'L2' : 'L1'}`,
      title: `without EPT, a ${access} of a page that L2's tables lack is #PF for ${exceptionBitmap === 0 ? 'L2' : 'L1'}`,
      options: ({ l1 }) => ({ ept: false, pageTables: l1.createPageTables(), exceptionBitmap }),
      program: (p, bench) =>
        access === 'read'
          ? p.fold(7).read64(bench.page('page') + 8)
          : p.fold(7).write64(bench.page('page') + 8, 1),
      before: (bench) => bench.l2.options.pageTables?.unmap(bench.page('page')),
      expect: { exits: [exit], executed: 1, values: [7] },
    }),
  ),
];

export const eptTranslation: readonly Selftest[] = [
  ...PERMISSION_CASES,
  ...EXIT_CASES,
  ...FLAG_CASES,
  ...SIZE_CASES,
  ...SHADOW_CASES,
].map(scenarioTest);
