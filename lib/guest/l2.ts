// SPDX-License-Identifier: Apache-2.0

import { abi, RecordView } from './abi.ts';
import type { PostedInterruptDescriptor, VirtualApicPage } from './apic_pages.ts';
import { Batch } from './batch.ts';
import type { VmxControls } from './controls.ts';
import { GuestProtocolError } from './errors.ts';
import { encodeEvent, type InjectedEvent } from './event.ts';
import { EVMCS_REVISION, Evmcs } from './evmcs.ts';
import { type ExitReason, exitReasonCode, exitReasonName } from './exit_reasons.ts';
import type { IoBitmap } from './io_bitmap.ts';
import type { L1 } from './l1.ts';
import type { L1Vcpu, RunOptions, VcpuStop } from './l1_vcpu.ts';
import type { EnterOptions, ExitPolicy, L2Progress, L2Stop } from './l2_enter.ts';
import { type L2Options, L2Structures } from './l2_options.ts';
import { controlFields, guestState } from './l2_vmcs.ts';
import { PAGE_SIZE } from './layout.ts';
import type { MsrBitmap } from './msr_bitmap.ts';
import type { L2Program } from './program.ts';
import { readExit } from './vm_exit.ts';
import { Vmcs, type VmcsAccess, vmcsEntries } from './vmcs.ts';
import { vmcsAccess } from './vmcs_access.ts';
import type { VmcsField } from './vmcs_fields.ts';

const STACK_PAGES = 2;

const ACTIONS = {
  return: abi.POLICY_RETURN,
  advance: abi.POLICY_ADVANCE,
  skip: abi.POLICY_SKIP,
  resume: abi.POLICY_RESUME,
} as const;
/** A hypercall is over when L1 has seen it; any other exit is left to whoever reads it. */
const DEFAULT_POLICY: ExitPolicy = { vmcall: 'advance' };

/** A nested guest: a VMCS, its memory, and where it is loaded. */
export class L2 {
  readonly l1: L1;
  readonly options: L2Options;
  readonly program: L2Program;
  /** Guest-physical address of the VMCS. */
  readonly vmcs: number;
  /** The L2 area of abi.h: registers, policy, counts. */
  readonly area: RecordView<'l2'>;
  /** L2's own control page. */
  readonly control: RecordView<'control'>;
  /** The fields of its VMCS by name. */
  readonly fields: Vmcs;
  /** The enlightened VMCS, with `evmcs`: its memory, whatever the state of L2. */
  readonly evmcs: Evmcs | undefined;
  /** EPT, bitmaps, APIC pages and MSR lists. */
  readonly structures: L2Structures;
  readonly #access: VmcsAccess;
  readonly #controls: VmxControls;
  readonly #stackTop: number;
  /** Where the VMCS is active, or was last. */
  #cpu: L1Vcpu;
  #isCleared = true;
  /** Whose host state the VMCS holds. */
  #hostOf: L1Vcpu | undefined;
  #entering: { index: number; instruction: string } | undefined;

