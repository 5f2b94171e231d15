// SPDX-License-Identifier: Apache-2.0
// An L2 that uses a page of L1's in rounds, with the host changing the page between two rounds.
import {
  type ControlName,
  foldChecksum,
  GuestProtocolError,
  type L1,
  type L2,
  type L2Options,
  L2Program,
  type L2Stop,
  type VmcsField,
  VmxError,
} from '../../guest/index.ts';
import type { Exit, Vm } from '../../kvm/index.ts';
import { selftest } from '../engine/define.ts';
import type {
  ExpectationTable,
  Observations,
  Observed,
  Requirement,
  Selftest,
  SelftestContext,
} from '../engine/model.ts';
import { binaryStats, nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, hex, nestedRuns } from './common.ts';
import { GuestPage } from './guest_page.ts';
import { exitText, INSTRUCTION_POLICY } from './trace.ts';

/** What stock and patched kernels do alike, or each. */
export type Either<T> = T | { readonly stock: T; readonly patched: T };

export interface Stage {
  readonly vm: Vm;
  readonly l1: L1;
  readonly l2: L2;
  readonly page: GuestPage;
}

export type Place = (...bytes: number[]) => number;

export interface PageRound {
  /** Where L2 stands when `act` is called: before an entry; or active, or before an entry that userspace must repeat. */
  readonly at: 'entry' | 'active';
  readonly act?: (stage: Stage) => unknown;
  /** What L2 executes; left out for a round in which it cannot. `place` puts machine code into L2's memory. */
  readonly run?: (program: L2Program, place: Place) => unknown;
  /** What L1 and userspace see. */
  readonly exits: Either<readonly string[]>;
  /** What L2 folds. */
  readonly values?: Either<readonly (bigint | number)[]>;
  /** What the test looks at afterwards. */
  readonly page?: Either<Observed>;
}

export interface PageTest {
  readonly id: string;
  readonly title: string;
  readonly needs?: readonly ControlName[];
  readonly requires?: readonly Requirement[];
  readonly vcpus?: number;
  readonly options: (stage: Pick<Stage, 'l1' | 'page'>) => L2Options;
  /** Before the first round. */
  readonly before?: (stage: Stage) => unknown;
  readonly rounds: readonly PageRound[];
  readonly look: (stage: Stage, round: number) => Observed;
  /** What is looked at when all rounds are through, and what it must be. */
  readonly after?: (stage: Stage) => Observations;
  readonly more?: Either<ExpectationTable>;
}

/** Makes the tests of one suite: with what they share, unless a test has its own. */
export function pageTestsOf(
  suite: string,
  shared: Pick<PageTest, 'needs' | 'options' | 'look'>,
): (name: string, title: string, rounds: readonly PageRound[], own?: Partial<PageTest>) => PageTest {
  return (name, title, rounds, own) => ({ id: `${suite}/${name}`, title, rounds, ...shared, ...own });
}

/** An act that sets or clears a bit of a VMCS field of the stage's L2. */
export function switchBit(field: VmcsField, bit: bigint): (on: boolean) => (stage: Stage) => Promise<void> {
  return (on) => async (stage) => {
    const value = await stage.l2.vmread(field);
    await stage.l2.vmwrite(field, on ? value | bit : value & ~bit);
  };
}

/** What userspace answers to a read of memory that is not there. */
export const MMIO_READ = 0x5a5a_5a5a;
const LIMIT = 24;

function pick<T>(value: Either<T>, kind: 'stock' | 'patched'): T {
  return typeof value === 'object' && value !== null && 'stock' in value ? value[kind] : (value as T);
}

const isBoth = (value: unknown): boolean => typeof value === 'object' && value !== null && 'stock' in value;

/** An exit to userspace in a word or two; reads are answered. */
export function userspaceText(exit: Exit): string {
  if (exit.type === 'mmio') {
    const what = `${exit.isWrite ? 'write' : 'read'} ${hex(exit.address)}`;
    if (!exit.isWrite) exit.data.fill(MMIO_READ & 0xff);
    const value = exit.data.reduceRight((sum, byte) => sum * 256n + BigInt(byte), 0n);
    return exit.isWrite ? `mmio ${what} ${hex(value)}` : `mmio ${what}`;
  }
  return exit.type === 'internal-error' ? `internal-error ${exit.suberror}` : exit.type;
}

function build(program: L2Program, rounds: readonly PageRound[], place: Place): void {
  for (const [index, { run }] of rounds.entries()) {
    if (!run) continue;
    run(program, place);
    const next = rounds[index + 1];
    if (next?.at === 'active') program.sync(index);
    else if (next) program.vmcall();
  }
}

