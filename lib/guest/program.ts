// SPDX-License-Identifier: Apache-2.0
import { abi, RecordView, records } from './abi.ts';

type Value = bigint | number;

interface Op {
  readonly code: number;
  readonly size: number;
  readonly a: bigint;
  readonly b: bigint;
  readonly c: bigint;
}

/** What L2's checksum is after folding these values, in this order, from the start. */
export function foldChecksum(values: Iterable<Value>, start: bigint = abi.CHECKSUM_SEED): bigint {
  let checksum = start;
  for (const value of values) {
    checksum = BigInt.asUintN(64, (checksum ^ BigInt.asUintN(64, BigInt(value))) * abi.CHECKSUM_PRIME);
  }
  return checksum;
}

/** What {@link L2Program.vmcallRegs} folds when every register survived. */
export function vmcallRegsValues(seed: Value): bigint[] {
  const base = BigInt(seed);
  return Array.from({ length: 16 }, (_, i) => BigInt.asUintN(64, base + BigInt(i))).filter((_, i) => i !== 4);
}

/**
 * The operations an L2 executes, in order. Values that operations read are folded into a checksum; after the last
 * operation L2 executes VMCALL for ever.
 */
export class L2Program {
  readonly #ops: Op[] = [];

  /** Operations so far: the index of the next. */
  get length(): number {
    return this.#ops.length;
  }

  /** @internal Bytes it needs in guest memory, with the end. */
  get byteLength(): number {
    return (this.#ops.length + 1) * records.op.size;
  }

  #add(code: number, a: Value = 0, b: Value = 0, size = 0, c: Value = 0): this {
    const u64 = (value: Value) => BigInt.asUintN(64, BigInt(value));
    this.#ops.push({ code, size, a: u64(a), b: u64(b), c: u64(c) });
    return this;
  }

  read8(address: number): this {
    return this.#add(abi.OP_READ, address, 0, 1);
  }

  read16(address: number): this {
    return this.#add(abi.OP_READ, address, 0, 2);
  }

  read32(address: number): this {
    return this.#add(abi.OP_READ, address, 0, 4);
  }

  read64(address: number): this {
    return this.#add(abi.OP_READ, address, 0, 8);
  }

  write8(address: number, value: Value): this {
    return this.#add(abi.OP_WRITE, address, value, 1);
  }

  write16(address: number, value: Value): this {
    return this.#add(abi.OP_WRITE, address, value, 2);
  }

  write32(address: number, value: Value): this {
    return this.#add(abi.OP_WRITE, address, value, 4);
  }

  write64(address: number, value: Value): this {
    return this.#add(abi.OP_WRITE, address, value, 8);
  }

  rdmsr(index: number): this {
    return this.#add(abi.OP_RDMSR, index);
  }

  wrmsr(index: number, value: Value): this {
    return this.#add(abi.OP_WRMSR, index, value);
  }

  in8(port: number): this {
    return this.#add(abi.OP_IN, port, 0, 1);
  }

  in16(port: number): this {
    return this.#add(abi.OP_IN, port, 0, 2);
  }

  in32(port: number): this {
    return this.#add(abi.OP_IN, port, 0, 4);
  }

  out8(port: number, value: Value): this {
    return this.#add(abi.OP_OUT, port, value, 1);
  }

  out16(port: number, value: Value): this {
    return this.#add(abi.OP_OUT, port, value, 2);
  }

  out32(port: number, value: Value): this {
    return this.#add(abi.OP_OUT, port, value, 4);
  }

  /** Folds EAX, EBX, ECX and EDX. */
  cpuid(leaf: number, subleaf = 0): this {
    return this.#add(abi.OP_CPUID, leaf, subleaf);
  }

  readCr8(): this {
    return this.#add(abi.OP_READ_CR8);
  }

  writeCr8(value: Value): this {
    return this.#add(abi.OP_WRITE_CR8, value);
  }

  /** @param value in RAX */
  vmcall(value: Value = 0): this {
    return this.#add(abi.OP_VMCALL, value);
  }

  /** Fills the 15 general registers (all but RSP) from a seed, VMCALLs, and folds what they hold afterwards. */
  vmcallRegs(seed: Value): this {
    return this.#add(abi.OP_VMCALL_REGS, seed);
  }

  hlt(): this {
    return this.#add(abi.OP_HLT);
  }

  /** PAUSE until memory holds the value. */
  spin(address: number, size: 1 | 2 | 4 | 8, value: Value): this {
    return this.#add(abi.OP_SPIN, address, value, size);
  }

  /** Waits this many TSC ticks. */
  delay(ticks: Value): this {
    return this.#add(abi.OP_DELAY, ticks);
  }

  /** Executes PAUSE this many times. */
  pause(times: number): this {
    return this.#add(abi.OP_PAUSE, times);
  }

  /** Executes what `body` adds this many times (at least once); loops nest. */
  loop(times: number, body: (program: this) => unknown): this {
    if (!Number.isSafeInteger(times) || times < 1) throw new RangeError('a loop runs at least once');
    const start = this.#ops.length;
    body(this);
    return this.#add(abi.OP_LOOP, start, times - 1);
  }

  fold(value: Value): this {
    return this.#add(abi.OP_FOLD, value);
  }

  /** Folds memory as 8-byte words. */
  checksum(address: number, words: number): this {
    return this.#add(abi.OP_CHECKSUM, address, words);
  }

  /** Stops in userspace with L2 active; `value` (32 bits) comes back in the stop. */
  sync(value = 0): this {
    return this.#add(abi.OP_SYNC, value);
  }

  /** Calls code in L2's memory, a System V function with up to two arguments, and folds RAX. */
  call(address: number, b: Value = 0, c: Value = 0): this {
    return this.#add(abi.OP_CALL, address, b, 0, c);
  }

  cli(): this {
    return this.#add(abi.OP_CLI);
  }

  sti(): this {
    return this.#add(abi.OP_STI);
  }

  /** @internal */
  store(memory: ArrayBuffer, gpa: number): void {
    for (const [i, op] of this.#ops.entries()) {
      const record = new RecordView(memory, 'op', gpa + i * records.op.size);
      record.setU32('code', op.code);
      record.setU32('size', op.size);
      record.setU64('a', op.a);
      record.setU64('b', op.b);
      record.setU64('c', op.c);
    }
    new RecordView(memory, 'op', gpa + this.#ops.length * records.op.size).setU32('code', abi.OP_END);
  }
}
