// SPDX-License-Identifier: Apache-2.0
import { checkInteger } from './check.ts';
import type { Exit } from './exit.ts';
import { native } from './loader.ts';
import type { MemoryRegion } from './region.ts';
import type { Vcpu } from './vcpu.ts';

/**
 * One step of a measured loop. Offsets and lengths in bytes; `piece` is what each call takes, default the whole
 * length at once.
 */
export type Step =
  /** KVM_RUN until the guest writes this port; an exit of any other kind is an error. */
  | { kind: 'run'; port: number }
  /** {@link MemoryRegion.discard}, piece by piece. */
  | { kind: 'discard'; region: MemoryRegion; offset?: number; length?: number; piece?: number }
  /** {@link MemoryRegion.unmapPages}, piece by piece. */
  | { kind: 'unmap-pages'; region: MemoryRegion; offset?: number; length?: number; piece?: number }
  /** {@link MemoryRegion.move}. */
  | { kind: 'move'; region: MemoryRegion; gpa: number }
  /** Deletes the slot and adds it again with the same memory: two KVM_SET_USER_MEMORY_REGION. */
  | { kind: 'replace'; region: MemoryRegion }
  /** In each page: count word 1 (64 bits) if it is not the round's number (from 1), write that to word 0. */
  | { kind: 'exchange'; region: MemoryRegion }
  /** KVM_GET_NESTED_STATE. */
  | { kind: 'get-nested-state' }
  /** KVM_SET_NESTED_STATE with what was got last. */
  | { kind: 'set-nested-state' };

export interface StepTimes {
  /** TSC ticks: `times[round * steps + step]`. */
  readonly times: Float64Array;
  /** Words that `exchange` found wrong. */
  readonly wrong: number;
}

const KINDS: readonly Step['kind'][] = [
  'run',
  'discard',
  'unmap-pages',
  'move',
  'replace',
  'exchange',
  'get-nested-state',
  'set-nested-state',
];

/**
 * Repeats steps natively on the calling thread and takes the time of each; JavaScript sees the times afterwards.
 * Nothing can stop it before its end, so the guest must be known to reach its port.
 * @param options.stateSize what KVM_CAP_NESTED_STATE says, for the nested-state steps
 * @throws KvmError, RangeError; UnexpectedExitError when KVM_RUN returned with something else than the port
 */
export function runSteps(
  vcpu: Vcpu | undefined,
  steps: readonly Step[],
  rounds: number,
  options: { stateSize?: number } = {},
): StepTimes {
  checkInteger('rounds', rounds, 0, 2 ** 32);
  const regions: MemoryRegion[] = [];
  const indexOf = (region: MemoryRegion): number => {
    const at = regions.indexOf(region);
    return at >= 0 ? at : regions.push(region) - 1;
  };
  const words = new BigUint64Array(steps.flatMap((step) => encode(step, indexOf)));
  const times = new Float64Array(steps.length * rounds);
  const [done, wrong, errno] = native().runSteps(
    vcpu?.handle ?? null,
    regions.map((region) => region.handle),
    words,
    rounds,
    times,
    new Uint8Array(options.stateSize ?? 0),
  );
  for (const step of steps) if (step.kind === 'move') step.region.movedTo(step.gpa);
  if (done === times.length) return { times, wrong };
  throw new UnexpectedExitError(vcpu!.lastExit(errno), Math.floor(done / steps.length));
}

/** The time-stamp counter of this CPU, as measured loops use it. */
export function timestamp(): bigint {
  return native().timestamp();
}

/** KVM_RUN in a measured loop came back with an exit nobody waits for. */
export class UnexpectedExitError extends Error {
  override readonly name = 'UnexpectedExitError';
  readonly exit: Exit;

  constructor(exit: Exit, round: number) {
    super(`KVM_RUN returned "${exit.type}" in round ${round} of a measured loop`);
    this.exit = exit;
  }
}

function encode(step: Step, indexOf: (region: MemoryRegion) => number): bigint[] {
  const words = (region: number, a = 0, b = 0, c = 0) =>
    [KINDS.indexOf(step.kind), region, a, b, c].map((word) => BigInt(word));
  switch (step.kind) {
    case 'run':
      return words(0, step.port);
    case 'discard':
    case 'unmap-pages': {
      const offset = checkInteger('offset', step.offset ?? 0, 0, step.region.size);
      const length = checkInteger('length', step.length ?? step.region.size - offset, 0);
      return words(indexOf(step.region), offset, length, checkInteger('piece', step.piece ?? length, 0));
    }
    case 'move':
      return words(indexOf(step.region), checkInteger('gpa', step.gpa, 0));
    case 'replace':
    case 'exchange':
      return words(indexOf(step.region));
    default:
      return words(0);
  }
}
