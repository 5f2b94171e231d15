// SPDX-License-Identifier: Apache-2.0
// Hazards of the eVMCS: its memslot goes while L2 runs on it, and another vCPU writes into it.
import {
  EVMCS_BYTES,
  EVMCS_FIELDS,
  EVMCS_WORDS,
  type L2,
  type L2Program,
  type L2Stop,
  VP_ASSIST,
  vmcsFieldInfo,
} from '../../guest/index.ts';
import type { Observations, SelftestContext } from '../engine/model.ts';
import { bootL1, type Machine, nestedRuns, stopText } from './common.ts';
import { counted, counting } from './counting.ts';
import { GuestPage, PAGE_GPA } from './guest_page.ts';
import type { HazardTest } from './hazard.ts';
import { enlightenedVmcs } from './scenario.ts';
import { meanwhile } from './watchdog.ts';

const UNRELATED = PAGE_GPA + 0x10_0000;
const SYSENTER_ESP = 0x175;
const ESP_VALUE = 0x3232n;
/** mov ecx, edi; xor edx, edx; rdmsr */
const RDMSR = [0x89, 0xf9, 0x31, 0xd2, 0x0f, 0x32];

const text = (stop: L2Stop | undefined): string => (stop ? stopText(stop) : 'no progress');

/** An L2 whose eVMCS lies in a memslot of its own. */
async function relocated(
  { vm, l1 }: Machine,
  build: (program: L2Program) => unknown,
): Promise<{ l2: L2; page: GuestPage }> {
  const l2 = await l1.createL2(
    { evmcs: true, msrBitmap: true, fields: { GUEST_SYSENTER_ESP: ESP_VALUE } },
    build,
  );
  const page = new GuestPage(vm);
  new Uint8Array(page.region.buffer).set(l1.bytes(l2.vmcs, EVMCS_BYTES));
  l1.cpu(0).vpAssistPage.setBigUint64(VP_ASSIST.currentNestedVmcs, BigInt(page.gpa), true);
  l2.area.setU64('evmcs', page.gpa);
  return { l2, page };
}

const boot = (context: SelftestContext, vcpus = 1) => bootL1(context, { vcpus, evmcs: true });

/**
 * The state is asked for when the page KVM would read it from has no memslot any more: with L2 active, and with L1
 * running, when the eVMCS is newer than what KVM has of it.
 */
async function stateWithoutPage(context: SelftestContext): Promise<Observations> {
  const stops: string[] = [];
  const sameSize: boolean[] = [];
  for (const at of ['active', 'l1']) {
    await using machine = await boot(context);
    const { l2, page } = await relocated(machine, (p) => (at === 'l1' ? p.vmcall() : p.sync(1)).fold(1));
    stops.push(text(await meanwhile(context, (signal) => l2.enter({ signal }))));
    const { vcpu } = l2.cpu;
    const before = vcpu.getNestedState().length;
    page.delete();
    sameSize.push(vcpu.getNestedState().length === before);
  }
  return { stops, sameSize };
}

/** L2 exits when the page KVM would write the exit into has no memslot any more. */
async function exitWithoutPage(context: SelftestContext): Promise<Observations> {
  await using machine = await boot(context);
  const { l2, page } = await relocated(machine, (p) => p.fold(1).sync(1).fold(2));
  const stops = [text(await meanwhile(context, (signal) => l2.enter({ signal })))];
  page.delete();
  stops.push(text(await meanwhile(context, (signal) => l2.continue({ signal }))));
  return { stops, executed: l2.progress.executed };
}

/** Memslots change, the eVMCS's among them, while L2 is active; the exit finds its way all the same. */
async function changeBeforeExit(context: SelftestContext): Promise<Observations> {
  await using machine = await boot(context);
  const { vm, l1 } = machine;
  const { l2, page } = await relocated(machine, (p) => {
    for (let i = 0; i < 3; i++) p.sync(i).fold(i).vmcall();
  });
  const runsBefore = nestedRuns(l1);
  const changes = [
    () => vm.memory.add({ gpa: UNRELATED, size: 4096 }),
    () => {
      page.moveAway();
      page.moveBack();
    },
    () => vm.memory.regionAt(UNRELATED)?.delete(),
  ];
  const stops: string[] = [];
  for (const change of changes) {
    const active = await meanwhile(context, (signal) => l2.enter({ signal }));
    stops.push(text(active));
    if (active?.kind !== 'sync') break;
    change();
    const exit = await meanwhile(context, (signal) => l2.continue({ signal }));
    stops.push(text(exit));
    if (exit?.kind !== 'exit') break;
  }
  return { stops, executed: l2.progress.executed, nestedRun: nestedRuns(l1) - runsBefore };
}

/** Whether the page is in the dirty log: after an exit that L0 wrote into it, and after VMXOFF. */
async function dirtyLog(context: SelftestContext): Promise<Observations> {
  await using machine = await boot(context);
  const { l1 } = machine;
  const { l2, page } = await relocated(machine, (p) => p.vmcall().sync(1).fold(2));
  const enter = () => l2.enter({ signal: context.signal, policy: { vmcall: 'return' } });
  const log = () => page.region.dirtyPages().length;
  // L1 has the page mapped from here on: a first read alone would put it into the log
  await l2.enter({ signal: context.signal });
  page.region.setFlags({ logDirtyPages: true });
  await enter();
  log();
  const stop = await l2.continue({ signal: context.signal });
  const reason = page.view.getUint32(
    EVMCS_FIELDS.get(vmcsFieldInfo('VM_EXIT_REASON').encoding)!.offset,
    true,
  );
  const byExit = log();
  await l1.cpu(0).vmxoff();
  return { stop: stopText(stop), reason, logged: [byExit, log()] };
}

