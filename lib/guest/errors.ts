// SPDX-License-Identifier: Apache-2.0
import type { Exit } from '../kvm/index.ts';

const VECTORS: Readonly<Record<number, string>> = {
  0: '#DE',
  1: '#DB',
  3: '#BP',
  4: '#OF',
  5: '#BR',
  6: '#UD',
  7: '#NM',
  8: '#DF',
  10: '#TS',
  11: '#NP',
  12: '#SS',
  13: '#GP',
  14: '#PF',
  16: '#MF',
  17: '#AC',
  18: '#MC',
  19: '#XM',
  20: '#VE',
  21: '#CP',
};

export interface FaultInit {
  level: 'L1' | 'L2';
  vector: number;
  errorCode: bigint;
  rip: bigint;
  symbol: string | undefined;
  line: string | undefined;
  /** Meaningful for #PF only. */
  cr2?: bigint;
  /** What was being done, for the message. */
  during?: string;
}

/** An exception that L1 or L2 took. L1 is ready for the next command; L2 stays where it is. */
export class GuestFault extends Error {
  readonly level: 'L1' | 'L2';
  readonly vector: number;
  readonly errorCode: bigint;
  readonly rip: bigint;
  /** Where in the image, as `function+0x12`; undefined outside it. */
  readonly symbol: string | undefined;
  /** Line of the image's source, as `guests/l1/main.c:12`; undefined outside it. */
  readonly line: string | undefined;
  readonly cr2: bigint | undefined;

  constructor(init: FaultInit) {
    const name = VECTORS[init.vector] ?? `exception ${init.vector}`;
    const known = [init.symbol, init.line].filter((part) => part !== undefined).join(', ');
    const where = `RIP 0x${init.rip.toString(16)}${known ? ` (${known})` : ''}`;
    const address =
      init.vector === 14 && init.cr2 !== undefined ? `, address 0x${init.cr2.toString(16)}` : '';
    const during = init.during ? ` during ${init.during}` : '';
    super(
      `${name} in ${init.level}${during} at ${where}, error code 0x${init.errorCode.toString(16)}${address}`,
    );
    this.name = 'GuestFault';
    this.level = init.level;
    this.vector = init.vector;
    this.errorCode = init.errorCode;
    this.rip = init.rip;
    this.symbol = init.symbol;
    this.line = init.line;
    this.cr2 = init.cr2;
  }
}

/** VM-instruction error numbers, SDM vol. 3, 31.4. */
const INSTRUCTION_ERRORS: Readonly<Record<number, string>> = {
  1: 'VMCALL executed in VMX root operation',
  2: 'VMCLEAR with invalid physical address',
  3: 'VMCLEAR with VMXON pointer',
  4: 'VMLAUNCH with non-clear VMCS',
  5: 'VMRESUME with non-launched VMCS',
  6: 'VMRESUME after VMXOFF',
  7: 'VM entry with invalid control fields',
  8: 'VM entry with invalid host-state fields',
  9: 'VMPTRLD with invalid physical address',
  10: 'VMPTRLD with VMXON pointer',
  11: 'VMPTRLD with incorrect VMCS revision identifier',
  12: 'VMREAD or VMWRITE of an unsupported VMCS component',
  13: 'VMWRITE to a read-only VMCS component',
  15: 'VMXON executed in VMX root operation',
  16: 'VM entry with invalid executive-VMCS pointer',
  17: 'VM entry with non-launched executive VMCS',
  18: 'VM entry with executive-VMCS pointer not VMXON pointer',
  19: 'VMCALL with non-clear VMCS',
  20: 'VMCALL with invalid VM-exit control fields',
  22: 'VMCALL with incorrect MSEG revision identifier',
  23: 'VMXOFF under dual-monitor treatment of SMIs and SMM',
  24: 'VMCALL with invalid SMM-monitor features',
  25: 'VM entry with invalid VM-execution control fields in executive VMCS',
  26: 'VM entry with events blocked by MOV SS',
  28: 'invalid operand to INVEPT or INVVPID',
};

/** A VMX instruction of L1 that failed: VMfailInvalid, or VMfailValid with an error number. */
export class VmxError extends Error {
  readonly instruction: string;
  readonly outcome: 'VMfailInvalid' | 'VMfailValid';
  /** The VM-instruction error number; undefined after VMfailInvalid. */
  readonly error: number | undefined;

  constructor(instruction: string, error: number | undefined) {
    const outcome = error === undefined ? 'VMfailInvalid' : 'VMfailValid';
    const why =
      error === undefined ? 'no current VMCS' : `error ${error}: ${INSTRUCTION_ERRORS[error] ?? 'unknown'}`;
    super(`${instruction} failed in L1: ${outcome} (${why})`);
    this.name = 'VmxError';
    this.instruction = instruction;
    this.outcome = outcome;
    this.error = error;
  }
}

/** This CPU or kernel does not let L1 have what was asked for; a test skips on it. */
export class MissingControlError extends Error {
  /** The control, as `secondary.enable-vpid`, or `VMX` when there is none of it. */
  readonly control: string;

  constructor(control: string) {
    super(
      control === 'VMX'
        ? "L1's CPU has no VMX: nested VMX needs an Intel CPU and kvm_intel with nested=1"
        : `this CPU or kernel does not offer L1 the VMX control ${control}`,
    );
    this.name = 'MissingControlError';
    this.control = control;
  }
}

/** L1 or L2 did what this library did not expect, such as an exit to userspace in the middle of a command. */
export class GuestProtocolError extends Error {
  /** What KVM_RUN came back with, when that is the surprise. */
  readonly exit: Exit | undefined;

  constructor(message: string, exit?: Exit) {
    super(message);
    this.name = 'GuestProtocolError';
    this.exit = exit;
  }
}
