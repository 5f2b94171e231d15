// SPDX-License-Identifier: Apache-2.0
// Pages that KVM or the CPU write on L1's behalf while it runs L2: a migration must copy them too.
import type { L1, L2 } from '../../guest/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observed, Selftest, SelftestContext } from '../engine/model.ts';
import { vmxControl } from '../engine/requirements.ts';
import type { Machine } from './common.ts';
import {
  bootPrepared,
  dirtyRing,
  fromBitmap,
  fromRing,
  RING,
  requires,
  type Take,
} from './dirty_log_common.ts';
import { enlightenedVmcs } from './scenario.ts';

const PAGE = 4096;
const KERNEL_GS_BASE = 0xc000_0102;
const NOTIFICATION = 0xf2;
const VECTOR = 0x61;

type Names = Readonly<Record<string, number>>;

/** Names of dirty pages, those of `names` alone: L1 and L2 write others. */
function named(take: Take, names: Names): () => string[] {
  return () => {
    const pages = new Set(take());
    return Object.entries(names).flatMap(([name, gpa]) => (pages.has(gpa / PAGE) ? [name] : []));
  };
}

/** The log of all of L1's memory, where everything is. */
function watch(machine: Machine, isRing: boolean): Take {
  const { memory } = machine.l1;
  const take = isRing ? fromRing(machine, memory) : fromBitmap(memory);
  memory.setFlags({ logDirtyPages: true });
  return take;
}

const boot = (context: SelftestContext, isRing: boolean, evmcs = false): Promise<Machine> =>
  bootPrepared(
    context,
    (vm) => {
      if (isRing) vm.enableDirtyRing(8 * RING);
    },
    evmcs,
  );

async function everything(l1: L1): Promise<{ l2: L2; names: Names }> {
  const apicAccess = l1.allocate();
  const pml = l1.allocate();
  const ept = l1.createEpt({ accessedDirty: true });
  const l2 = await l1.createL2(
    {
      ept,
      controls: ['secondary.enable-pml'],
      fields: { PML_ADDRESS: pml, GUEST_PML_INDEX: 511 },
      apicAccess,
      virtualApic: true,
      msrBitmap: true,
      ioBitmap: true,
      postedInterrupts: { vector: NOTIFICATION },
      entryLoadMsrs: [[KERNEL_GS_BASE, 0x1000n]],
      exitStoreMsrs: [KERNEL_GS_BASE],
      exitLoadMsrs: [[KERNEL_GS_BASE, 0n]],
    },
    (program) => program.fold(1).sync(1).writeCr8(5).sync(2).fold(2).sync(3).wrmsr(KERNEL_GS_BASE, 0x2000),
  );
  const { structures } = l2;
  const names = {
    vmxon: l1.cpu(0).vmxonRegion,
    vmcs12: l2.vmcs,
    vapic: l2.virtualApic!,
    pid: l2.postedInterrupts!.gpa,
    apicAccess,
    pml,
    msrBitmap: structures.msrBitmap!.gpa,
    ioBitmap: structures.ioBitmap!.gpa,
    entryLoad: structures.entryLoadMsrs!.gpa,
    exitStore: structures.exitStoreMsrs!.gpa,
    exitLoad: structures.exitLoadMsrs!.gpa,
    eptRoot: ept.root,
  };
  return { l2, names };
}

/**
 * At every exit of L2 the pages count as dirty that the CPU may have written: the virtual-APIC page, the descriptor.
 * The CPU writes no APIC-access page; KVM 7.3 names it all the same, 6.1 does not.
 */
const byCpu = (...more: string[]) => ({
  oneOf: [
    ['vapic', 'pid', ...more],
    ['vapic', 'pid', 'apicAccess', ...more],
  ],
});
const STEPS = {
  start: [],
  // the first access to anything sets the accessed flag in the root; D flags set since are in L1's page-modification log
  active: byCpu('pml', 'eptRoot'),
  cr8: byCpu(),
  posted: byCpu(),
  // exit 0 stores the MSR
  exit: byCpu('exitStore'),
  vmptrld: ['vmcs12'],
  vmclear: ['vmcs12'],
};

