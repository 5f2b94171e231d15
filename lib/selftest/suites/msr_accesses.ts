// SPDX-License-Identifier: Apache-2.0
// An L2 that reads and writes MSRs in rounds, with the host or L1 changing things between two rounds.
import {
  type ControlName,
  foldChecksum,
  GuestFault,
  type L1,
  type L2,
  type L2Stop,
} from '../../guest/index.ts';
import type { Vm } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Requirement, Selftest, SelftestContext } from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, hex, nestedRuns, stopText } from './common.ts';
import { GuestPage } from './guest_page.ts';

/** Readable and writable, and harmless to both levels; the value L2 finds there. */
export const LOW: Readonly<Record<number, bigint>> = {
  372: 0x31n, // SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP: in the VMCS
  373: 0x3232n,
  374: 0x3333n,
  512: 0x1000_0006n, // MTRR bases whose masks are not valid
  514: 0x2000_0006n,
};
export const HIGH: Readonly<Record<number, bigint>> = {
  3221225601: 0x3434n, // STAR, LSTAR, CSTAR, FMASK
  3221225602: 0x3535n,
  3221225603: 0x3636n,
  3221225604: 0x3737n,
  3221225730: 0x3838n, // KERNEL_GS_BASE: KVM lets L2 have it without an exit to L0
  3221225731: 0x3939n, // TSC_AUX
};

export interface Access {
  readonly msr: number;
  /** WRMSR of this; else RDMSR. */
  readonly write?: bigint;
}

export const reads = (...msrs: number[]): Access[] => msrs.map((msr) => ({ msr }));
export const writes = (add: bigint, ...msrs: number[]): Access[] =>
  msrs.map((msr) => ({ msr, write: ({ ...LOW, ...HIGH }[msr] ?? 0n) + add }));

/** What the actions between two rounds work with. */
export interface Stage {
  readonly vm: Vm;
  readonly l1: L1;
  readonly l2: L2;
  readonly page: GuestPage;
  /** Sets the bits of these accesses, and clears all others. */
  intercept(accesses: readonly Access[]): void;
}

export interface Round {
  /** Where L2 stands when `act` is called: before an entry, or active in userspace. */
  readonly at: 'entry' | 'active';
  readonly act?: (stage: Stage) => unknown;
  readonly accesses: readonly Access[];
  /** Those of them that L1 must see. */
  readonly exits: readonly Access[];
}

export interface RoundsTest {
  readonly id: string;
  readonly title: string;
  readonly requires?: readonly Requirement[];
  readonly rounds: readonly Round[];
  /** vCPUs of L1; default 1. */
  readonly vcpus?: number;
  /** Makes the page; default an anonymous one. */
  readonly page?: (vm: Vm) => GuestPage;
}

const CONTROLS: readonly ControlName[] = ['primary.use-msr-bitmaps', 'secondary.enable-ept'];
const RAX = 0;
const RDX = 2;

/** What L1 answers in place of the MSR. */
const answer = (msr: number): bigint => 0x5a5a_0000n | BigInt(msr & 0xfff);

export const text = ({ msr, write }: Access): string =>
  write === undefined ? `rdmsr ${hex(msr)}` : `wrmsr ${hex(msr)} ${hex(write)}`;

/** What L2 folds when exactly the expected accesses go to L1, which answers reads and ignores writes. */
function valuesOf(rounds: readonly Round[]): bigint[] {
  const msrs = new Map(Object.entries({ ...LOW, ...HIGH }).map(([msr, value]) => [Number(msr), value]));
  const values: bigint[] = [];
  for (const { accesses, exits } of rounds) {
    for (const access of accesses) {
      const { msr, write } = access;
      const intercepted = exits.some((exit) => text(exit) === text(access));
      if (write === undefined) values.push(intercepted ? answer(msr) : (msrs.get(msr) ?? 0n));
      else if (!intercepted) msrs.set(msr, write);
    }
  }
  return values;
}

const sum = (rounds: readonly Round[], of: (round: Round) => number): number =>
  rounds.reduce((total, round) => total + of(round), 0);

