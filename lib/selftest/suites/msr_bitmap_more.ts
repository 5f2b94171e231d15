// SPDX-License-Identifier: Apache-2.0
// MSR bitmaps of two L2s, in memory that the kernel does not manage, and changed while L2 runs.
import { foldChecksum, type L2 } from '../../guest/index.ts';
import { hiddenMemory } from '../../probe/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Requirement, Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, churn, hex, nestedRuns, stat, stopText } from './common.ts';
import { counted, counting } from './counting.ts';
import { GuestPage, PAGE_GPA } from './guest_page.ts';
import { HIGH, LOW, reads, setBitmap, setMsrs } from './msr_accesses.ts';

const requires = [
  nestedVmx,
  binaryStats,
  vmxControl('primary.use-msr-bitmaps'),
  vmxControl('secondary.enable-ept'),
];
const SYSENTER_ESP = 0x175;
const KERNEL_GS_BASE = 0xc000_0102;
const MARK = 0x5a5a;
/** mov ecx, edi; xor edx, edx; rdmsr */
const RDMSR = [0x89, 0xf9, 0x31, 0xd2, 0x0f, 0x32];

const SWITCHES = 4;

/** Two L2s take turns on one vCPU; in odd rounds each has the other's bitmap. */
async function takeTurns(context: SelftestContext): Promise<{ observed: Observations }> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const pages = [new GuestPage(vm), new GuestPage(vm, PAGE_GPA + 0x10_0000)];
  const l2s: L2[] = [];
  for (const page of pages) {
    const l2 = await l1.createL2({ msrBitmap: page.gpa }, (program) => {
      for (let i = 0; i < SWITCHES; i++) program.rdmsr(SYSENTER_ESP).rdmsr(KERNEL_GS_BASE).vmcall();
    });
    await setMsrs(l1, l2);
    l2s.push(l2);
  }
  setBitmap(l2s[0]!, pages[0]!, reads(SYSENTER_ESP));
  setBitmap(l2s[1]!, pages[1]!, reads(KERNEL_GS_BASE));
  const exits: string[] = [];
  for (let round = 0; round < SWITCHES; round++) {
    for (const [index, l2] of l2s.entries()) {
      await l2.vmwrite('MSR_BITMAP', pages[(index + round) % 2]!.gpa);
      for (;;) {
        const stop = await l2.enter({ policy: { rdmsr: 'advance' }, signal: context.signal });
        if (stop.kind !== 'exit' || stop.exit.detail.reason !== 'rdmsr') break;
        exits.push(hex(stop.exit.detail.index));
        l2.area.setU64('regs', MARK, 0);
        l2.area.setU64('regs', 0, 2);
      }
    }
  }
  return { observed: { exits, checksums: l2s.map((l2) => hex(l2.progress.checksum)) } };
}

function turnValues(index: number): bigint[] {
  return Array.from({ length: SWITCHES }, (_, round) =>
    (index + round) % 2 === 0 ? [BigInt(MARK), HIGH[KERNEL_GS_BASE]!] : [LOW[SYSENTER_ESP]!, BigInt(MARK)],
  ).flat();
}

const TURN_EXITS = Array.from({ length: SWITCHES }, (_, round) => {
  const msrs = [hex(SYSENTER_ESP), hex(KERNEL_GS_BASE)];
  return round % 2 === 0 ? msrs : msrs.reverse();
}).flat();

const unmanagedPage: Requirement = {
  name: 'unmanaged memory',
  missing: () => {
    const found = hiddenMemory();
    return 'reason' in found
      ? `${found.reason} (lab: --append "mem=512M iomem=relaxed kvm.allow_unsafe_mappings=1")`
      : undefined;
  },
};

const UNSAFE = 'kvm.allow_unsafe_mappings';

function unsafeMappings(on: boolean): Requirement {
  const wanted = on ? '1' : '0';
  return {
    name: `${UNSAFE}=${wanted}`,
    missing: ({ kvm }) => {
      const value = kvm.parameters[UNSAFE];
      // Older kernels map such memory without asking
      if (value === undefined) return on ? undefined : `this kernel has no ${UNSAFE}: 6.13 and later have`;
      return (value === 'Y' || value === '1') === on
        ? undefined
        : `${UNSAFE} is ${value}: boot with ${UNSAFE}=${wanted}`;
    },
  };
}

const READS = 1000;

/**
 * The bitmap in memory without a struct page. What KVM itself does with it shows in exits to L0: an MSR that it passes
 * through costs none, unless it did without the bitmap.
 */
async function unmanaged(context: SelftestContext): Promise<{ observed: Observations }> {
  const range = hiddenMemory();
  if ('reason' in range) throw new Error(range.reason);
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const page = new GuestPage(vm, PAGE_GPA, { type: 'file', path: '/dev/mem', offset: range.address });
  new Uint8Array(page.region.buffer).fill(0);
  const cells = l1.allocate();
  const code = counting(l1, RDMSR, HIGH[KERNEL_GS_BASE]!);
  const l2 = await l1.createL2({ msrBitmap: page.gpa }, (program) =>
    program
      .sync(1)
      .loop(READS, (body) => body.call(code, KERNEL_GS_BASE, cells))
      .sync(2)
      .vmcall()
      .rdmsr(SYSENTER_ESP)
      .sync(3)
      .rdmsr(SYSENTER_ESP),
  );
  await setMsrs(l1, l2);
  const { vcpu } = l1.cpu(0);
  const exitsToL0 = () => stat(vcpu.stats(), 'exits');
  const enter = () => l2.enter({ policy: { rdmsr: 'advance' }, signal: context.signal });
  const resume = () => l2.continue({ signal: context.signal });
  await enter();
  const before = exitsToL0();
  await resume();
  const passedThrough = exitsToL0() - before < READS;
  await resume();
  const exits: string[] = [];
  setBitmap(l2, page, reads(SYSENTER_ESP));
  exits.push(stopText(await enter()));
  exits.push(stopText(await enter()));
  setBitmap(l2, page, []);
  exits.push(stopText(await resume()));
  return { observed: { ...counted(l1, cells), passedThrough, exits, executed: l2.progress.executed } };
}