/** Runs one round to the sync or VMCALL behind it, or to where it cannot go on. */
export async function runRound(stage: Stage, at: PageRound['at'], signal: AbortSignal): Promise<string[]> {
  const { l2 } = stage;
  const exits: string[] = [];
  const enter = () => l2.enter({ policy: INSTRUCTION_POLICY, signal });
  try {
    let stop: L2Stop = at === 'entry' ? await enter() : await l2.continue({ signal });
    while (exits.length < LIMIT && stop.kind !== 'sync') {
      if (stop.kind === 'exit') {
        if (stop.exit.reason === 'vmcall') break;
        exits.push(exitText(stop.exit));
        stop = await enter();
      } else {
        exits.push(userspaceText(stop.exit));
        if (stop.exit.type !== 'mmio') break;
        stop = await l2.continue({ signal });
      }
    }
  } catch (error) {
    if (!(error instanceof VmxError)) throw error;
    exits.push(`${error.instruction} ${error.outcome}${error.error === undefined ? '' : ` ${error.error}`}`);
  }
  return exits;
}

async function run(context: SelftestContext, test: PageTest): Promise<{ observed: Observations }> {
  await using machine = await bootL1(context, test.vcpus ?? 1);
  const { vm, l1 } = machine;
  const page = new GuestPage(vm);
  const options = test.options({ l1, page });
  const controls = [...(test.needs ?? []), ...(options.controls ?? [])];
  const l2 = await l1.createL2({ ...options, controls }, (program) =>
    build(program, test.rounds, (...bytes) => l1.place(Uint8Array.from(bytes))),
  );
  const stage: Stage = { vm, l1, l2, page };
  await test.before?.(stage);
  const runsBefore = nestedRuns(l1);
  const exits: string[][] = [];
  const pages: Observed[] = [];
  for (const [index, { at, act, page: wanted }] of test.rounds.entries()) {
    try {
      await act?.(stage);
      exits.push(await runRound(stage, at, context.signal));
    } catch (error) {
      // An earlier round ended elsewhere than it should: what was seen until here says where
      if (!(error instanceof GuestProtocolError)) throw error;
      exits.push([error.message]);
      break;
    }
    if (wanted !== undefined) pages.push(test.look(stage, index));
  }
  return {
    observed: {
      exits,
      pages,
      executed: l2.progress.executed,
      checksum: hex(l2.progress.checksum),
      nestedRun: nestedRuns(l1) - runsBefore,
      ...test.after?.(stage),
    },
  };
}

function tableOf({ rounds, more = {} }: PageTest, kind: 'stock' | 'patched'): ExpectationTable {
  const program = new L2Program();
  const last = rounds.at(-1)!;
  const isStopped = pick(last.exits, kind).at(-1)?.startsWith('internal-error') ?? false;
  build(program, isStopped ? [...rounds.slice(0, -1), { ...last, run: () => {} }] : rounds, () => 0);
  const exits = rounds.map((round) => pick(round.exits, kind));
  const values = rounds.flatMap((round) => pick(round.values ?? [], kind));
  const vmExits = exits.flat().filter((text) => !/^(mmio|internal-error|VM\w+ VMfail)/.test(text)).length;
  // KVM checked these; that the CPU then refused them some versions count as runs, others not
  const refused = exits.flat().filter((text) => /^VM\w+ VMfailValid 7/.test(text)).length;
  const vmcalls = rounds.filter(({ run }, i) => run && rounds[i + 1]?.at !== 'active').length;
  return {
    exits,
    pages: rounds.flatMap(({ page }) => (page === undefined ? [] : [pick(page, kind)])),
    // A sync is counted when L2 is behind it.
    executed: program.length - (isStopped ? 1 : 0),
    checksum: hex(foldChecksum(values)),
    nestedRun: { min: vmExits + vmcalls, max: vmExits + vmcalls + refused },
    ...pick(more, kind),
  };
}

/** A test that is a list of rounds. */
export function pageTest(test: PageTest): Selftest {
  const { id, title, rounds, needs = [], requires = [] } = test;
  const differ =
    isBoth(test.more) || rounds.some(({ exits, values, page }) => [exits, values, page].some(isBoth));
  const controls = new Set<ControlName>(['secondary.enable-ept', ...needs]);
  return selftest({
    id,
    title,
    requires: [nestedVmx, binaryStats, ...[...controls].map(vmxControl), ...requires],
    expectations: differ
      ? { change: 'pages', stock: tableOf(test, 'stock'), patched: tableOf(test, 'patched') }
      : { any: tableOf(test, 'stock') },
    body: (context) => run(context, test),
  });
}
