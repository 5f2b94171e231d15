// SPDX-License-Identifier: Apache-2.0
// Runs an L2 to the end of its program and writes down, exit by exit, what L1 saw.
import {
  type EnterMode,
  type ExitPolicy,
  type ExitReason,
  GuestFault,
  type L2,
  type VmExit,
  VmxError,
} from '../../guest/index.ts';
import type { Exit } from '../../kvm/index.ts';
import { hex } from './common.ts';

/** Exits that an instruction causes: L1 moves RIP past it and the instruction's length is part of the text. */
const INSTRUCTIONS: readonly ExitReason[] = [
  'cpuid',
  'hlt',
  'invd',
  'invlpg',
  'rdpmc',
  'rdtsc',
  'vmclear',
  'vmlaunch',
  'vmptrld',
  'vmptrst',
  'vmread',
  'vmresume',
  'vmwrite',
  'vmxoff',
  'vmxon',
  'control-register-access',
  'mov-dr',
  'io-instruction',
  'rdmsr',
  'wrmsr',
  'mwait',
  'monitor',
  'pause',
  'gdtr-idtr-access',
  'ldtr-tr-access',
  'invept',
  'rdtscp',
  'invvpid',
  'wbinvd',
  'xsetbv',
  'rdrand',
  'invpcid',
  'vmfunc',
  'rdseed',
  'xsaves',
  'xrstors',
  'apic-access',
];
export const INSTRUCTION_POLICY = Object.fromEntries(
  INSTRUCTIONS.map((reason) => [reason, 'advance']),
) as ExitPolicy;
const PAGE_SIZE = 4096;
const DELIVERS_ERROR_CODE = 1 << 11;
const VALID = 0x8000_0000;
const IA32_VMX_EPT_VPID_CAP = 0x48c;
const ADVANCED_INFORMATION = 1n << 22n;
/** A linear address that was translated. */
const TRANSLATED = 0x180n;
/** Of bits 11:9: what L2 touches is mapped by its own paging for the supervisor, writable, executable. */
const L2_PAGING = 0x400n;

export interface TraceOptions {
  readonly signal?: AbortSignal;
  /** Of every entry; default what the launch state asks for. */
  readonly mode?: EnterMode;
  /** Over the default: instructions advance, everything else just returns to L1. */
  readonly policy?: ExitPolicy;
  /** Pages by name: an address in one is written as `name+0x10`, so that texts do not depend on allocation. */
  readonly names?: Readonly<Record<string, number>>;
  /** L2 stopped in userspace and is active. */
  readonly onSync?: (value: number) => void | Promise<void>;
  /** L1 has the exit and is about to resume. Without it, an exit that neither policy nor instruction is ends it. */
  readonly onExit?: (exit: VmExit, index: number) => void | Promise<void>;
  /** Stop after this many exits although the program is not through; default 24. */
  readonly limit?: number;
}

export interface Trace {
  /** One text an exit; a failed entry, an exception nobody handles and an exit to userspace end it. */
  readonly exits: string[];
  readonly last: VmExit | undefined;
}

function address(value: bigint | number, names: Readonly<Record<string, number>>): string {
  const number = Number(value);
  for (const [name, base] of Object.entries(names)) {
    if (number >= base && number < base + PAGE_SIZE) return `${name}+${hex(number - base)}`;
  }
  return hex(value);
}

/** Bits 11:9 that the qualification must have: with advanced information for EPT violations (SDM vol. 3, 28.2.1). */
async function pagingBits(l2: L2, exit: VmExit): Promise<bigint> {
  if (exit.reason !== 'ept-violation' || (exit.qualification & TRANSLATED) !== TRANSLATED) return 0n;
  return (await l2.cpu.rdmsr(IA32_VMX_EPT_VPID_CAP)) & ADVANCED_INFORMATION ? L2_PAGING : 0n;
}

/**
 * An exit in one line: the reason, then what the SDM defines for it and is not zero.
 * @param known bits of an EPT violation's qualification that are as they must be, and left out
 */
