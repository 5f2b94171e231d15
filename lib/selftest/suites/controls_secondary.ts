// SPDX-License-Identifier: Apache-2.0
// Secondary processor-based controls, SDM vol. 3, 25.6.2. Those that only make an instruction exit are rows of
// controls_primary.ts.
import type { L2Program } from '../../guest/index.ts';
import type { Selftest } from '../engine/model.ts';
import { type Bench, type ControlCase, controlTest, MARK, MARKED } from './scenario.ts';

const UD = 1 << 6;
const UD_EXIT = 'exception-or-nmi info=0x80000306';
const TSC_AUX = 0xc000_0103;
const TSC = 0x10;
const X2APIC_TPR = 0x808;
const VECTOR = 0x51;
const NOTIFICATION = 0xe2;
const GUEST_RSP = 0x681c;
const NO_LINK = 0xffff_ffff_ffff_ffffn;
const SHADOW = 0x8000_0000;
const EPTP_ACCESSED_DIRTY = 1n << 6n;
const PML_ENTRIES = 512;
/** PAE, VMXE and OSXSAVE. */
const CR4_XSAVE = 0x4_2020;
const VM_FUNCTION_EPTP_SWITCHING = 1n;

/** Real mode: CR0 with NE alone, segments as a reset leaves them, but based where the code is. */
export function realMode(code: number): Record<string, bigint | number> {
  const fields: Record<string, bigint | number> = {
    GUEST_CR0: 0x20,
    GUEST_CR4: 0x2000,
    GUEST_IA32_EFER: 0,
    GUEST_RIP: 0,
    GUEST_RSP: 0,
    GUEST_CS_SELECTOR: 0,
    GUEST_CS_BASE: code,
    GUEST_CS_AR_BYTES: 0x9b,
    GUEST_CS_LIMIT: 0xffff,
    GUEST_TR_AR_BYTES: 0x8b,
  };
  for (const segment of ['ES', 'SS', 'DS', 'FS', 'GS']) {
    fields[`GUEST_${segment}_SELECTOR`] = 0;
    fields[`GUEST_${segment}_BASE`] = 0;
    fields[`GUEST_${segment}_LIMIT`] = 0xffff;
    fields[`GUEST_${segment}_AR_BYTES`] = 0x93;
  }
  return fields;
}

/** Two pages with different words, the first of which L2 reads. */
function twoPages(bench: Bench): void {
  bench.view('a').setBigUint64(0, 0xaan, true);
  bench.view('b').setBigUint64(0, 0xbbn, true);
}

/** How often the page log names a page. */
function logged(bench: Bench, page: number): number {
  const log = bench.view('log');
  let count = 0;
  for (let i = 0; i < PML_ENTRIES; i++) if (log.getBigUint64(i * 8, true) === BigInt(page)) count += 1;
  return count;
}

/** A shadow VMCS behind the link pointer. */
const SHADOWING = {
  options: (bench: Bench) => ({
    fields: { VMREAD_BITMAP: bench.page('vmread'), VMWRITE_BITMAP: bench.page('vmwrite') },
  }),
  // Memory operands: with registers Bochs 3.0 leaves an old displacement in the qualification (SDM: 0).
  // vmwrite rdi, [rsi]; mov qword [rsi], 0x11; vmread [rsi], rdi; mov rax, [rsi]
  program: (p: L2Program, bench: Bench) =>
    p.call(
      bench.code(0x0f, 0x79, 0x3e, 0x48, 0xc7, 0x06, 0x11, 0, 0, 0, 0x0f, 0x78, 0x3e, 0x48, 0x8b, 0x06),
      GUEST_RSP,
      bench.page('operand'),
    ),
  before: async (bench: Bench) => {
    const { revision } = await bench.l1.controls();
    bench.view('operand').setUint32(0, 0x1234, true);
    bench.view('shadow').setUint32(0, (revision | SHADOW) >>> 0, true);
    await bench.cpu.vmclear(bench.page('shadow'));
    await bench.l2.vmwrite('VMCS_LINK_POINTER', bench.isSet ? bench.page('shadow') : NO_LINK);
  },
};

