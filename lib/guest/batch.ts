// SPDX-License-Identifier: Apache-2.0
import { abi, records } from './abi.ts';
import type { VmcsEntry } from './vmcs.ts';
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

/** Those that change which VMCS is current. */
const TRACKED: readonly CommandName[] = ['VMXON', 'VMXOFF', 'VMCLEAR', 'VMPTRLD'];
/** Those that leave nothing in their record when they succeed. */
const SILENT: readonly CommandName[] = [...TRACKED, 'VMWRITE', 'HOST_STATE'];

interface Kind {
  readonly name: CommandName;
  readonly code: number;
  readonly isTracked: boolean;
  /** The result of every one that succeeds, where that is always the same. */
  readonly done: CommandResult | undefined;
}

const NOTHING = Object.freeze([0n, 0n, 0n] as const);
const KINDS = Object.fromEntries(
  COMMAND_NAMES.map((name): [CommandName, Kind] => {
    const done: CommandResult = Object.freeze({ command: name, status: 'ok', values: NOTHING });
    const isTracked = TRACKED.includes(name);
    return [name, { name, code: abi[name], isTracked, done: SILENT.includes(name) ? done : undefined }];
  }),
) as Record<CommandName, Kind>;

interface Command {
  readonly kind: Kind;
  readonly args: readonly (bigint | number)[];
  flags: number;
}

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

/** The records of a vCPU's commands in guest memory (`commands` of its area), in words: a view is slow to make. */
export class CommandPages {
  readonly words: Uint32Array;
  readonly longs: BigUint64Array;

  constructor(memory: ArrayBuffer, gpa: number) {
    this.words = new Uint32Array(memory, gpa, abi.MAX_COMMANDS * RECORD);
    this.longs = new BigUint64Array(memory, gpa, (abi.MAX_COMMANDS * RECORD) / 2);
  }
}

// In 32-bit words; `op` and `flags` share one.
const { size, fields } = records.command;
const RECORD = size / 4;
const FLAGS_SHIFT = (fields.flags[0] - fields.op[0]) * 8;
const STATUS = fields.status[0] / 4;
const ARGS = fields.a[0] / 4;
const VALUES = fields.r[0] / 4;

const WORD = 2 ** 32;

/** An argument as it will be stored: a number where it can be one, which costs a tenth of a bigint, else 64 bits. */
function word(arg: bigint | number): bigint | number {
  return typeof arg === 'number' && arg >= 0 && Number.isSafeInteger(arg)
    ? arg
    : BigInt.asUintN(64, BigInt(arg));
}

function isZero(words: Uint32Array, at: number): boolean {
  for (let word = 0; word < 6; word += 1) if (words[at + word] !== 0) return false;
  return true;
}

/**
 * Commands for one L1 vCPU, executed in one go: L1 works through them without an exit to userspace of its own.
 * The first that fails ends the batch, unless {@link keepGoing} was called right after it was added.
 */
export class Batch {
  readonly #commands: Command[] = [];
  /** @internal Indices of the commands that change what is current. */
  readonly tracked: number[] = [];

  get length(): number {
    return this.#commands.length;
  }

  // Loops without iterators or closures, here and below: scripts build batches all the time, and in the lab on a CPU
  // that an emulator interprets.
  #add(name: CommandName, ...args: (bigint | number)[]): this {
    for (let a = 0; a < args.length; a += 1) args[a] = word(args[a]!);
    this.#push(name, [args]);
    return this;
  }

  #push(name: CommandName, every: readonly (readonly (bigint | number)[])[]): void {
    const commands = this.#commands;
    const kind = KINDS[name];
    if (commands.length + every.length > abi.MAX_COMMANDS) {
      throw new RangeError(`a batch holds at most ${abi.MAX_COMMANDS} commands`);
    }
    if (kind.isTracked) this.tracked.push(commands.length);
    for (let i = 0; i < every.length; i += 1) commands.push({ kind, args: every[i]!, flags: 0 });
  }

  /** The batch goes on even if the command added last fails. */
  keepGoing(): this {
    const last = this.#commands.at(-1);
    if (!last) throw new Error('keepGoing() comes after a command');
    last.flags = abi.COMMAND_KEEP_GOING;
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

  /** @internal A VMWRITE for each entry. */
  vmwrites(entries: readonly VmcsEntry[]): this {
    this.#push('VMWRITE', entries);
    return this;
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

  /** Writes the records where L1 takes them from: for who calls KVM_RUN himself. */
  store(pages: CommandPages): void {
    const { words, longs } = pages;
    const commands = this.#commands;
    words.fill(0, 0, commands.length * RECORD);
    for (let i = 0; i < commands.length; i += 1) {
      const { kind, args, flags } = commands[i]!;
      const at = i * RECORD;
      words[at] = kind.code | (flags << FLAGS_SHIFT);
      for (let a = 0; a < args.length; a += 1) {
        const arg = args[a]!;
        const place = at + ARGS + a * 2;
        if (typeof arg === 'bigint') longs[place / 2] = arg;
        else {
          words[place] = arg;
          if (arg >= WORD) words[place + 1] = arg / WORD;
        }
      }
    }
  }

  /** Reads the results back. */
  results(pages: CommandPages): CommandResult[] {
    const { words, longs } = pages;
    const results: CommandResult[] = [];
    for (let i = 0; i < this.#commands.length; i += 1) {
      const { name, done } = this.#commands[i]!.kind;
      const at = i * RECORD;
      const status = words[at + STATUS]!;
      if (done && status === abi.STATUS_OK) {
        results.push(done);
        continue;
      }
      const r = (at + VALUES) / 2;
      results.push({
        command: name,
        status: STATUSES[status] ?? 'bad-command',
        values: isZero(words, at + VALUES) ? NOTHING : [longs[r]!, longs[r + 1]!, longs[r + 2]!],
      });
    }
    return results;
  }

  /** @internal The first argument of a command, for tracking the current VMCS. */
  argument(index: number): number {
    return Number(this.#commands[index]?.args[0] ?? 0);
  }
}
