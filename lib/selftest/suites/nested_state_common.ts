// SPDX-License-Identifier: Apache-2.0
// struct kvm_nested_state as data, and an L1 that goes on wherever its state was put.
import {
  abiPorts,
  Batch,
  CommandPages,
  exitReasonName,
  type L1,
  type L2,
  RecordView,
} from '../../guest/index.ts';
import { KvmError, KvmUnsupportedError, type Vcpu, type VcpuSnapshot } from '../../kvm/index.ts';
import { hex } from './common.ts';

export const HEADER = 128;
/** With a vmcs12, and with the shadow vmcs12 that it links to. */
export const WITH_VMCS12 = HEADER + 4096;
export const WITH_SHADOW = WITH_VMCS12 + 4096;
export const NONE = 0xffff_ffff_ffff_ffffn;

/** KVM_STATE_NESTED_*. */
export const FLAG = { guestMode: 1, runPending: 2, evmcs: 4, mtfPending: 8 } as const;
/** KVM_STATE_NESTED_SMM_*. */
export const SMM = { guestMode: 1, vmxon: 2 } as const;
/** KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE. */
export const DEADLINE = 1;

/** Where struct vmcs12 has the guest-linear address: what the CPU last wrote on an exit, which no restore can redo. */
const GUEST_LINEAR_ADDRESS = HEADER + 416;

const FIELDS = {
  flags: [0, 2],
  format: [2, 2],
  size: [4, 4],
  vmxon: [8, 8],
  vmcs12: [16, 8],
  smmFlags: [24, 2],
  vmxFlags: [28, 4],
  deadline: [32, 8],
  /** Of the vmcs12 that follows the header. */
  revision: [128, 4],
} as const;
export type StateField = keyof typeof FIELDS;
export type StatePatch = Partial<Record<StateField, number | bigint>>;

export function stateField(bytes: Uint8Array, name: StateField): bigint {
  const [at, size] = FIELDS[name];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (size === 8) return view.getBigUint64(at, true);
  return BigInt(size === 4 ? view.getUint32(at, true) : view.getUint16(at, true));
}

/** A copy with other fields. */
export function withFields(bytes: Uint8Array, patch: StatePatch): Uint8Array {
  const copy = bytes.slice();
  const view = new DataView(copy.buffer);
  for (const [name, value] of Object.entries(patch) as [StateField, number | bigint][]) {
    const [at, size] = FIELDS[name];
    if (size === 8) view.setBigUint64(at, BigInt.asUintN(64, BigInt(value)), true);
    else if (size === 4) view.setUint32(at, Number(value), true);
    else view.setUint16(at, Number(value), true);
  }
  return copy;
}

/** A header that says "never executed VMXON". */
export function outsideVmx(): Uint8Array {
  return withFields(new Uint8Array(HEADER), { size: HEADER, vmxon: NONE, vmcs12: NONE });
}

/** Adds and removes flags. */
export function withFlags(bytes: Uint8Array, add: number, remove = 0): Uint8Array {
  return withFields(bytes, { flags: (Number(stateField(bytes, 'flags')) & ~remove) | add });
}

function names(bits: number, table: Readonly<Record<string, number>>): string {
  const known = Object.entries(table).filter(([, bit]) => bits & bit);
  const rest = known.reduce((left, [, bit]) => left & ~bit, bits);
  return [...known.map(([name]) => name), ...(rest === 0 ? [] : [hex(rest)])].join('+');
}

/** What a state says, in one line: `size=4224 flags=guestMode vmxon=region vmcs12=l2`. */
export function stateText(bytes: Uint8Array, places: Readonly<Record<string, number>> = {}): string {
  const number = (name: StateField): number => Number(stateField(bytes, name));
  const where = (name: StateField): string => {
    const value = stateField(bytes, name);
    return Object.entries(places).find(([, gpa]) => BigInt(gpa) === value)?.[0] ?? hex(value);
  };
  const parts = [`size=${number('size')}`];
  if (number('size') !== bytes.length) parts.push(`bytes=${bytes.length}`);
  if (number('flags')) parts.push(`flags=${names(number('flags'), FLAG)}`);
  if (number('format')) parts.push(`format=${number('format')}`);
  for (const name of ['vmxon', 'vmcs12'] as const) {
    if (stateField(bytes, name) !== NONE) parts.push(`${name}=${where(name)}`);
  }
  if (number('smmFlags')) parts.push(`smm=${names(number('smmFlags'), SMM)}`);
  if (number('vmxFlags')) parts.push(`vmx=${names(number('vmxFlags'), { deadline: DEADLINE })}`);
  return parts.join(' ');
}

/** KVM_SET_NESTED_STATE: `ok`, or the errno's name. */
export function trySet(vcpu: Vcpu, bytes: Uint8Array): string {
  return outcome(() => vcpu.setNestedState(bytes));
}

/** `ok`, or the name of the errno KVM answered with. */
export function outcome(action: () => unknown): string {
  try {
    action();
    return 'ok';
  } catch (error) {
    if (error instanceof KvmError && !(error instanceof KvmUnsupportedError)) return error.code;
    throw error;
  }
}

const BLOCK = 512;