/** Sets the bits of some accesses in an MSR bitmap and clears all others. */
export function setBitmap(l2: L2, page: GuestPage, accesses: readonly Access[]): void {
  new Uint8Array(page.region.buffer).fill(0);
  for (const { msr, write } of accesses) {
    if (write === undefined) l2.msrBitmap?.interceptRead(msr);
    else l2.msrBitmap?.interceptWrite(msr);
  }
}

/** L1's own MSRs, and what the VMCS holds of L2's. */
export async function setMsrs(l1: L1, l2: L2): Promise<void> {
  await l2.fields.writeAll({
    GUEST_SYSENTER_CS: LOW[0x174]!,
    GUEST_SYSENTER_ESP: LOW[0x175]!,
    GUEST_SYSENTER_EIP: LOW[0x176]!,
  });
  for (const [msr, value] of Object.entries({ ...LOW, ...HIGH })) {
    if (Number(msr) < 0x174 || Number(msr) > 0x176) await l1.cpu(0).wrmsr(Number(msr), value);
  }
}

async function run(context: SelftestContext, test: RoundsTest): Promise<{ observed: Observations }> {
  const { rounds } = test;
  await using machine = await bootL1(context, test.vcpus ?? 1);
  const { vm, l1 } = machine;
  const page = test.page?.(vm) ?? new GuestPage(vm);
  const l2 = await l1.createL2({ msrBitmap: page.gpa }, (program) => {
    for (const [index, { accesses }] of rounds.entries()) {
      for (const { msr, write } of accesses) {
        if (write === undefined) program.rdmsr(msr);
        else program.wrmsr(msr, write);
      }
      const next = rounds[index + 1];
      if (next?.at === 'active') program.sync(index);
      else if (next) program.vmcall();
    }
  });
  await setMsrs(l1, l2);
  const intercept = (accesses: readonly Access[]) => setBitmap(l2, page, accesses);
  const runsBefore = nestedRuns(l1);
  const seen: string[][] = [];
  const enter = () => l2.enter({ policy: { rdmsr: 'advance', wrmsr: 'advance' }, signal: context.signal });
  try {
    for (const { at, act } of rounds) {
      await act?.({ vm, l1, l2, page, intercept });
      const exits: string[] = [];
      seen.push(exits);
      let stop = at === 'entry' ? await enter() : await l2.continue({ signal: context.signal });
      for (let access = accessOf(stop); access; access = accessOf(stop)) {
        exits.push(text(access));
        l2.area.setU64('regs', answer(access.msr), RAX);
        l2.area.setU64('regs', 0, RDX);
        stop = await enter();
      }
      const isOver = stop.kind === 'sync' || (stop.kind === 'exit' && stop.exit.reason === 'vmcall');
      if (isOver) continue;
      exits.push(stopText(stop));
      break;
    }
  } catch (error) {
    // An MSR that should have gone to L1 went to KVM, which has none
    if (!(error instanceof GuestFault)) throw error;
    seen.at(-1)?.push(`${error.level} exception ${error.vector}`);
  }
  return {
    observed: {
      exits: seen,
      executed: l2.progress.executed,
      checksum: hex(l2.progress.checksum),
      nestedRun: nestedRuns(l1) - runsBefore,
    },
  };
}

function accessOf(stop: L2Stop): Access | undefined {
  if (stop.kind !== 'exit') return undefined;
  const { detail } = stop.exit;
  if (detail.reason !== 'rdmsr' && detail.reason !== 'wrmsr') return undefined;
  return { msr: detail.index, ...(detail.value === undefined ? {} : { write: detail.value }) };
}

/** A test that is a list of rounds. */
export function roundsTest(test: RoundsTest): Selftest {
  const { id, title, rounds, requires = [] } = test;
  const boundaries = rounds.length - 1;
  return selftest({
    id,
    title,
    requires: [nestedVmx, binaryStats, ...CONTROLS.map(vmxControl), ...requires],
    expectations: {
      any: {
        exits: rounds.map(({ exits }) => exits.map(text)),
        executed: sum(rounds, ({ accesses }) => accesses.length) + boundaries,
        checksum: hex(foldChecksum(valuesOf(rounds))),
        nestedRun: sum(rounds, ({ at, exits }) => exits.length + (at === 'entry' ? 1 : 0)),
      },
    },
    body: (context) => run(context, test),
  });
}