const UNMANAGED_RIGHT = {
  marked: 0,
  own: READS,
  other: 0,
  passedThrough: true,
  exits: ['rdmsr', 'sync 3', 'vmcall'],
  executed: 2 * READS + 6,
};

const RACED = 300;
const TICKS = 200_000n;
const HOST_PERIOD_MS = 2;

/** L2 reads one MSR again and again on its own clock, the host changes the page on another. */
async function race(
  context: SelftestContext,
  change: (page: GuestPage, l2: L2, turn: number) => void,
): Promise<{ observed: Observations; evidence: Observations }> {
  await using machine = await bootL1(context);
  const { vm, l1 } = machine;
  const page = new GuestPage(vm);
  const cells = l1.allocate();
  const code = counting(l1, RDMSR, LOW[SYSENTER_ESP]!);
  const l2 = await l1.createL2({ msrBitmap: page.gpa }, (program) =>
    program.loop(RACED, (body) => body.call(code, SYSENTER_ESP, cells).delay(TICKS)),
  );
  await setMsrs(l1, l2);
  setBitmap(l2, page, reads(SYSENTER_ESP));
  const runsBefore = nestedRuns(l1);
  const host = churn(context, HOST_PERIOD_MS, (turn) => change(page, l2, turn));
  let last = 'none';
  let changes = 0;
  try {
    last = stopText(await l2.enter({ policy: { rdmsr: 'skip' }, signal: context.signal }));
  } finally {
    changes = await host.stop();
  }
  const { marked, own, other } = counted(l1, cells);
  return {
    observed: {
      marked,
      total: marked + own,
      other,
      // What L2 saw, L1's count and KVM's must agree
      exitsMinusMarked: l2.exitCount('rdmsr') - marked,
      nestedRunMinusExits: nestedRuns(l1) - runsBefore - l2.exitCount('rdmsr'),
      last,
      executed: l2.progress.executed,
    },
    evidence: { hostChanges: changes },
  };
}

const RACE_RIGHT = {
  total: RACED,
  other: 0,
  exitsMinusMarked: 0,
  nestedRunMinusExits: 1,
  last: 'vmcall',
  executed: 3 * RACED,
};

export const msrBitmapMore: readonly Selftest[] = [
  selftest({
    id: 'msr-bitmap/two-l2s',
    title: 'two L2s take turns with a bitmap each, which L1 exchanges between entries',
    requires,
    expectations: {
      any: {
        exits: TURN_EXITS,
        checksums: [0, 1].map((index) => hex(foldChecksum(turnValues(index)))),
      },
    },
    body: takeTurns,
  }),
  selftest({
    id: 'msr-bitmap/pfnmap/unsafe-mappings=1',
    title: 'a bitmap in unmanaged memory is obeyed, and KVM passes through what it does not name',
    requires: [...requires, unmanagedPage, unsafeMappings(true)],
    expectations: { any: UNMANAGED_RIGHT },
    body: unmanaged,
  }),
  selftest({
    id: 'msr-bitmap/pfnmap/unsafe-mappings=0',
    title:
      'the same where KVM may not pin such memory: stock KVM does without the bitmap, at an exit per access',
    requires: [...requires, unmanagedPage, unsafeMappings(false)],
    expectations: {
      change: 'msr-bitmap',
      stock: { ...UNMANAGED_RIGHT, passedThrough: false },
      patched: UNMANAGED_RIGHT,
    },
    body: unmanaged,
  }),
  selftest({
    id: 'msr-bitmap/racing/madvise',
    title: 'the bitmap is discarded and filled again while L2 reads an MSR',
    requires,
    racing: true,
    expectations: { any: { ...RACE_RIGHT, marked: { min: 1, max: RACED - 1 } } },
    body: (context) =>
      race(context, (page, l2, turn) => {
        if (turn % 2 === 0) page.discard();
        else setBitmap(l2, page, reads(SYSENTER_ESP));
      }),
  }),
  selftest({
    id: 'msr-bitmap/racing/swap',
    title: 'memory with the same bits is swapped beneath the bitmap while L2 reads an MSR',
    requires,
    racing: true,
    expectations: { any: { ...RACE_RIGHT, marked: RACED } },
    body: (context) => race(context, (page) => page.swap(true)),
  }),
  selftest({
    id: 'msr-bitmap/racing/memslot-move',
    title: 'the bitmap moves away and back while L2 reads an MSR: it exits either way',
    requires,
    racing: true,
    expectations: { any: { ...RACE_RIGHT, marked: RACED } },
    body: (context) =>
      race(context, (page, _, turn) => {
        if (turn % 2 === 0) page.moveAway();
        else page.moveBack();
      }),
  }),
];
