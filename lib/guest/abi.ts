// SPDX-License-Identifier: Apache-2.0
// The TypeScript view of guests/abi.h, which is where every name is explained. test/guest/abi.test.ts compares
// each value, offset and size with what the C compiler says.

/** Constants of the host-L1-L2 protocol, by their names in abi.h without the prefix. */
export const abi = {
  ABI_MAGIC: 0x31786d766e756e31n,
  ABI_VERSION: 2,
  L1_BASE: 0x100000,
  L2_BASE: 0x200000,
  PORT_L1_DONE: 0xe00,
  PORT_L1_FAULT: 0xe04,
  PORT_L2_SYNC: 0xe08,
  PORT_L2_FAULT: 0xe0c,
  SELECTOR_CODE: 8,
  SELECTOR_DATA: 16,
  SELECTOR_TSS: 24,
  MAX_COMMANDS: 1024,
  EXIT_REASONS: 80,
  CHECKSUM_SEED: 0xcbf29ce484222325n,
  CHECKSUM_PRIME: 0x100000001b3n,
  VMXON: 1,
  VMXOFF: 2,
  VMCLEAR: 3,
  VMPTRLD: 4,
  VMPTRST: 5,
  VMREAD: 6,
  VMWRITE: 7,
  HOST_STATE: 8,
  ENTER: 9,
  INVEPT: 10,
  INVVPID: 11,
  RDMSR: 12,
  WRMSR: 13,
  CPUID: 14,
  READ: 15,
  WRITE: 16,
  CALL: 17,
  X2APIC_ENABLE: 18,
  IPI: 19,
  HALT: 20,
  SPIN: 21,
  RDTSC: 22,
  STATUS_PENDING: 0,
  STATUS_OK: 1,
  STATUS_VMFAIL_INVALID: 2,
  STATUS_VMFAIL_VALID: 3,
  STATUS_FAULT: 4,
  STATUS_BAD_COMMAND: 5,
  COMMAND_KEEP_GOING: 1,
  ENTER_AUTO: 0,
  ENTER_LAUNCH: 1,
  ENTER_RESUME: 2,
  POLICY_RETURN: 0,
  POLICY_SKIP: 1,
  POLICY_RESUME: 2,
  POLICY_ADVANCE: 3,
  OP_END: 0,
  OP_READ: 1,
  OP_WRITE: 2,
  OP_RDMSR: 3,
  OP_WRMSR: 4,
  OP_IN: 5,
  OP_OUT: 6,
  OP_CPUID: 7,
  OP_READ_CR8: 8,
  OP_WRITE_CR8: 9,
  OP_VMCALL: 10,
  OP_VMCALL_REGS: 11,
  OP_HLT: 12,
  OP_SPIN: 13,
  OP_DELAY: 14,
  OP_PAUSE: 15,
  OP_LOOP: 16,
  OP_FOLD: 17,
  OP_CHECKSUM: 18,
  OP_SYNC: 19,
  OP_CALL: 20,
  OP_CLI: 21,
  OP_STI: 22,
  LEVEL_L1: 1,
  LEVEL_L2: 2,
} as const;

/** Ports that KVM_RUN returns with, for loops that make KVM_RUN themselves. */
export const abiPorts = {
  done: abi.PORT_L1_DONE,
  sync: abi.PORT_L2_SYNC,
  l1Fault: abi.PORT_L1_FAULT,
  l2Fault: abi.PORT_L2_FAULT,
} as const;