  /** @internal Made by L1.createL2, or like an L2 of another L1, whose memory this one's is a copy of. */
  constructor(l1: L1, controls: VmxControls, options: L2Options, program: L2Program, like?: L2) {
    const cpu = l1.cpu(options.cpu ?? 0);
    if (options.evmcs && cpu.vpAssist === undefined) {
      throw new GuestProtocolError('an enlightened VMCS needs an L1 that was booted with { evmcs: true }');
    }
    this.l1 = l1;
    this.options = options;
    this.program = program;
    this.#controls = controls;
    this.#cpu = cpu;
    const memory = l1.memory.buffer;
    const allocate = (pages?: number) => l1.allocate(pages);
    const at = (gpa: number, length: number) => l1.memoryAt(gpa, length);
    this.structures = new L2Structures({ memory, allocate, at, ept: l1.ept }, options, like?.structures);
    this.vmcs = like?.vmcs ?? options.vmcs ?? l1.allocate();
    this.area = new RecordView(memory, 'l2', like?.area.gpa ?? l1.allocate());
    this.control = new RecordView(memory, 'control', like?.control.gpa ?? l1.allocate());
    this.#stackTop = like ? like.#stackTop : l1.allocate(STACK_PAGES) + STACK_PAGES * PAGE_SIZE;
    if (options.evmcs) this.evmcs = new Evmcs(l1.memoryAt(this.vmcs, PAGE_SIZE), this.vmcs);
    this.#access = vmcsAccess(this);
    this.fields = new Vmcs(this.#access);
    if (like) this.adopt(like);
    else this.#fill();
  }

  /** Its pages, before L1 knows of it. */
  #fill(): void {
    const { l1, options, program } = this;
    const page = l1.memoryAt(this.vmcs, PAGE_SIZE);
    page.fill(0);
    const ops = l1.allocate(Math.ceil(program.byteLength / PAGE_SIZE));
    program.store(l1.memory.buffer, ops);
    // L2 finds its page by GS.base: an interrupt may come before its first instruction
    this.control.setU64('self', this.control.gpa);
    this.control.setU64('ops', ops);
    this.control.setU64('checksum', abi.CHECKSUM_SEED);
    this.control.setU64('eoi', options.autoEoi === 'x2apic' ? 1 : (options.autoEoi ?? 0));
    this.area.setU64('regs', this.control.gpa, 7);
    if (this.evmcs) {
      this.evmcs.revision = EVMCS_REVISION;
      this.area.setU64('evmcs', this.vmcs);
    } else {
      new DataView(page.buffer, page.byteOffset).setUint32(0, this.#controls.revision, true);
    }
  }

  /** @internal Its script stands where that of another L2 stands, whose memory is here too. */
  adopt(other: L2): void {
    this.#cpu = this.l1.cpu(other.#cpu.index);
    this.#hostOf = other.#hostOf && this.l1.cpu(other.#hostOf.index);
    this.#isCleared = other.#isCleared;
    this.#entering = other.#entering;
    this.#left = other.#left;
  }

  get msrBitmap(): MsrBitmap | undefined {
    return this.structures.msrBitmap;
  }

  get ioBitmap(): IoBitmap | undefined {
    return this.structures.ioBitmap;
  }

  /** Guest-physical address of the virtual-APIC page. */
  get virtualApic(): number | undefined {
    return this.structures.virtualApic?.gpa;
  }

  /** The registers in the virtual-APIC page. */
  get vapic(): VirtualApicPage | undefined {
    return this.structures.virtualApic;
  }

  get postedInterrupts(): PostedInterruptDescriptor | undefined {
    return this.structures.postedInterrupts;
  }

  /** @internal VMCLEAR, VMPTRLD and every field. */
  async initialize(): Promise<void> {
    const { entry, apicAccess, fields = {}, pageTables } = this.options;
    const { l2: image } = this.l1.images;
    // L1 must see accesses to this page alone, whatever surrounds it (SDM vol. 3, 30.4.6.1)
    if (apicAccess !== undefined) this.structures.ept?.split(apicAccess);
    const entries = [
      ...controlFields(this.#controls, this.structures.controls),
      ...guestState({
        entry: entry ?? image.entry,
        stackTop: this.#stackTop,
        control: this.control.gpa,
        gdt: image.symbol('gdt'),
        idt: image.symbol('idt'),
        cr3: (pageTables ?? this.l1.pageTables).root,
      }),
      ...vmcsEntries(fields),
    ];
    if (this.evmcs) {
      await this.load();
      await this.#access.write(entries);
      return;
    }
    const cpu = this.#cpu;
    await this.#prepare(cpu);
    const batch = new Batch().vmclear(this.vmcs, this.area.gpa);
    await cpu.executeAll(this.#addLoading(batch, cpu).vmwrites(entries));
    this.#loaded(cpu);
  }

  /** The L1 vCPU it is loaded on, or was last. */
  get cpu(): L1Vcpu {
    return this.#cpu;
  }

  /** VMLAUNCH is behind it, VMRESUME is next. */
  get launched(): boolean {
    return this.area.u32('launched') !== 0;
  }

  /** L2 is active or in the middle of an enter: continue() comes next. */
  get entered(): boolean {
    return this.#entering !== undefined;
  }

  /** VMCLEAR where it is loaded. */
  async vmclear(): Promise<void> {
    await this.#cpu.vmclear(this.vmcs, this.area.gpa);
    this.#isCleared = true;
  }

  /**
   * VMPTRLD on a vCPU, and the host state if it is another vCPU's than before.
   * @throws GuestProtocolError when it is still active on another vCPU: vmclear() first, or enter({ on })
   */
  async load(index: number = this.#cpu.index): Promise<void> {
    const cpu = this.l1.cpu(index);
    if (cpu !== this.#cpu && !this.#isCleared) {
      throw new GuestProtocolError(
        `the VMCS is active on L1 vCPU ${this.#cpu.index}: VMCLEAR it there before VMPTRLD on ${index}`,
      );
    }
    await this.#prepare(cpu);
    const batch = this.#addLoading(new Batch(), cpu);
    if (batch.length > 0) await cpu.executeAll(batch);
    this.#loaded(cpu);
  }

  async #prepare(cpu: L1Vcpu): Promise<void> {
    if (this.l1.l2Of(this.vmcs) !== this) {
      throw new GuestProtocolError(
        'this L2 was made after the moment that its L1 was rewound to: it is gone',
      );
    }
    if (!cpu.inVmxOperation) await this.l1.vmxon(cpu.index);
    if (this.structures.needsApic && !cpu.inX2apicMode) await cpu.x2apicEnable();
    const other = cpu.current === this.vmcs ? undefined : this.l1.l2Of(cpu.current);
    // KVM drops a VMCS that is current when an enlightened one takes over, and the other way round (TLFS)
    if (other && (other.evmcs || this.evmcs)) await other.vmclear();
  }

  #addLoading(batch: Batch, cpu: L1Vcpu): Batch {
    if (cpu.current !== this.vmcs || this.#isCleared) {
      if (cpu.vpAssist !== undefined) cpu.enlighten(batch, this.evmcs && this.vmcs);
      if (!this.evmcs) batch.vmptrld(this.vmcs);
    }
    if (this.#hostOf !== cpu) batch.hostState(this.area.gpa);
    return batch;
  }

  #loaded(cpu: L1Vcpu): void {
    if (this.evmcs) cpu.setEvmcs(this.vmcs);
    this.#cpu = cpu;
    this.#hostOf = cpu;
    this.#isCleared = false;
  }

  /**
   * Runs L2 to the next stop. Each VM entry is one VMLAUNCH or VMRESUME and nothing else: `nested_run` + 1. A VMCS
   * that is not current is loaded first, in the same batch.
   * @throws VmxError when the entry failed with VMfail, GuestFault for an exception in L1 or L2
   */
  async enter(options: EnterOptions = {}): Promise<L2Stop> {
    const { mode = 'auto', policy = {}, limit = 0, on } = options;
    if (this.#entering)
      throw new GuestProtocolError('this L2 is in the middle of an enter(): continue() it first');
    const cpu = on === undefined ? this.#cpu : this.l1.cpu(on);
    if (cpu !== this.#cpu && !this.#isCleared) await this.vmclear();
    await this.#prepare(cpu);
    this.setPolicy(policy);
    const willLaunch = mode === 'launch' || (mode === 'auto' && !this.launched);
    const batch = this.#addLoading(new Batch(), cpu);
    this.#entering = { index: batch.length, instruction: willLaunch ? 'VMLAUNCH' : 'VMRESUME' };
    batch.enter(this.area.gpa, mode, limit);
    return this.#take(() => cpu.start(batch, options), cpu);
  }

  /** Runs on after a `sync` or `kvm-exit` stop. */
  async continue(options: RunOptions = {}): Promise<L2Stop> {
    if (!this.#entering) throw new GuestProtocolError('this L2 has nothing to continue: enter() it');
    return this.#take(() => this.#cpu.continue(options), this.#cpu);
  }

  async #take(run: () => Promise<VcpuStop>, cpu: L1Vcpu): Promise<L2Stop> {
    // From here on the VMCS may be current on `cpu`, whatever comes of the entry
    this.#loaded(cpu);
    let stop: VcpuStop;
    try {
      stop = await run();
    } finally {
      if (!cpu.busy) this.#leave();
    }
    if (stop.kind !== 'done') return stop;
    const { index, instruction } = this.#left!;
    for (const [i, result] of stop.results.entries())
      cpu.check(result, i === index ? instruction : result.command);
    const entries = Number(stop.results[index]!.values[1]);
    return { kind: 'exit', exit: readExit(this.area), entries, counts: this.exitCounts() };
  }

  #left: { index: number; instruction: string } | undefined;

  #leave(): void {
    this.#left = this.#entering;
    this.#entering = undefined;
  }

  /** Sets what L1 does at exits; enter() does it too. Only batches made by hand need it. */
  setPolicy(policy: ExitPolicy): void {
    const actions = this.area.bytes('policy').fill(abi.POLICY_RETURN);
    const all: ExitPolicy = { ...DEFAULT_POLICY, ...policy };
    for (const reason in all) {
      const action = all[reason as ExitReason]!;
      const value = ACTIONS[action];
      if (value === undefined) throw new TypeError(`"${action}" is not an exit action`);
      actions[exitReasonCode(reason as ExitReason)] = value;
    }
  }

  /** VM exits with this reason that L1 has seen, since the L2 was made. */
  exitCount(reason: ExitReason): number {
    return Number(this.area.u64('counts', exitReasonCode(reason)));
  }

  /** All VM exits that L1 has seen, by reason. */
  exitCounts(): Map<string, number> {
    const counts = new Map<string, number>();
    const words = this.area.words('counts');
    for (let code = 0; code < abi.EXIT_REASONS; code += 1) {
      const count = words[code * 2]! + words[code * 2 + 1]! * 2 ** 32;
      if (count > 0) counts.set(exitReasonName(code), count);
    }
    return counts;
  }

  /** Successful VM entries since the L2 was made, and TSC ticks from just before one to just after its exit. */
  get timing(): { entries: number; min: bigint; max: bigint; total: bigint } {
    return {
      entries: Number(this.area.u64('entries')),
      min: this.area.u64('tsc_min'),
      max: this.area.u64('tsc_max'),
      total: this.area.u64('tsc_total'),
    };
  }

  get progress(): L2Progress {
    return {
      executed: Number(this.control.u64('executed')),
      pc: this.control.u32('pc'),
      done: this.control.u32('done') !== 0,
      folds: Number(this.control.u64('folds')),
      checksum: this.control.u64('checksum'),
      last: this.control.u64('last'),
    };
  }

  /** VMREAD of this L2's VMCS, loading it first if it is not current. */
  async vmread(field: VmcsField | number): Promise<bigint> {
    return this.fields.read(field);
  }

  /** VMWRITE to this L2's VMCS, loading it first if it is not current. */
  async vmwrite(field: VmcsField | number, value: bigint | number): Promise<void> {
    await this.fields.write(field, value);
  }

  /** Has the next VM entry deliver an event (SDM vol. 3, 27.6). One VM exit clears it again. */
  async inject(event: InjectedEvent): Promise<void> {
    const { info, errorCode, length } = encodeEvent(event);
    await this.fields.writeAll({
      VM_ENTRY_EXCEPTION_ERROR_CODE: errorCode,
      VM_ENTRY_INSTRUCTION_LEN: length,
      VM_ENTRY_INTR_INFO_FIELD: info,
    });
  }

  /** Interrupts (or NMIs, vector 2) that L2 itself took. */
  interruptCount(vector: number): number {
    return this.control.u32('irq_counts', vector);
  }

  /** GUEST_INTR_STATUS: the vector requested next (RVI) and the one in service (SVI). */
  async interruptStatus(): Promise<{ requested: number; inService: number }> {
    const status = Number(await this.fields.read('GUEST_INTR_STATUS'));
    return { requested: status & 0xff, inService: status >> 8 };
  }

  /** Sets RVI and SVI. */
  async setInterruptStatus(status: { requested?: number; inService?: number }): Promise<void> {
    const { requested, inService } = { ...(await this.interruptStatus()), ...status };
    await this.fields.write('GUEST_INTR_STATUS', (inService << 8) | requested);
  }
}
