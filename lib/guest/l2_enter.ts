// SPDX-License-Identifier: Apache-2.0
// What L2.enter takes and gives.
import type { Exit } from '../kvm/index.ts';
import type { EnterMode } from './batch.ts';
import type { ExitReason } from './exit_reasons.ts';
import type { RunOptions } from './l1_vcpu.ts';
import type { VmExit } from './vm_exit.ts';

/**
 * What L1 does at an exit, after counting it: `return` ends the enter, `advance` also moves RIP past the instruction,
 * `skip` moves RIP and resumes, `resume` just resumes.
 */
export type ExitAction = 'return' | 'advance' | 'skip' | 'resume';
export type ExitPolicy = Partial<Record<ExitReason, ExitAction>>;

export interface EnterOptions extends RunOptions {
  /** VMLAUNCH, VMRESUME, or what the launch state asks for (the default). */
  mode?: EnterMode;
  /** By exit reason; of those not named, `vmcall` is `advance` and all others are `return`. */
  policy?: ExitPolicy;
  /** Return after this many VM entries whatever the policy says. */
  limit?: number;
  /** Run it on this L1 vCPU, moving the VMCS there first. */
  on?: number;
}

export type L2Stop =
  /** L2 wrote the sync port and is active (nested guest mode). */
  | { kind: 'sync'; value: number }
  /** A VM exit that ended the enter. `counts` are those of this L2 so far; `entries` of this enter. */
  | { kind: 'exit'; exit: VmExit; entries: number; counts: Map<string, number> }
  /** KVM_RUN came back with something L2 did not mean for userspace. */
  | { kind: 'kvm-exit'; exit: Exit };

/** Proof of execution, from L2 itself. */
export interface L2Progress {
  /** Operations completed. */
  executed: number;
  /** Index of the operation under way. */
  pc: number;
  /** The program's end was reached. */
  done: boolean;
  /** Values folded into the checksum. */
  folds: number;
  checksum: bigint;
  /** The value folded last. */
  last: bigint;
}
