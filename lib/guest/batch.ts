// SPDX-License-Identifier: Apache-2.0
import { abi, records } from './abi.ts';
import { type VmcsField, vmcsEncoding } from './vmcs_fields.ts';

/** What VMfailInvalid, VMfailValid and an exception look like to a batch; `pending` was not reached. */
export type CommandStatus = 'pending' | 'ok' | 'vmfail-invalid' | 'vmfail-valid' | 'fault' | 'bad-command';

const STATUSES: readonly CommandStatus[] = [
  'pending',
  'ok',
  'vmfail-invalid',
  'vmfail-valid',
  'fault',
  'bad-command',
];

export interface CommandResult {
  /** The command's name in abi.h, such as `VMPTRLD`. */
  readonly command: string;
  readonly status: CommandStatus;
  /**
   * ok: what abi.h says for the command. vmfail-valid: the VM-instruction error number first. fault: vector, error
   * code, RIP.
   */
  readonly values: readonly [bigint, bigint, bigint];
}

interface Command {
  readonly name: CommandName;
  readonly args: readonly (bigint | number)[];
  readonly flags: number;
}

const COMMAND_NAMES = [
  'VMXON',
  'VMXOFF',
  'VMCLEAR',
  'VMPTRLD',
  'VMPTRST',
  'VMREAD',
  'VMWRITE',
  'HOST_STATE',
  'ENTER',
  'INVEPT',
  'INVVPID',
  'RDMSR',
  'WRMSR',
  'CPUID',
  'READ',
  'WRITE',
  'CALL',
  'X2APIC_ENABLE',
  'IPI',
  'HALT',
  'SPIN',
  'RDTSC',
] as const satisfies readonly (keyof typeof abi)[];
type CommandName = (typeof COMMAND_NAMES)[number];

export type EnterMode = 'auto' | 'launch' | 'resume';
const MODES = { auto: abi.ENTER_AUTO, launch: abi.ENTER_LAUNCH, resume: abi.ENTER_RESUME } as const;

export type AccessSize = 1 | 2 | 4 | 8;

/** INVEPT and INVVPID types, SDM vol. 3, 31.3. */
export const INVEPT = { singleContext: 1, allContexts: 2 } as const;
export const INVVPID = {
  individualAddress: 0,
  singleContext: 1,
  allContexts: 2,
  singleContextRetainingGlobals: 3,
} as const;

const WORD = 2 ** 32;
const NOTHING = Object.freeze([0n, 0n, 0n] as const);

/** An argument as it will be stored: a number where it can be one, which costs a tenth of a bigint, else 64 bits. */
function word(arg: bigint | number): bigint | number {
  return typeof arg === 'number' && arg >= 0 && Number.isSafeInteger(arg)
    ? arg
    : BigInt.asUintN(64, BigInt(arg));
}

function isZero(view: DataView, at: number): boolean {
  for (let word = 0; word < 6; word += 1) if (view.getUint32(at + word * 4, true) !== 0) return false;
  return true;
}

/**
 * Commands for one L1 vCPU, executed in one go: L1 works through them without an exit to userspace of its own.
 * The first that fails ends the batch, unless {@link keepGoing} was called right after it was added.
 */
export class Batch {
  readonly #commands: Command[] = [];

  get length(): number {
    return this.#commands.length;
  }

