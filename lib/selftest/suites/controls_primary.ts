// SPDX-License-Identifier: Apache-2.0
// Primary processor-based controls, SDM vol. 3, 25.6.2.
import type { ControlName } from '../../guest/index.ts';
import type { Observations, Selftest } from '../engine/model.ts';
import { type Bench, type ControlCase, controlTest, MARK, MARKED } from './scenario.ts';
import { PORT_INPUT } from './trace.ts';

const UD = 1 << 6;
const GP = 1 << 13;
const GP_EXIT = 'exception-or-nmi info=0x80000b0d code=0x0';
const VECTOR = 0x51;
const SYSENTER_ESP = 0x175;
const X2APIC_TPR = 0x808;
const TSC_OFFSET = 1n << 44n;

/** An instruction of L2 that exits when the control is set and completes when it is not. */
interface InstructionRow {
  readonly control: ControlName;
  readonly title: string;
  readonly code: readonly number[];
  /** The instruction's exits in L1. */
  readonly exits: readonly string[];
  /** RAX of the code in both variants; MARK is put behind the code where it is not given. */
  readonly rax?: { set: bigint | number; clear: bigint | number };
}

const INSTRUCTION_ROWS: readonly InstructionRow[] = [
  {
    control: 'primary.invlpg-exiting',
    title: 'INVLPG, with the linear address in the qualification',
    code: [0x0f, 0x01, 0x3f], // invlpg [rdi]
    exits: ['invlpg q=page+0x0 len=3'],
  },
  {
    control: 'primary.mwait-exiting',
    title: 'MWAIT without an armed monitor',
    code: [0x31, 0xc9, 0x31, 0xc0, 0x0f, 0x01, 0xc9], // xor ecx, ecx; xor eax, eax; mwait
    exits: ['mwait len=3'],
  },
  {
    control: 'primary.monitor-exiting',
    title: 'MONITOR',
    code: [0x48, 0x89, 0xf8, 0x31, 0xc9, 0x31, 0xd2, 0x0f, 0x01, 0xc8], // mov rax, rdi; ecx = edx = 0; monitor
    exits: ['monitor len=3'],
  },
  {
    control: 'primary.rdtsc-exiting',
    title: 'RDTSC',
    code: [0x0f, 0x31],
    exits: ['rdtsc len=2'],
  },
  {
    control: 'primary.cr3-load-exiting',
    title: 'MOV to CR3: control register 3, access 0, from RAX',
    code: [0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8], // mov rax, cr3; mov cr3, rax
    exits: ['control-register-access q=0x3 len=3'],
  },
  {
    control: 'primary.cr3-store-exiting',
    title: 'MOV from CR3: control register 3, access 1, to RCX',
    code: [0x0f, 0x20, 0xd9], // mov rcx, cr3
    exits: ['control-register-access q=0x113 len=3'],
  },
  {
    control: 'primary.cr8-load-exiting',
    title: 'MOV to CR8: control register 8, access 0, from RAX; what was not loaded is not read back',
    // mov eax, 5; mov cr8, rax; xor eax, eax; mov rax, cr8
    code: [0xb8, 5, 0, 0, 0, 0x44, 0x0f, 0x22, 0xc0, 0x31, 0xc0, 0x44, 0x0f, 0x20, 0xc0],
    exits: ['control-register-access q=0x8 len=4'],
    rax: { set: 0, clear: 5 },
  },
  {
    control: 'primary.cr8-store-exiting',
    title: 'MOV from CR8: control register 8, access 1, to RAX, which a skipped MOV leaves alone',
    // mov eax, 5; mov cr8, rax; mov eax, 0x11; mov rax, cr8
    code: [0xb8, 5, 0, 0, 0, 0x44, 0x0f, 0x22, 0xc0, 0xb8, 0x11, 0, 0, 0, 0x44, 0x0f, 0x20, 0xc0],
    exits: ['control-register-access q=0x18 len=4'],
    rax: { set: 0x11, clear: 5 },
  },
  {
    control: 'primary.mov-dr-exiting',
    title: 'MOV to and from DR7 through RAX',
    // mov eax, 0x401; mov dr7, rax; mov eax, 0x11; mov rax, dr7
    code: [0xb8, 1, 4, 0, 0, 0x0f, 0x23, 0xf8, 0xb8, 0x11, 0, 0, 0, 0x0f, 0x21, 0xf8],
    exits: ['mov-dr q=0x7 len=3', 'mov-dr q=0x17 len=3'],
    rax: { set: 0x11, clear: 0x401 },
  },
  {
    control: 'primary.pause-exiting',
    title: 'PAUSE',
    code: [0xf3, 0x90],
    exits: ['pause len=2'],
  },
  {
    control: 'secondary.wbinvd-exiting',
    title: 'WBINVD',
    code: [0x0f, 0x09],
    exits: ['wbinvd len=2'],
  },
  {
    control: 'secondary.descriptor-table-exiting',
    // memory operands: with a register Bochs 3.0 leaves an old displacement in the qualification (SDM: 0)
    title: 'SGDT, SIDT, SLDT and STR, which then stores no selector',
    // sgdt [rdi]; sidt [rdi]; sldt [rdi]; mov dword [rdi], 0; str [rdi]; mov eax, [rdi]
    code: [
      0x0f, 0x01, 0x07, 0x0f, 0x01, 0x0f, 0x0f, 0x00, 0x07, 0xc7, 0x07, 0, 0, 0, 0, 0x0f, 0x00, 0x0f, 0x8b,
      0x07,
    ],
    exits: [
      'gdtr-idtr-access len=3',
      'gdtr-idtr-access len=3',
      'ldtr-tr-access len=3',
      'ldtr-tr-access len=3',
    ],
    rax: { set: 0, clear: 0x18 },
  },
  {
    control: 'secondary.rdrand-exiting',
    title: 'RDRAND',
    code: [0x0f, 0xc7, 0xf0],
    exits: ['rdrand len=3'],
  },
  {
    control: 'secondary.rdseed-exiting',
    title: 'RDSEED',
    code: [0x0f, 0xc7, 0xf8],
    exits: ['rdseed len=3'],
  },
];

