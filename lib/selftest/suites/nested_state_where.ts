// SPDX-License-Identifier: Apache-2.0
// KVM_SET_NESTED_STATE at every stage and into every place.
import { foldChecksum, type L1, type L2, vmcallRegsValues } from '../../guest/index.ts';
import { Kvm, type Vcpu } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, hex, type Machine, stat } from './common.ts';
import {
  Copy,
  differences,
  HEADER,
  outsideVmx,
  placesOf,
  stateText,
  WITH_VMCS12,
} from './nested_state_common.ts';

/** Small, because a clone copies it; without an irqchip, because a LAPIC belongs to one vCPU id. */
export const SMALL = { memory: 4 * 1024 * 1024, irqchip: false } as const;
export const requires = [nestedVmx, binaryStats, vmxControl('secondary.enable-ept')];

const VALUES = [0x11n, ...vmcallRegsValues(0x100), 0x22n, 0x1234_5678n, 0x33n];
export const CHECKSUM = hex(foldChecksum(VALUES));
const OPERATIONS = 6;

/** Folds what it reads and what all its registers hold after a VMCALL, and stops once while it is active. */
export async function makeL2(l1: L1): Promise<L2> {
  const page = l1.allocate();
  new DataView(l1.memory.buffer).setBigUint64(page, 0x1234_5678n, true);
  const l2 = await l1.createL2({ vpid: 7, msrBitmap: true }, (program) =>
    program.fold(0x11).vmcallRegs(0x100).fold(0x22).sync(1).read64(page).fold(0x33),
  );
  l2.setPolicy({});
  return l2;
}

/** How far L1 and L2 are. */
export interface Stage {
  readonly name: string;
  reach(l2: L2, signal: AbortSignal): Promise<void>;
  readonly isActive: boolean;
  /** L1 has to VMPTRLD before it can enter. */
  readonly load?: boolean;
  readonly state: string;
  /** Stops and entries from here to the end of the program. */
  readonly stops: readonly string[];
  readonly entriesLeft: number;
}

export const STAGES: readonly Stage[] = [
  {
    name: 'vmxon',
    reach: (l2) => l2.vmclear(),
    isActive: false,
    load: true,
    state: `size=${HEADER} vmxon=region`,
    stops: ['vmcall', 'sync 1', 'vmcall'],
    entriesLeft: 2,
  },
  {
    name: 'current',
    reach: async () => {},
    isActive: false,
    state: `size=${WITH_VMCS12} vmxon=region vmcs12=l2`,
    stops: ['vmcall', 'sync 1', 'vmcall'],
    entriesLeft: 2,
  },
  {
    name: 'launched',
    reach: async (l2, signal) => {
      await l2.enter({ signal });
    },
    isActive: false,
    state: `size=${WITH_VMCS12} vmxon=region vmcs12=l2`,
    stops: ['sync 1', 'vmcall'],
    entriesLeft: 1,
  },
  {
    name: 'active',
    reach: async (l2, signal) => {
      await l2.enter({ signal });
      await l2.enter({ signal });
    },
    isActive: true,
    state: `size=${WITH_VMCS12} flags=guestMode vmxon=region vmcs12=l2`,
    stops: ['vmcall'],
    entriesLeft: 0,
  },
];

/** Leaves VMX operation and forgets the registers: what was restored afterwards is all there is. */
export function wipe(vcpu: Vcpu): void {
  vcpu.setNestedState(outsideVmx());
  vcpu.setRegs({ rip: 0n, rsp: 0n, rax: 0xdeadn, rdi: 0n });
}

async function toStage(context: SelftestContext, stage: Stage): Promise<{ machine: Machine; l2: L2 }> {
  const machine = await bootL1(context, SMALL);
  const l2 = await makeL2(machine.l1);
  await stage.reach(l2, context.signal);
  return { machine, l2 };
}

function finished(stage: Stage): Observations {
  return {
    [stage.name]: [stage.state, 'differs', ...stage.stops, stage.entriesLeft, OPERATIONS, CHECKSUM],
  };
}

/** Puts the state of the vCPU somewhere, saves it there again, runs L2 to its end there. */
type Place = (
  machine: Machine,
  l2: L2,
  context: SelftestContext,
) => Promise<{ copy: Copy; differs: readonly string[]; close: () => void }>;

function into(id: string, title: string, place: Place, stages: readonly Stage[] = STAGES): Selftest {
  return selftest({
    id: `nested-state/set/${id}`,
    title,
    requires,
    expectations: { any: Object.assign({}, ...stages.map(finished)) },
    body: async (context) => {
      const observed: Record<string, Observations[string]> = {};
      for (const stage of stages) {
        const { machine, l2 } = await toStage(context, stage);
        await using _closed = machine;
        const { copy, differs, close } = await place(machine, l2, context);
        const state = stateText(copy.vcpu.getNestedState(), placesOf(machine.l1, l2));
        const entries = stat(copy.vcpu.stats(), 'nested_run');
        const stops = await copy.finish(context.signal, stage.isActive, stage.load);
        observed[stage.name] = [
          state,
          ['differs', ...differs].join(' '),
          ...stops,
          stat(copy.vcpu.stats(), 'nested_run') - entries,
          copy.executed,
          hex(copy.checksum),
        ];
        close();
      }
      return { observed };
    },
  });
}

const sameVm: Place = async ({ l1 }, l2) => {
  const { vcpu } = l1.cpu(0);
  const differs: string[] = [];
  const snapshot = vcpu.save();
  for (let cycle = 0; cycle < 2; cycle++) {
    wipe(vcpu);
    vcpu.restore(snapshot);
    differs.push(...differences(vcpu.save(), snapshot));
  }
  // over what it has already
  vcpu.setNestedState(vcpu.getNestedState());
  differs.push(...differences(vcpu.save(), snapshot));
  return { copy: new Copy(vcpu, l1.memory.buffer, l2), differs, close: () => {} };
};

const newVcpu: Place = async ({ vm, l1 }, l2) => {
  const snapshot = l1.vcpu(0).save();
  const vcpu = vm.createVcpu(1);
  vcpu.restore(snapshot);
  const differs = differences(vcpu.save(), snapshot);
  l1.vcpu(0).close();
  return { copy: new Copy(vcpu, l1.memory.buffer, l2), differs, close: () => {} };
};

/** A VM made of a VM: `times` clones, each of the one before. */
function newVm(times: number): Place {
  return async ({ vm, l1 }, l2) => {
    const kvm = Kvm.open();
    const snapshot = l1.vcpu(0).save();
    const differs: string[] = [];
    let last = vm;
    for (let time = 0; time < times; time++) {
      last = kvm.cloneVm(last);
      differs.push(...differences(last.vcpus[0]!.save(), snapshot));
    }
    const region = last.memory.regionAt(0)!;
    return { copy: new Copy(last.vcpus[0]!, region.buffer, l2), differs, close: () => kvm.close() };
  };
}

export const where: readonly Selftest[] = [
  into('same-vm', 'wiped and set again on the same vCPU, twice, then once over itself', sameVm),
  into('new-vcpu', 'set on another vCPU of the same VM, the first one closed', newVcpu),
  into('new-vm', 'set in a new VM', newVm(1)),
  into('new-vm-twice', 'set in a new VM made of a new VM, with L2 active', newVm(2), STAGES.slice(-1)),
];