export function exitText(
  exit: VmExit,
  names: Readonly<Record<string, number>> = {},
  known: bigint = 0n,
): string {
  const parts: string[] = [exit.reason];
  if (exit.entryFailure) parts.push('at-entry');
  const qualification = (): void => {
    if (exit.qualification !== 0n) parts.push(`q=${address(exit.qualification, names)}`);
  };
  switch (exit.reason) {
    case 'vmcall':
      return 'vmcall';
    case 'exception-or-nmi':
    case 'external-interrupt':
      if (exit.interruptionInfo !== 0) parts.push(`info=${hex(exit.interruptionInfo)}`);
      if (exit.interruptionInfo & DELIVERS_ERROR_CODE) parts.push(`code=${hex(exit.interruptionErrorCode)}`);
      qualification();
      break;
    case 'ept-violation':
      parts.push(`q=${hex(exit.qualification ^ known)}`, `gpa=${address(exit.guestPhysicalAddress, names)}`);
      break;
    case 'ept-misconfiguration':
      parts.push(`gpa=${address(exit.guestPhysicalAddress, names)}`);
      break;
    default:
      qualification();
  }
  if (!exit.entryFailure && exit.idtVectoringInfo >= VALID) {
    parts.push(`vectoring=${hex(exit.idtVectoringInfo)}`);
    if (exit.idtVectoringInfo & DELIVERS_ERROR_CODE) parts.push(`vcode=${hex(exit.idtVectoringErrorCode)}`);
  }
  const isInstruction = (INSTRUCTIONS as readonly string[]).includes(exit.reason);
  if (isInstruction && exit.reason !== 'apic-access') parts.push(`len=${exit.instructionLength}`);
  const at = address(exit.rip, names);
  if (!isInstruction && exit.reason !== 'ept-violation' && at.includes('+')) parts.push(`at=${at}`);
  return parts.join(' ');
}

/** What L2 reads from any port that neither L1 nor L0 knows. */
export const PORT_INPUT = 0x5a;

function userspaceText(exit: Exit): string {
  if (exit.type !== 'io') return `userspace ${exit.type}`;
  const { direction, port, data } = exit;
  if (direction === 'in') data.fill(PORT_INPUT);
  return `userspace ${direction} port=${hex(port)} data=${[...data].map(hex).join(',')}`;
}

/** Enters L2 until it executes VMCALL, or cannot go on. */
export async function trace(l2: L2, options: TraceOptions = {}): Promise<Trace> {
  const { names = {}, limit = 24, mode = 'auto' } = options;
  const run = options.signal ? { signal: options.signal } : {};
  const policy = { ...INSTRUCTION_POLICY, ...options.policy };
  const exits: string[] = [];
  let last: VmExit | undefined;
  if (l2.cpu.busy) return { exits: ['L1 stands in an earlier entry'], last };
  try {
    let stop = await l2.enter({ policy, mode, ...run });
    while (exits.length < limit) {
      if (stop.kind === 'sync') {
        exits.push(`sync ${stop.value}`);
        await options.onSync?.(stop.value);
        stop = await l2.continue(run);
      } else if (stop.kind === 'kvm-exit') {
        exits.push(userspaceText(stop.exit));
        if (stop.exit.type !== 'io') break;
        stop = await l2.continue(run);
      } else {
        last = stop.exit;
        exits.push(exitText(last, names, await pagingBits(l2, last)));
        if (last.reason === 'vmcall' || last.entryFailure) break;
        if (!options.onExit && !(last.reason in policy)) break;
        await options.onExit?.(last, exits.length - 1);
        stop = await l2.enter({ policy, mode, ...run });
      }
    }
  } catch (error) {
    if (error instanceof VmxError) {
      exits.push(
        `${error.instruction} ${error.outcome}${error.error === undefined ? '' : ` ${error.error}`}`,
      );
    } else if (error instanceof GuestFault) {
      exits.push(`${error.level} exception ${error.vector} code=${hex(error.errorCode)}`);
    } else {
      throw error;
    }
  }
  return { exits, last };
}