function instruction(row: InstructionRow): Selftest {
  const code = row.rax ? row.code : [...row.code, ...MARK];
  return controlTest({
    control: row.control,
    title: `${row.title}: exits exactly when the control is set`,
    options: () => ({ exceptionBitmap: UD | GP }),
    program: (program, bench) => program.call(bench.code(...code), bench.page('page')),
    set: { exits: [...row.exits, 'vmcall'], executed: 1, values: row.rax ? [row.rax.set] : MARKED },
    clear: { exits: ['vmcall'], executed: 1, values: row.rax ? [row.rax.clear] : MARKED },
  });
}

const irqCounts = ({ cpu, l2 }: Bench): Observations => ({
  l1Irqs: cpu.interruptCount(VECTOR),
  l2Irqs: l2.control.u32('irq_counts', VECTOR),
});

const CASES: readonly ControlCase[] = [
  {
    control: 'primary.rdpmc-exiting',
    title: 'RDPMC of a counter that no CPU has: an exit when set, #GP in L2 when clear',
    options: () => ({ exceptionBitmap: GP }),
    // mov ecx, edi; rdpmc
    program: (p, bench) => p.call(bench.code(0x89, 0xf9, 0x0f, 0x33, ...MARK), 0x1234),
    set: { exits: ['rdpmc len=2', 'vmcall'], executed: 1, values: MARKED },
    clear: { exits: [GP_EXIT], executed: 0, values: [] },
  },
  {
    control: 'primary.hlt-exiting',
    title: 'HLT: exits when set; when clear, L2 sleeps in L0 until the interrupt that is pending',
    options: () => ({ fields: { GUEST_RFLAGS: 2 } }),
    program: (p, bench) => p.sync(1).call(bench.code(0xfb, 0xf4, ...MARK)), // sti; hlt
    before: ({ cpu }) => cpu.x2apicEnable(),
    trace: (bench) => ({ onSync: () => bench.interrupt(VECTOR), onExit: () => {} }),
    after: irqCounts,
    set: {
      exits: ['sync 1', 'hlt len=1', 'vmcall'],
      executed: 2,
      values: MARKED,
      more: { l1Irqs: 0, l2Irqs: 1 },
    },
    clear: { exits: ['sync 1', 'vmcall'], executed: 2, values: MARKED, more: { l1Irqs: 0, l2Irqs: 1 } },
  },
  {
    control: 'primary.interrupt-window-exiting',
    title: 'an exit before the first instruction with RFLAGS.IF set, and after the one behind STI',
    options: (bench) => ({
      entry: bench.raw('code', 0xfa, 0x90, 0xfb, 0x90, 0x90, 0x0f, 0x01, 0xc1), // cli; nop; sti; nop; nop; vmcall
    }),
    trace: (bench) => ({
      onExit: async (_, index) => {
        // IF off by hand: the first window must not stay open, the second is L2's own
        if (index === 0) await bench.l2.vmwrite('GUEST_RFLAGS', 2);
        else await bench.write('primary.interrupt-window-exiting', false);
      },
    }),
    set: { exits: ['interrupt-window at=code+0x0', 'interrupt-window at=code+0x4', 'vmcall'] },
    clear: { exits: ['vmcall'] },
  },
  {
    control: 'primary.nmi-window-exiting',
    title: 'an exit before the first instruction when NMIs are not blocked',
    needs: ['pin.nmi-exiting', 'pin.virtual-nmis'],
    program: (p) => p.fold(7),
    trace: (bench) => ({ onExit: () => bench.write('primary.nmi-window-exiting', false) }),
    set: { exits: ['nmi-window', 'vmcall'], executed: 1, values: [7] },
    clear: { exits: ['vmcall'], executed: 1, values: [7] },
  },
  {
    control: 'primary.use-tsc-offsetting',
    title: "L2's RDTSC lies between L1's before and after, moved by the offset exactly when set",
    options: () => ({ fields: { TSC_OFFSET } }),
    // rdtsc; shl rdx, 32; or rax, rdx
    program: (p, bench) => p.call(bench.code(0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0)),
    before: async (bench) => {
      bench.notes['before'] = await bench.cpu.rdtsc();
    },
    after: async (bench) => {
      const tsc = bench.l2.progress.last - (bench.isSet ? TSC_OFFSET : 0n);
      const after = await bench.cpu.rdtsc();
      return { betweenL1s: tsc > (bench.notes['before'] ?? 0n) && tsc < after };
    },
    set: { exits: ['vmcall'], executed: 1, more: { betweenL1s: true } },
    clear: { exits: ['vmcall'], executed: 1, more: { betweenL1s: true } },
  },
  {
    control: 'primary.use-tpr-shadow',
    title: "CR8 of L2 is VTPR when set, L1's own TPR when clear",
    options: () => ({ virtualApic: true }),
    program: (p) => p.writeCr8(5).readCr8(),
    before: ({ cpu }) => cpu.x2apicEnable(),
    after: async ({ l1, l2, cpu }) => ({
      vtpr: new DataView(l1.memory.buffer).getUint32((l2.virtualApic ?? 0) + 0x80, true),
      tpr: Number(await cpu.rdmsr(X2APIC_TPR)),
    }),
    set: { exits: ['vmcall'], executed: 2, values: [5], more: { vtpr: 0x50, tpr: 0 } },
    clear: { exits: ['vmcall'], executed: 2, values: [5], more: { vtpr: 0, tpr: 0x50 } },
  },
  {
    control: 'primary.unconditional-io-exiting',
    title: 'OUT of one and two bytes and IN with an immediate port: all exit, or all reach userspace',
    // mov al, 0x11; in al, 0x80; movzx eax, al
    program: (p, bench) =>
      p
        .out8(0x80, 1)
        .out16(0x81, 0x102)
        .call(bench.code(0xb0, 0x11, 0xe4, 0x80, 0x0f, 0xb6, 0xc0)),
    set: {
      exits: [
        'io-instruction q=0x800000 len=1',
        'io-instruction q=0x810001 len=2',
        'io-instruction q=0x800048 len=2',
        'vmcall',
      ],
      executed: 3,
      values: [0x11],
    },
    clear: {
      exits: [
        'userspace out port=0x80 data=0x1',
        'userspace out port=0x81 data=0x2,0x1',
        `userspace in port=0x80 data=0x${PORT_INPUT.toString(16)}`,
        'vmcall',
      ],
      executed: 3,
      values: [PORT_INPUT],
    },
  },
  {
    control: 'primary.use-io-bitmaps',
    title: 'only the ports whose bits are set exit, also one that a wider access merely touches',
    options: (bench) => ({ fields: { IO_BITMAP_A: bench.page('A'), IO_BITMAP_B: bench.page('B') } }),
    program: (p) => p.out8(0x80, 1).out8(0x81, 2).out16(0x7f, 3).out8(0x8080, 4).out8(0x8081, 5),
    before: (bench) => {
      bench.view('A').setUint8(0x80 >> 3, 1);
      bench.view('B').setUint8(0x80 >> 3, 1);
    },
    set: {
      exits: [
        'io-instruction q=0x800000 len=1',
        'userspace out port=0x81 data=0x2',
        'io-instruction q=0x7f0001 len=2',
        'io-instruction q=0x80800000 len=1',
        'userspace out port=0x8081 data=0x5',
        'vmcall',
      ],
      executed: 5,
    },
    clear: {
      exits: [
        'userspace out port=0x80 data=0x1',
        'userspace out port=0x81 data=0x2',
        'userspace out port=0x7f data=0x3,0x0',
        'userspace out port=0x8080 data=0x4',
        'userspace out port=0x8081 data=0x5',
        'vmcall',
      ],
      executed: 5,
    },
  },
  {
    control: 'primary.use-io-bitmaps',
    variant: 'over-unconditional',
    title: 'bitmaps overrule unconditional I/O exiting',
    needs: ['primary.unconditional-io-exiting'],
    options: (bench) => ({ fields: { IO_BITMAP_A: bench.page('A'), IO_BITMAP_B: bench.page('B') } }),
    program: (p) => p.out8(0x80, 1),
    set: { exits: ['userspace out port=0x80 data=0x1', 'vmcall'], executed: 1 },
    clear: { exits: ['io-instruction q=0x800000 len=1', 'vmcall'], executed: 1 },
  },
  {
    control: 'primary.monitor-trap-flag',
    title: 'an exit after each instruction',
    options: (bench) => ({ entry: bench.raw('code', 0x90, 0x90, 0x90, 0x0f, 0x01, 0xc1) }), // 3 nops, vmcall
    trace: () => ({ onExit: () => {} }),
    set: {
      exits: [
        'monitor-trap-flag at=code+0x1',
        'monitor-trap-flag at=code+0x2',
        'monitor-trap-flag at=code+0x3',
        'vmcall',
      ],
    },
    clear: { exits: ['vmcall'] },
  },
  {
    control: 'primary.use-msr-bitmaps',
    title: 'a bitmap that intercepts nothing: no RDMSR or WRMSR exits when set, every one does when clear',
    options: (bench) => ({
      fields: { MSR_BITMAP: bench.page('bitmap'), GUEST_SYSENTER_ESP: 0x5000 },
    }),
    // mov ecx, edi; mov eax, 0x11; xor edx, edx; rdmsr
    program: (p, bench) =>
      p
        .call(bench.code(0x89, 0xf9, 0xb8, 0x11, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x32), SYSENTER_ESP)
        .wrmsr(SYSENTER_ESP, 0x6000),
    after: async ({ l2 }) => ({ sysenterEsp: Number(await l2.vmread('GUEST_SYSENTER_ESP')) }),
    set: { exits: ['vmcall'], executed: 2, values: [0x5000], more: { sysenterEsp: 0x6000 } },
    clear: {
      exits: ['rdmsr len=2', 'wrmsr len=2', 'vmcall'],
      executed: 2,
      values: [0x11],
      more: { sysenterEsp: 0x5000 },
    },
  },
  {
    control: 'primary.activate-secondary-controls',
    title:
      'WBINVD exiting and EPT count only with secondary controls on; without them L2 runs on shadow paging',
    needs: ['secondary.wbinvd-exiting'],
    program: (p, bench) => p.call(bench.code(0x0f, 0x09, ...MARK)).read64(bench.page('a')),
    before: (bench) => {
      bench.view('a').setBigUint64(0, 0xaan, true);
      bench.view('b').setBigUint64(0, 0xbbn, true);
      bench.l1.ept.map(bench.page('a'), bench.page('b'));
    },
    set: { exits: ['wbinvd len=2', 'vmcall'], executed: 2, values: [0x5a, 0xbb] },
    clear: { exits: ['vmcall'], executed: 2, values: [0x5a, 0xaa] },
  },
];

export const primaryControls: readonly Selftest[] = [
  ...INSTRUCTION_ROWS.map(instruction),
  ...CASES.map(controlTest),
];