/** Offset and size in bytes of each field, and the size of each record. */
export const records = {
  fault: {
    size: 56,
    fields: {
      count: [0, 8],
      level: [8, 4],
      vector: [12, 4],
      error_code: [16, 8],
      rip: [24, 8],
      rsp: [32, 8],
      rflags: [40, 8],
      cr2: [48, 8],
    },
  },
  command: {
    size: 64,
    fields: {
      op: [0, 2],
      flags: [2, 2],
      status: [4, 4],
      a: [8, 32],
      r: [40, 24],
    },
  },
  cpu: {
    size: 1352,
    fields: {
      recover: [0, 8],
      frame_scratch: [8, 8],
      frame_l2: [16, 8],
      frame_rsp: [24, 8],
      stack_top: [32, 8],
      self: [40, 8],
      magic: [48, 8],
      version: [56, 4],
      index: [60, 4],
      commands: [64, 8],
      batch_count: [72, 4],
      batch_done: [76, 4],
      ist_top: [80, 8],
      x2apic: [88, 4],
      reserved: [92, 4],
      fault: [96, 56],
      gdt: [152, 64],
      tss: [216, 104],
      irq_counts: [320, 1024],
      evmcs_map: [1344, 8],
    },
  },
  exit: {
    size: 112,
    fields: {
      reason: [0, 4],
      intr_info: [4, 4],
      intr_error_code: [8, 4],
      idt_vectoring_info: [12, 4],
      idt_vectoring_error_code: [16, 4],
      instruction_length: [20, 4],
      instruction_info: [24, 4],
      activity_state: [28, 4],
      interruptibility: [32, 4],
      reserved: [36, 4],
      qualification: [40, 8],
      guest_linear_address: [48, 8],
      guest_physical_address: [56, 8],
      rip: [64, 8],
      rsp: [72, 8],
      rflags: [80, 8],
      cr0: [88, 8],
      cr3: [96, 8],
      cr4: [104, 8],
    },
  },
  l2: {
    size: 1040,
    fields: {
      regs: [0, 128],
      launched: [128, 4],
      reserved: [132, 4],
      entries: [136, 8],
      other_exits: [144, 8],
      tsc_min: [152, 8],
      tsc_max: [160, 8],
      tsc_total: [168, 8],
      exit: [176, 112],
      policy: [288, 80],
      counts: [368, 640],
      samples: [1008, 8],
      samples_room: [1016, 8],
      samples_count: [1024, 8],
      evmcs: [1032, 8],
    },
  },
  op: {
    size: 32,
    fields: {
      code: [0, 4],
      size: [4, 4],
      a: [8, 8],
      b: [16, 8],
      c: [24, 8],
    },
  },
  control: {
    size: 1144,
    fields: {
      self: [0, 8],
      ops: [8, 8],
      pc: [16, 4],
      done: [20, 4],
      executed: [24, 8],
      folds: [32, 8],
      checksum: [40, 8],
      last: [48, 8],
      fault: [56, 56],
      irq_counts: [112, 1024],
      eoi: [1136, 8],
    },
  },
  bench: {
    size: 80,
    fields: {
      samples: [0, 8],
      turns: [8, 8],
      operand: [16, 8],
      start: [24, 8],
      pages: [32, 8],
      share: [40, 8],
      next: [48, 8],
      touched: [56, 8],
      round: [64, 8],
      wrong: [72, 8],
    },
  },
} as const;

export type RecordName = keyof typeof records;
export type FieldName<R extends RecordName> = keyof (typeof records)[R]['fields'] & string;

/** One record in guest memory, little-endian, read and written in place. */
export class RecordView<R extends RecordName> {
  readonly gpa: number;
  readonly #view: DataView;
  readonly #fields: Readonly<Record<string, readonly [offset: number, size: number]>>;

  /** @param memory guest memory whose first byte is guest-physical address 0 */
  constructor(memory: ArrayBuffer, record: R, gpa: number) {
    this.gpa = gpa;
    this.#view = new DataView(memory, gpa, records[record].size);
    this.#fields = records[record].fields;
  }

  u8(field: FieldName<R>, index = 0): number {
    return this.#view.getUint8(this.#fields[field]![0] + index);
  }

  u16(field: FieldName<R>, index = 0): number {
    return this.#view.getUint16(this.#fields[field]![0] + index * 2, true);
  }

  u32(field: FieldName<R>, index = 0): number {
    return this.#view.getUint32(this.#fields[field]![0] + index * 4, true);
  }

  u64(field: FieldName<R>, index = 0): bigint {
    return this.#view.getBigUint64(this.#fields[field]![0] + index * 8, true);
  }

  setU8(field: FieldName<R>, value: number, index = 0): void {
    this.#view.setUint8(this.#fields[field]![0] + index, value);
  }

  setU16(field: FieldName<R>, value: number, index = 0): void {
    this.#view.setUint16(this.#fields[field]![0] + index * 2, value, true);
  }

  setU32(field: FieldName<R>, value: number, index = 0): void {
    this.#view.setUint32(this.#fields[field]![0] + index * 4, value, true);
  }

  setU64(field: FieldName<R>, value: bigint | number, index = 0): void {
    this.#view.setBigUint64(this.#fields[field]![0] + index * 8, BigInt(value), true);
  }

  /** All of an array of bytes, in place. */
  bytes(field: FieldName<R>): Uint8Array {
    const [offset, size] = this.#fields[field]!;
    return new Uint8Array(this.#view.buffer, this.gpa + offset, size);
  }

  /** All of an array as 32-bit words, in place; of a 64-bit number the lower half comes first. */
  words(field: FieldName<R>): Uint32Array {
    const [offset, size] = this.#fields[field]!;
    return new Uint32Array(this.#view.buffer, this.gpa + offset, size / 4);
  }

  /** The record nested in `field`. */
  inner<I extends RecordName>(field: FieldName<R>, record: I): RecordView<I> {
    return new RecordView(this.#view.buffer as ArrayBuffer, record, this.gpa + this.#fields[field]![0]);
  }
}