/** Offsets of bytes that differ, in a nested state the guest-linear address apart. */
export function differing(a: Uint8Array, b: Uint8Array, isNested = false): number[] {
  const isNoise = (at: number) => isNested && at >= GUEST_LINEAR_ADDRESS && at < GUEST_LINEAR_ADDRESS + 8;
  const found: number[] = [];
  // A block at once: states that should be equal are, and a loop over them takes the emulator half a second.
  for (let from = 0; from < Math.max(a.length, b.length); from += BLOCK) {
    if (Buffer.compare(a.subarray(from, from + BLOCK), b.subarray(from, from + BLOCK)) === 0) continue;
    for (let at = from; at < Math.min(from + BLOCK, Math.max(a.length, b.length)); at += 1) {
      if (a[at] !== b[at] && !isNoise(at)) found.push(at);
    }
  }
  return found;
}

/** Parts of two snapshots that differ, with the offset of the first byte; LAPIC timer and clocks go on and are not compared. */
export function differences(a: VcpuSnapshot, b: VcpuSnapshot): string[] {
  const parts = (one: VcpuSnapshot) => ({
    nested: one.nested ?? new Uint8Array(),
    regs: one.regs,
    sregs: one.sregs.bytes,
    events: one.events,
    xsave: one.xsave,
    debugRegs: one.debugRegs,
    mpState: one.mpState,
  });
  const left = parts(a);
  const right = parts(b);
  return (Object.keys(left) as (keyof typeof left)[]).flatMap((name) => {
    const at = differing(left[name], right[name], name === 'nested');
    return at.length === 0 ? [] : [`${name}: ${at.length} bytes from ${at[0]}`];
  });
}

/** The same for two bare nested states: how many bytes differ. */
export function stateDiffers(a: Uint8Array, b: Uint8Array): number {
  return differing(a, b, true).length;
}

/** L1 and its L2 in whatever VM and on whatever vCPU their state was restored. */
export class Copy {
  readonly vcpu: Vcpu;
  /** Of the guest, from GPA 0. */
  readonly memory: ArrayBuffer;
  readonly #l2: L2;
  readonly #cpu: RecordView<'cpu'>;
  readonly #area: RecordView<'l2'>;
  readonly #control: RecordView<'control'>;

  constructor(vcpu: Vcpu, memory: ArrayBuffer, l2: L2) {
    this.vcpu = vcpu;
    this.memory = memory;
    this.#l2 = l2;
    this.#cpu = new RecordView(memory, 'cpu', l2.cpu.area.gpa);
    this.#area = new RecordView(memory, 'l2', l2.area.gpa);
    this.#control = new RecordView(memory, 'control', l2.control.gpa);
  }

  /** Runs to the next report: of L1, of L2, or an exit nobody asked for. */
  async run(signal: AbortSignal): Promise<string> {
    const exit = await this.vcpu.run({ signal });
    if (exit.type === 'internal-error') return `internal-error ${exit.suberror}`;
    if (exit.type !== 'io' || exit.direction !== 'out') return exit.type;
    switch (exit.port) {
      case abiPorts.done:
        return this.#report();
      case abiPorts.sync:
        return `sync ${exit.data[0]}`;
      case abiPorts.l1Fault:
        return `exception ${exit.data[0]} in L1`;
      case abiPorts.l2Fault:
        return `exception ${exit.data[0]} in L2`;
      default:
        return `out ${hex(exit.port)}`;
    }
  }

  /** L1's answer to the batch of one command that it has worked through. */
  #report(): string {
    const status = new RecordView(this.memory, 'command', Number(this.#cpu.u64('commands'))).u32('status');
    if (status !== 1) return `command status ${status}`;
    const exit = this.#area.inner('exit', 'exit');
    const info = exit.u32('intr_info');
    const reason = exitReasonName(exit.u32('reason') & 0xffff);
    return info >>> 31 ? `${reason} info=${hex(info)}` : reason;
  }

  /** Has L1, which waits for commands, enter L2: VMPTRLD first when the VMCS is not current. */
  async enter(signal: AbortSignal, load = false): Promise<string> {
    if (load) {
      const loaded = await this.#command(new Batch().vmptrld(this.#l2.vmcs), signal);
      if (loaded.startsWith('command status')) return loaded;
    }
    return this.#command(new Batch().enter(this.#area.gpa), signal);
  }

  async #command(batch: Batch, signal: AbortSignal): Promise<string> {
    batch.store(new CommandPages(this.memory, Number(this.#cpu.u64('commands'))));
    this.#cpu.setU32('batch_count', batch.length);
    return this.run(signal);
  }

  /** Where the last exit to L1 left L2, and what L2 has done. */
  get rip(): bigint {
    return this.#area.inner('exit', 'exit').u64('rip');
  }

  get done(): boolean {
    return this.#control.u32('done') !== 0;
  }

  get executed(): number {
    return Number(this.#control.u64('executed'));
  }

  get checksum(): bigint {
    return this.#control.u64('checksum');
  }

  interruptCount(vector: number): number {
    return this.#control.u32('irq_counts', vector);
  }

  /**
   * Runs to the end of L2's program and writes each stop down.
   * @param isActive L2 is active, or its entry is; else L1 waits for commands
   */
  async finish(signal: AbortSignal, isActive: boolean, load = false): Promise<string[]> {
    const stops: string[] = [];
    let running = isActive;
    while (stops.length < 16) {
      const stop = running ? await this.run(signal) : await this.enter(signal, load && stops.length === 0);
      stops.push(stop);
      if (this.done) break;
      running = stop.startsWith('sync') || stop.startsWith('out');
      if (!running && stop !== 'vmcall' && !stop.startsWith('external-interrupt')) break;
    }
    return stops;
  }
}

/** The names of the places a state speaks of. */
export function placesOf(l1: L1, l2: L2): Record<string, number> {
  return { region: l1.cpu(0).vmxonRegion, l2: l2.vmcs };
}