function everythingTest(isRing: boolean): Selftest {
  return selftest({
    id: `dirty-log/own-writes/${isRing ? 'ring' : 'bitmap'}`,
    title: 'pages that KVM and the CPU write for L1, step by step',
    requires: [
      ...requires,
      vmxControl('pin.process-posted-interrupts'),
      vmxControl('secondary.enable-pml'),
      ...(isRing ? [dirtyRing] : []),
    ],
    expectations: { any: { ...STEPS, tpr: 0x50, stored: 0x2000, taken: 1, executed: 7 } },
    body: async (context) => {
      const { signal } = context;
      await using machine = await boot(context, isRing);
      const { l1 } = machine;
      const { l2, names } = await everything(l1);
      const other = l1.place(l1.bytes(l2.vmcs, 4).slice());
      const dirty = named(watch(machine, isRing), names);
      const observed: Record<string, Observed> = { start: dirty() };
      await l2.enter({ signal });
      observed['active'] = dirty();
      await l2.continue({ signal });
      observed['cr8'] = dirty();
      l2.postedInterrupts?.post(VECTOR);
      l1.signal(NOTIFICATION);
      await l2.continue({ signal });
      observed['posted'] = dirty();
      await l2.continue({ signal });
      observed['exit'] = dirty();
      await l1.cpu(0).vmptrld(other);
      observed['vmptrld'] = dirty();
      await l2.vmclear();
      observed['vmclear'] = dirty();
      return {
        observed: {
          ...observed,
          tpr: l2.vapic?.tpr ?? -1,
          stored: Number(l2.structures.exitStoreMsrs?.get(KERNEL_GS_BASE) ?? -1n),
          taken: l2.interruptCount(VECTOR),
          executed: l2.progress.executed,
        },
      };
    },
  });
}

function evmcsTest(isRing: boolean): Selftest {
  return selftest({
    id: `dirty-log/own-writes/evmcs-${isRing ? 'ring' : 'bitmap'}`,
    title:
      'the page of an eVMCS, which KVM writes at every exit to L1: named at the latest when KVM lets go of it',
    requires: [...requires, enlightenedVmcs, ...(isRing ? [dirtyRing] : [])],
    expectations: {
      any: {
        start: [],
        active: [],
        // nested state has what KVM wrote, so it may wait until it lets go of the page
        exit: { oneOf: [[], ['evmcs']] },
        byRelease: ['evmcs'],
        byL1: ['evmcs'],
        reason: 18,
        executed: 4,
      },
    },
    body: async (context) => {
      const { signal } = context;
      await using machine = await boot(context, isRing, true);
      const { l1 } = machine;
      const l2 = await l1.createL2({ evmcs: true, vpid: 1, msrBitmap: true }, (program) =>
        program.fold(1).sync(1).vmcall().fold(2).vmcall(),
      );
      const dirty = named(watch(machine, isRing), { evmcs: l2.vmcs });
      const observed: Record<string, string[]> = { start: dirty() };
      await l2.enter({ signal, policy: { vmcall: 'return' } });
      observed['active'] = dirty();
      await l2.continue({ signal });
      observed['exit'] = dirty();
      const reason = Number(await l2.fields.read('VM_EXIT_REASON'));
      await l2.vmclear();
      observed['byRelease'] = [...new Set([...observed['exit'], ...dirty()])];
      await l2.enter({ signal });
      observed['byL1'] = dirty();
      await l2.enter({ signal });
      return { observed: { ...observed, reason, executed: l2.progress.executed } };
    },
  });
}

export const ownWrites: readonly Selftest[] = [false, true].flatMap((isRing) => [
  everythingTest(isRing),
  evmcsTest(isRing),
]);