const READS = 60;
/** Between two flips. */
const FLIP_PAUSES = 100;

const dword = (value: number): number[] => [0, 8, 16, 24].map((shift) => (value >>> shift) & 0xff);

/** L2 reads one MSR; another vCPU flips clean fields, enlightenments and the bitmap's address all the while. */
async function storm(context: SelftestContext): Promise<Observations> {
  await using machine = await boot(context, 2);
  const { l1 } = machine;
  const cells = l1.allocate();
  const plain = l1.allocate();
  const code = counting(l1, RDMSR, ESP_VALUE);
  const { l2, page } = await relocated(machine, (p) =>
    p.loop(READS, (body) => body.call(code, SYSENTER_ESP, cells).vmcall()),
  );
  l2.msrBitmap?.interceptRead(SYSENTER_ESP);
  const bitmap = EVMCS_FIELDS.get(vmcsFieldInfo('MSR_BITMAP').encoding)!;
  const flips = l1.place(
    Uint8Array.from([
      ...[0x81, 0xb7, ...dword(bitmap.offset), ...dword((l2.msrBitmap?.gpa ?? 0) ^ plain)], // xor dword [rdi+bitmap], …
      // From bit 1 of the count: mov eax, [rsi+4]; shl eax, 30; sar eax, 31; mov [rdi+clean fields], eax
      ...[0x8b, 0x46, 4, 0xc1, 0xe0, 30, 0xc1, 0xf8, 31, 0x89, 0x87],
      ...dword(EVMCS_WORDS.cleanFields.offset),
      // From bit 2: mov eax, [rsi+4]; shr eax, 1; and eax, 2; mov [rdi+enlightenments], eax
      ...[0x8b, 0x46, 4, 0xd1, 0xe8, 0x83, 0xe0, 2, 0x89, 0x87],
      ...dword(EVMCS_WORDS.enlightenmentsControl.offset),
      ...[0xb8, ...dword(FLIP_PAUSES), 0xf3, 0x90, 0xff, 0xc8, 0x75, 0xfa], // mov eax, …; pause; dec eax; jnz
      ...[0xff, 0x46, 4, 0x83, 0x3e, 2, 0x75, 0xc6, 0xc3], // inc dword [rsi+4]; cmp dword [rsi], 2; jne; ret
    ]),
  );
  const flag = l1.allocate();
  const flags = new Int32Array(l1.memory.buffer, flag, 2);
  const flipping = l1.cpu(1).call(flips, page.gpa, flag);
  const stops = new Set<string>();
  let stop: L2Stop;
  try {
    do {
      stop = await l2.enter({ signal: context.signal, policy: { rdmsr: 'skip' } });
      stops.add(text(stop));
      // The other vCPU has the CPU meanwhile
      await context.sleep(context.random() < 0.5 ? 1 : 2);
    } while (stop.kind === 'exit' && !l2.progress.done);
  } finally {
    Atomics.store(flags, 0, 2);
    await flipping;
  }
  const { marked, own, other } = counted(l1, cells);
  return {
    stops: [...stops],
    total: marked + own,
    other,
    exitsMinusMarked: l2.exitCount('rdmsr') - marked,
    executed: l2.progress.executed,
    marked,
    flips: Atomics.load(flags, 1),
  };
}

export const EVMCS_HAZARDS: readonly HazardTest[] = (
  [
    {
      id: 'evmcs-deleted/get-state',
      title:
        "KVM_GET_NESTED_STATE of an L2 whose eVMCS's memslot was deleted, with L2 active and with L1 running",
      expect: { stops: ['sync 1', 'vmcall'], sameSize: [true, true] },
      body: stateWithoutPage,
    },
    {
      id: 'evmcs-deleted/exit',
      title: "an exit to L1 of an L2 whose eVMCS's memslot was deleted: L1's reads of it come to userspace",
      expect: { stops: ['sync 1', 'userspace mmio'], executed: 3 },
      body: exitWithoutPage,
    },
    {
      id: 'evmcs-memslot-change',
      title: 'memslots change while L2 runs on an eVMCS; nothing sleeps in atomic context at the exit',
      expect: {
        stops: ['sync 0', 'vmcall', 'sync 1', 'vmcall', 'sync 2', 'vmcall'],
        executed: 8,
        nestedRun: 3,
      },
      body: changeBeforeExit,
    },
    {
      id: 'evmcs-dirty-log',
      title:
        'an exit writes into the eVMCS: its page is in the dirty log, at the latest when L1 is done with it',
      expect: {
        stop: 'vmcall',
        reason: 18,
        logged: {
          oneOf: [
            [0, 1],
            [1, 0],
            [1, 1],
          ],
        },
      },
      body: dirtyLog,
    },
    {
      id: 'racing/evmcs',
      title: 'another vCPU flips clean fields, enlightenments and the MSR bitmap of an eVMCS during entries',
      racing: true,
      expect: {
        stops: ['vmcall'],
        total: READS,
        other: 0,
        exitsMinusMarked: 0,
        executed: 3 * READS,
      },
      body: storm,
      evidence: ['marked', 'flips'],
    },
  ] as const satisfies readonly HazardTest[]
).map((one) => ({ ...one, requires: [enlightenedVmcs] }));