const CASES: readonly ControlCase[] = [
  {
    control: 'secondary.virtualize-apic-accesses',
    title: 'a write to the APIC-access page exits with its offset; when clear, it lands in the page',
    options: (bench) => ({ apicAccess: bench.page('apic') }),
    program: (p, bench) => p.write32(bench.page('apic') + 0x80, 0x55),
    after: (bench) => ({ word: bench.view('apic').getUint32(0x80, true) }),
    set: { exits: ['apic-access q=0x1080', 'vmcall'], executed: 1, more: { word: 0 } },
    clear: { exits: ['vmcall'], executed: 1, more: { word: 0x55 } },
  },
  {
    control: 'secondary.enable-ept',
    title: 'a page that the EPT maps to another one',
    program: (p, bench) => p.read64(bench.page('a')),
    before: (bench) => {
      twoPages(bench);
      bench.l1.ept.map(bench.page('a'), bench.page('b'));
    },
    set: { exits: ['vmcall'], executed: 1, values: [0xbb] },
    clear: { exits: ['vmcall'], executed: 1, values: [0xaa] },
  },
  {
    control: 'secondary.enable-rdtscp',
    title: 'RDTSCP reads TSC_AUX; when clear it is #UD',
    options: () => ({ exceptionBitmap: UD }),
    program: (p, bench) => p.call(bench.code(0x0f, 0x01, 0xf9, 0x89, 0xc8)), // rdtscp; mov eax, ecx
    before: ({ cpu }) => cpu.wrmsr(TSC_AUX, 0x77n),
    set: { exits: ['vmcall'], executed: 1, values: [0x77] },
    clear: { exits: [UD_EXIT], executed: 0, values: [] },
  },
  {
    control: 'secondary.enable-rdtscp',
    variant: 'rdtsc-exiting',
    title: 'RDTSC exiting makes RDTSCP exit; #UD comes first when it is not enabled',
    needs: ['primary.rdtsc-exiting'],
    options: () => ({ exceptionBitmap: UD }),
    program: (p, bench) => p.call(bench.code(0x0f, 0x01, 0xf9, ...MARK)),
    set: { exits: ['rdtscp len=3', 'vmcall'], executed: 1, values: MARKED },
    clear: { exits: [UD_EXIT], executed: 0, values: [] },
  },
  {
    control: 'secondary.virtualize-x2apic-mode',
    title: "RDMSR of the x2APIC TPR reads VTPR when set, L1's TPR when clear",
    needs: ['primary.use-tpr-shadow', 'primary.use-msr-bitmaps'],
    options: () => ({ virtualApic: true, msrBitmap: true }),
    program: (p) => p.rdmsr(X2APIC_TPR),
    before: async ({ cpu, l1, l2 }) => {
      await cpu.x2apicEnable();
      await cpu.wrmsr(X2APIC_TPR, 0x30n);
      new DataView(l1.memory.buffer).setUint32((l2.virtualApic ?? 0) + 0x80, 0x50, true);
    },
    set: { exits: ['vmcall'], executed: 1, values: [0x50] },
    clear: { exits: ['vmcall'], executed: 1, values: [0x30] },
  },
  {
    control: 'secondary.enable-vpid',
    title: 'VPID 0 is a bad control field when VPIDs are on, and nobody looks at it when they are off',
    options: () => ({ fields: { VIRTUAL_PROCESSOR_ID: 0 } }),
    program: (p) => p.fold(7),
    set: { exits: ['VMLAUNCH VMfailValid 7'], executed: 0, values: [] },
    clear: { exits: ['vmcall'], executed: 1, values: [7] },
  },
  {
    control: 'secondary.unrestricted-guest',
    title: 'real mode: L2 runs 16-bit code; when clear, CR0 without PE and PG is invalid guest state',
    options: (bench) => {
      const code = bench.raw('code', 0xb8, 0x34, 0x12, 0x40, 0x0f, 0x01, 0xc1); // mov ax, 0x1234; inc ax; vmcall
      return { fields: realMode(code) };
    },
    before: async (bench) => {
      await bench.write('entry.ia-32e-mode-guest', false);
    },
    after: (_, last) => ({ ax: last?.entryFailure ? 0 : Number((last?.registers.rax ?? 0n) & 0xffffn) }),
    set: { exits: ['vmcall'], more: { ax: 0x1235 } },
    clear: { exits: ['invalid-guest-state at-entry'], more: { ax: 0 } },
  },
  {
    control: 'secondary.apic-register-virtualization',
    title: 'a read of the APIC id comes from the virtual-APIC page; when clear it is an APIC access',
    needs: ['secondary.virtualize-apic-accesses', 'primary.use-tpr-shadow'],
    options: (bench) => ({ apicAccess: bench.page('apic'), virtualApic: bench.page('vapic') }),
    // mov eax, 0x11; mov eax, [rdi]
    program: (p, bench) => p.call(bench.code(0xb8, 0x11, 0, 0, 0, 0x8b, 0x07), bench.page('apic') + 0x20),
    before: (bench) => bench.view('vapic').setUint32(0x20, 0x700_0000, true),
    set: { exits: ['vmcall'], executed: 1, values: [0x700_0000] },
    clear: { exits: ['apic-access q=0x20', 'vmcall'], executed: 1, values: [0x11] },
  },
  {
    control: 'secondary.virtual-interrupt-delivery',
    title: 'a requested virtual interrupt is delivered at entry and moves from RVI to SVI',
    needs: ['pin.external-interrupt-exiting', 'primary.use-tpr-shadow'],
    options: (bench) => ({ virtualApic: bench.page('vapic'), fields: { GUEST_INTR_STATUS: VECTOR } }),
    program: (p) => p.fold(7),
    before: (bench) => bench.view('vapic').setUint32(0x200 + (VECTOR >> 5) * 16, 1 << (VECTOR & 31), true),
    after: async (bench) => ({
      irqs: bench.l2.control.u32('irq_counts', VECTOR),
      status: Number(await bench.l2.vmread('GUEST_INTR_STATUS')),
      requested: bench.view('vapic').getUint32(0x200 + (VECTOR >> 5) * 16, true),
      inService: bench.view('vapic').getUint32(0x100 + (VECTOR >> 5) * 16, true),
    }),
    set: {
      exits: ['vmcall'],
      executed: 1,
      values: [7],
      more: { irqs: 1, status: VECTOR << 8, requested: 0, inService: 1 << (VECTOR & 31) },
    },
    clear: {
      exits: ['vmcall'],
      executed: 1,
      values: [7],
      more: { irqs: 0, status: VECTOR, requested: 1 << (VECTOR & 31), inService: 0 },
    },
  },
  {
    control: 'secondary.enable-invpcid',
    title: 'INVPCID completes; when clear it is #UD',
    options: () => ({ exceptionBitmap: UD }),
    // mov eax, 2 (all contexts); invpcid rax, [rdi]
    program: (p, bench) =>
      p.call(bench.code(0xb8, 2, 0, 0, 0, 0x66, 0x0f, 0x38, 0x82, 0x07, ...MARK), bench.page('descriptor')),
    set: { exits: ['vmcall'], executed: 1, values: MARKED },
    clear: { exits: [UD_EXIT], executed: 0, values: [] },
  },
  {
    control: 'secondary.enable-invpcid',
    variant: 'invlpg-exiting',
    title: 'INVLPG exiting makes INVPCID exit; #UD comes first when it is not enabled',
    needs: ['primary.invlpg-exiting'],
    options: () => ({ exceptionBitmap: UD }),
    program: (p, bench) =>
      p.call(bench.code(0xb8, 2, 0, 0, 0, 0x66, 0x0f, 0x38, 0x82, 0x07, ...MARK), bench.page('descriptor')),
    set: { exits: ['invpcid len=5', 'vmcall'], executed: 1, values: MARKED },
    clear: { exits: [UD_EXIT], executed: 0, values: [] },
  },
  {
    control: 'secondary.enable-vm-functions',
    title: 'VMFUNC 0 switches to another EPT without an exit, and exits for an entry that is none',
    options: (bench) => ({
      exceptionBitmap: UD,
      fields: { VM_FUNCTION_CONTROL: VM_FUNCTION_EPTP_SWITCHING, EPTP_LIST_ADDRESS: bench.page('list') },
    }),
    // xor eax, eax; mov ecx, esi; vmfunc; mov rax, [rdi]
    program: (p, bench) => {
      const code = bench.code(0x31, 0xc0, 0x89, 0xf1, 0x0f, 0x01, 0xd4, 0x48, 0x8b, 0x07);
      p.read64(bench.page('a'))
        .call(code, bench.page('a'), 1)
        .call(code, bench.page('a'), 0)
        .call(code, bench.page('a'), 2);
    },
    before: (bench) => {
      twoPages(bench);
      const other = bench.l1.createEpt();
      other.map(bench.page('a'), bench.page('b'));
      bench.view('list').setBigUint64(0, bench.l1.ept.pointer, true);
      bench.view('list').setBigUint64(8, other.pointer, true);
    },
    set: { exits: ['vmfunc len=3', 'vmcall'], executed: 4, values: [0xaa, 0xbb, 0xaa, 0xaa] },
    clear: { exits: [UD_EXIT], executed: 1, values: [0xaa] },
  },
  {
    control: 'secondary.vmcs-shadowing',
    title:
      'VMWRITE and VMREAD of L2 reach the shadow VMCS and L1 finds the value there; when clear they exit',
    ...SHADOWING,
    after: async (bench) => {
      await bench.cpu.vmptrld(bench.page('shadow'));
      return { inShadow: Number(await bench.cpu.vmread(GUEST_RSP)) };
    },
    set: { exits: ['vmcall'], executed: 1, values: [0x1234], more: { inShadow: 0x1234 } },
    clear: {
      exits: ['vmwrite len=3', 'vmread len=3', 'vmcall'],
      executed: 1,
      values: [0x11],
      more: { inShadow: 0 },
    },
  },
  {
    control: 'secondary.vmcs-shadowing',
    variant: 'bitmaps',
    title: 'a field whose bit is set in the VMREAD bitmap exits although shadowing is on',
    ...SHADOWING,
    before: async (bench) => {
      bench.view('vmread').setUint8(GUEST_RSP >> 3, 1 << (GUEST_RSP & 7));
      await SHADOWING.before(bench);
    },
    set: { exits: ['vmread len=3', 'vmcall'], executed: 1, values: [0x11] },
    clear: { exits: ['vmwrite len=3', 'vmread len=3', 'vmcall'], executed: 1, values: [0x11] },
  },
  {
    control: 'secondary.enable-pml',
    title: 'a write that makes a page dirty is logged once, and the index counts down',
    options: (bench) => ({ fields: { PML_ADDRESS: bench.page('log'), GUEST_PML_INDEX: PML_ENTRIES - 1 } }),
    program: (p, bench) => p.write64(bench.page('data') + 8, 1).write64(bench.page('data') + 16, 2),
    before: async (bench) => {
      bench.l1.ept.split(bench.page('data'));
      // the log's page itself is L1's alone: nothing else may look like an entry
      await bench.l2.vmwrite('EPT_POINTER', bench.l1.ept.pointer | EPTP_ACCESSED_DIRTY);
    },
    after: async (bench) => {
      const index = Number(await bench.l2.vmread('GUEST_PML_INDEX'));
      const log = bench.view('log');
      let entries = 0;
      for (let i = 0; i < PML_ENTRIES; i++) if (log.getBigUint64(i * 8, true) !== 0n) entries += 1;
      return {
        dataLogged: logged(bench, bench.page('data')),
        unaccounted: PML_ENTRIES - 1 - index - entries,
      };
    },
    set: { exits: ['vmcall'], executed: 2, more: { dataLogged: 1, unaccounted: 0 } },
    clear: { exits: ['vmcall'], executed: 2, more: { dataLogged: 0, unaccounted: 0 } },
  },
  {
    control: 'secondary.enable-pml',
    variant: 'full',
    title: 'a write that cannot be logged exits and completes after L1 made room',
    options: (bench) => ({ fields: { PML_ADDRESS: bench.page('log'), GUEST_PML_INDEX: 0xffff } }),
    program: (p, bench) => p.write64(bench.page('data') + 8, 1).read64(bench.page('data') + 8),
    before: async (bench) => {
      bench.l1.ept.split(bench.page('data'));
      await bench.l2.vmwrite('EPT_POINTER', bench.l1.ept.pointer | EPTP_ACCESSED_DIRTY);
    },
    trace: (bench) => ({
      onExit: (exit) =>
        exit.reason === 'page-modification-log-full'
          ? bench.l2.vmwrite('GUEST_PML_INDEX', PML_ENTRIES - 1)
          : undefined,
    }),
    after: (bench) => ({ dataLogged: logged(bench, bench.page('data')) }),
    set: {
      exits: ['page-modification-log-full', 'vmcall'],
      executed: 2,
      values: [1],
      more: { dataLogged: 1 },
    },
    clear: { exits: ['vmcall'], executed: 2, values: [1], more: { dataLogged: 0 } },
  },
  {
    control: 'secondary.enable-xsaves-xrstors',
    title: 'XSAVES writes a compacted header; when clear it is #UD',
    options: () => ({ exceptionBitmap: UD, fields: { GUEST_CR4: CR4_XSAVE } }),
    // xor eax, eax; xor edx, edx; xsaves [rdi]
    program: (p, bench) =>
      p.call(bench.code(0x31, 0xc0, 0x31, 0xd2, 0x0f, 0xc7, 0x2f, ...MARK), bench.page('area')),
    after: (bench) => ({ compacted: bench.view('area').getUint8(520 + 7) }),
    set: { exits: ['vmcall'], executed: 1, values: MARKED, more: { compacted: 0x80 } },
    clear: { exits: [UD_EXIT], executed: 0, values: [], more: { compacted: 0 } },
  },
  {
    control: 'secondary.use-tsc-scaling',
    title: "L2's RDTSC is twice L1's exactly when a multiplier of 2 is in use",
    needs: ['primary.use-tsc-offsetting'],
    options: () => ({ fields: { TSC_OFFSET: 0, TSC_MULTIPLIER: 2n << 48n } }),
    program: (p, bench) => p.call(bench.code(0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0)),
    before: async (bench) => {
      // far enough from 0 that twice the time before the entry is later than the time after it
      await bench.cpu.wrmsr(TSC, 1n << 44n);
      bench.notes['before'] = await bench.cpu.rdtsc();
    },
    after: async (bench) => {
      const tsc = bench.l2.progress.last / (bench.isSet ? 2n : 1n);
      const after = await bench.cpu.rdtsc();
      return { betweenL1s: tsc > (bench.notes['before'] ?? 0n) && tsc < after };
    },
    set: { exits: ['vmcall'], executed: 1, more: { betweenL1s: true } },
    clear: { exits: ['vmcall'], executed: 1, more: { betweenL1s: true } },
  },
  {
    control: 'pin.process-posted-interrupts',
    title:
      'a notification makes L2 take the posted interrupt without an exit; when clear it is an external interrupt',
    needs: [
      'pin.external-interrupt-exiting',
      'primary.use-tpr-shadow',
      'secondary.virtual-interrupt-delivery',
      'exit.acknowledge-interrupt-on-exit',
    ],
    options: (bench) => ({
      virtualApic: bench.page('vapic'),
      fields: {
        GUEST_INTR_STATUS: 0,
        POSTED_INTR_NV: NOTIFICATION,
        POSTED_INTR_DESC_ADDR: bench.page('descriptor'),
      },
    }),
    program: (p) => p.sync(1).fold(7),
    before: ({ cpu }) => cpu.x2apicEnable(),
    trace: (bench) => ({
      onSync: () => {
        const descriptor = bench.view('descriptor');
        descriptor.setUint32((VECTOR >> 5) * 4, 1 << (VECTOR & 31), true);
        descriptor.setUint8(32, 1); // outstanding notification
        bench.interrupt(NOTIFICATION);
      },
      onExit: () => {},
    }),
    after: (bench) => ({
      irqs: bench.l2.control.u32('irq_counts', VECTOR),
      stillPosted: bench.view('descriptor').getUint32((VECTOR >> 5) * 4, true) !== 0,
      outstanding: bench.view('descriptor').getUint8(32),
    }),
    set: {
      exits: ['sync 1', 'vmcall'],
      executed: 2,
      values: [7],
      more: { irqs: 1, stillPosted: false, outstanding: 0 },
    },
    clear: {
      exits: ['sync 1', `external-interrupt info=0x800000${NOTIFICATION.toString(16)}`, 'vmcall'],
      executed: 2,
      values: [7],
      more: { irqs: 0, stillPosted: true, outstanding: 1 },
    },
  },
];

export const secondaryControls: readonly Selftest[] = CASES.map(controlTest);