  #add(name: CommandName, ...args: (bigint | number)[]): this {
    if (this.#commands.length === abi.MAX_COMMANDS) {
      throw new RangeError(`a batch holds at most ${abi.MAX_COMMANDS} commands`);
    }
    this.#commands.push({ name, args: args.map(word), flags: 0 });
    return this;
  }

  /** The batch goes on even if the command added last fails. */
  keepGoing(): this {
    const last = this.#commands.pop();
    if (!last) throw new Error('keepGoing() comes after a command');
    this.#commands.push({ ...last, flags: abi.COMMAND_KEEP_GOING });
    return this;
  }

  /** The feature-control lock and the fixed bits of CR0 and CR4 first, then VMXON. */
  vmxon(region: number): this {
    return this.#add('VMXON', region);
  }

  vmxoff(): this {
    return this.#add('VMXOFF');
  }

  /** @param area the L2's area, whose launch state becomes "clear"; 0 for a bare VMCS */
  vmclear(vmcs: number, area = 0): this {
    return this.#add('VMCLEAR', vmcs, area);
  }

  vmptrld(vmcs: number): this {
    return this.#add('VMPTRLD', vmcs);
  }

  vmptrst(): this {
    return this.#add('VMPTRST');
  }

  vmread(field: VmcsField | number): this {
    return this.#add('VMREAD', vmcsEncoding(field));
  }

  vmwrite(field: VmcsField | number, value: bigint | number): this {
    return this.#add('VMWRITE', vmcsEncoding(field), value);
  }

  /**
   * The host-state area for the vCPU that executes this: of the current VMCS.
   * @param area an L2's area: of its eVMCS if it has one
   */
  hostState(area = 0): this {
    return this.#add('HOST_STATE', area);
  }

  /**
   * Runs the L2 of the current VMCS by the policy in its area.
   * @param limit entries after which to return whatever the policy says; 0 for no limit
   */
  enter(area: number, mode: EnterMode = 'auto', limit = 0): this {
    return this.#add('ENTER', area, MODES[mode], limit);
  }

  invept(type: number, eptPointer: bigint): this {
    return this.#add('INVEPT', type, eptPointer);
  }

  invvpid(type: number, vpid: number, address = 0n): this {
    return this.#add('INVVPID', type, vpid, address);
  }

  rdmsr(index: number): this {
    return this.#add('RDMSR', index);
  }

  wrmsr(index: number, value: bigint): this {
    return this.#add('WRMSR', index, value);
  }

  cpuid(leaf: number, subleaf = 0): this {
    return this.#add('CPUID', leaf, subleaf);
  }

  read(gpa: number, size: AccessSize): this {
    return this.#add('READ', gpa, size);
  }

  write(gpa: number, size: AccessSize, value: bigint | number): this {
    return this.#add('WRITE', gpa, size, value);
  }

  /** Calls code in L1's memory: a System V function with up to three arguments; nothing guards it. */
  call(address: number, ...args: (bigint | number)[]): this {
    if (args.length > 3) throw new RangeError('call() passes at most 3 arguments');
    return this.#add('CALL', address, ...args);
  }

  x2apicEnable(): this {
    return this.#add('X2APIC_ENABLE');
  }

  /** Writes the x2APIC's ICR: destination in bits 63:32, vector in 7:0. */
  ipi(icr: bigint): this {
    return this.#add('IPI', icr);
  }

  halt(): this {
    return this.#add('HALT');
  }

  /** PAUSE with interrupts on until memory holds the value. */
  spin(gpa: number, size: AccessSize, value: bigint | number): this {
    return this.#add('SPIN', gpa, size, value);
  }

  rdtsc(): this {
    return this.#add('RDTSC');
  }

  /** @internal Writes the records where L1 takes them from. */
  store(memory: ArrayBuffer, gpa: number): void {
    const { size, fields } = records.command;
    const length = this.#commands.length * size;
    new Uint8Array(memory, gpa, length).fill(0);
    const view = new DataView(memory, gpa, length);
    let at = 0;
    for (const { name, args, flags } of this.#commands) {
      view.setUint16(at + fields.op[0], abi[name], true);
      view.setUint16(at + fields.flags[0], flags, true);
      view.setUint32(at + fields.status[0], abi.STATUS_PENDING, true);
      for (let a = 0; a < args.length; a += 1) {
        const arg = args[a]!;
        const place = at + fields.a[0] + a * 8;
        if (typeof arg === 'number') {
          view.setUint32(place, arg % WORD, true);
          view.setUint32(place + 4, arg / WORD, true);
        } else view.setBigUint64(place, arg, true);
      }
      at += size;
    }
  }

  /** @internal Reads the results back. */
  results(memory: ArrayBuffer, gpa: number): CommandResult[] {
    const { size, fields } = records.command;
    const view = new DataView(memory, gpa, this.#commands.length * size);
    return this.#commands.map(({ name }, index) => {
      const at = index * size;
      const r = at + fields.r[0];
      return {
        command: name,
        status: STATUSES[view.getUint32(at + fields.status[0], true)] ?? 'bad-command',
        values: isZero(view, r)
          ? NOTHING
          : [view.getBigUint64(r, true), view.getBigUint64(r + 8, true), view.getBigUint64(r + 16, true)],
      };
    });
  }

  /** @internal The first argument of a command, for tracking the current VMCS. */
  argument(index: number): number {
    return Number(this.#commands[index]?.args[0] ?? 0);
  }
}
