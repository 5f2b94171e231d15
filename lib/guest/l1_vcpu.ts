// SPDX-License-Identifier: Apache-2.0
import type { CpuidEntry, Exit, Vcpu } from '../kvm/index.ts';
import { abi, RecordView } from './abi.ts';
import { type AccessSize, Batch, CommandPages, type CommandResult } from './batch.ts';
import type { Image } from './elf.ts';
import { GuestFault, GuestProtocolError, VmxError } from './errors.ts';
import { HV_MSRS, VP_ASSIST } from './evmcs.ts';
import type { VmcsField } from './vmcs_fields.ts';

/** Any value but 0 says that a guest OS is there: bit 63 clear, vendor and version our own. */
const GUEST_OS_ID = 0x6e76_6d78n;

/** Where an L1 vCPU's memory is. */
export interface VcpuPlaces {
  readonly area: number;
  readonly commands: number;
  readonly vmxonRegion: number;
}

export interface RunOptions {
  signal?: AbortSignal;
}

/**
 * Why a batch stopped: it is done; L2 wrote the sync port and is still active; or KVM_RUN came back with
 * something L1 and L2 did not ask for. After the latter two, `continue()` goes on.
 */
export type VcpuStop =
  | { kind: 'done'; results: CommandResult[] }
  | { kind: 'sync'; value: number }
  | { kind: 'kvm-exit'; exit: Exit };

/** One vCPU of L1: takes commands, one batch at a time. */
export class L1Vcpu {
  readonly index: number;
  readonly vcpu: Vcpu;
  /** The CPU area of abi.h. */
  readonly area: RecordView<'cpu'>;
  readonly vmxonRegion: number;
  readonly #memory: ArrayBuffer;
  readonly #commands: number;
  readonly #pages: CommandPages;
  readonly #images: { readonly l1: Image; readonly l2: Image };
  /** The L2 control page, by VMCS: where an exception in L2 leaves its record. */
  readonly #controls: Map<number, RecordView<'control'>>;
  #batch: Batch | undefined;
  #current: number | undefined;
  /** The eVMCS that is active here. */
  #evmcs: number | undefined;
  #isEnlightened = false;
  #isInVmx = false;
  #vpAssist: number | undefined;

  /** @internal Made by L1.boot. */
  constructor(
    index: number,
    vcpu: Vcpu,
    memory: ArrayBuffer,
    places: VcpuPlaces,
    images: { readonly l1: Image; readonly l2: Image },
    controls: Map<number, RecordView<'control'>>,
  ) {
    this.index = index;
    this.vcpu = vcpu;
    this.#memory = memory;
    this.area = new RecordView(memory, 'cpu', places.area);
    this.vmxonRegion = places.vmxonRegion;
    this.#commands = places.commands;
    this.#pages = new CommandPages(memory, places.commands);
    this.#images = images;
    this.#controls = controls;
  }

  /** @internal Its script stands where that of another vCPU stands, whose state and memory are here too. */
  adopt(other: L1Vcpu): void {
    this.#batch = other.#batch;
    this.#current = other.#current;
    this.#evmcs = other.#evmcs;
    this.#isEnlightened = other.#isEnlightened;
    this.#isInVmx = other.#isInVmx;
    this.#vpAssist = other.#vpAssist;
  }

  /** @internal Where its memory is. */
  get places(): VcpuPlaces {
    return { area: this.area.gpa, commands: this.#commands, vmxonRegion: this.vmxonRegion };
  }

  /** The current VMCS or active eVMCS, as far as commands told; undefined when there is none. */
  get current(): number | undefined {
    return this.#evmcs ?? this.#current;
  }

  /** Guest-physical address of the Hyper-V VP assist page, of an L1 booted with `evmcs`. */
  get vpAssist(): number | undefined {
    return this.#vpAssist;
  }

  /** The bytes of that page; {@link VP_ASSIST} has their offsets. @throws GuestProtocolError when there is none */
  get vpAssistPage(): DataView<ArrayBuffer> {
    if (this.#vpAssist === undefined) {
      throw new GuestProtocolError(`L1 vCPU ${this.index} has no VP assist page: boot L1 with evmcs`);
    }
    return new DataView(this.#memory, this.#vpAssist, 4096);
  }

  /** @internal MSRs 0x40000000, 0x40000001 and 0x40000073. */
  async enableHyperV(hypercallPage: number, assistPage: number): Promise<void> {
    await this.executeAll(
      new Batch()
        .wrmsr(HV_MSRS.guestOsId, GUEST_OS_ID)
        .wrmsr(HV_MSRS.hypercall, BigInt(hypercallPage) | 1n)
        .wrmsr(HV_MSRS.vpAssistPage, BigInt(assistPage) | 1n),
    );
    this.#vpAssist = assistPage;
  }

  /** @internal Makes the VP assist page name this eVMCS, or none. */
  enlighten(batch: Batch, evmcs: number | undefined): void {
    const assist = this.#vpAssist!;
    if (evmcs !== undefined) batch.write(assist + VP_ASSIST.currentNestedVmcs, 8, evmcs);
    if (this.#isEnlightened !== (evmcs !== undefined)) {
      batch.write(assist + VP_ASSIST.enlightenVmEntry, 1, evmcs === undefined ? 0 : 1);
    }
    this.#isEnlightened = evmcs !== undefined;
  }

  /** @internal The eVMCS that the next entry makes active. */
  setEvmcs(gpa: number): void {
    this.#evmcs = gpa;
  }

  /** Its local APIC is in x2APIC mode and enabled. */
  get inX2apicMode(): boolean {
    return this.area.u32('x2apic') !== 0;
  }

  /** Between VMXON and VMXOFF. */
  get inVmxOperation(): boolean {
    return this.#isInVmx;
  }

  /** A batch was started and is not done: only continue() makes sense. */
  get busy(): boolean {
    return this.#batch !== undefined;
  }

  /** @internal Runs from the entry point to the first report. */
  async ready(options: RunOptions): Promise<void> {
    this.#batch = new Batch();
    const stop = await this.continue(options);
    const magic = this.area.u64('magic');
    const version = this.area.u32('version');
    if (stop.kind !== 'done' || magic !== abi.ABI_MAGIC || version !== abi.ABI_VERSION) {
      throw new GuestProtocolError(
        `L1 vCPU ${this.index} did not come up (${describe(stop)}, protocol version ${version}, expected ${abi.ABI_VERSION}): rebuild the guest images`,
        stop.kind === 'kvm-exit' ? stop.exit : undefined,
      );
    }
  }

  /**
   * Starts a batch and runs to the first stop.
   * @throws GuestFault for an exception that nothing in L1 or L2 recovers from
   */
  start(batch: Batch, options: RunOptions = {}): Promise<VcpuStop> {
    if (this.#batch) {
      return Promise.reject(
        new GuestProtocolError(
          `L1 vCPU ${this.index} is in the middle of a batch (L2 is active or an exit to userspace is pending): continue() it first`,
        ),
      );
    }
    batch.store(this.#pages);
    this.area.setU32('batch_count', batch.length);
    this.#batch = batch;
    return this.continue(options);
  }

  /** Runs on after a stop that was not `done`. */
  async continue(options: RunOptions = {}): Promise<VcpuStop> {
    if (!this.#batch) throw new GuestProtocolError(`L1 vCPU ${this.index} has nothing to continue`);
    const exit = await this.vcpu.run(options);
    if (exit.type !== 'io' || exit.direction !== 'out' || exit.size !== 4) return { kind: 'kvm-exit', exit };
    const value = new DataView(exit.data.buffer, exit.data.byteOffset, 4).getUint32(0, true);
    switch (exit.port) {
      case abi.PORT_L1_DONE:
        return { kind: 'done', results: this.#finish() };
      case abi.PORT_L2_SYNC:
        return { kind: 'sync', value };
      case abi.PORT_L1_FAULT:
        return this.#failL1(options);
      case abi.PORT_L2_FAULT:
        throw this.#faultOfL2(value);
      default:
        return { kind: 'kvm-exit', exit };
    }
  }

  /**
   * Executes a batch that has no reason to stop before its end.
   * @throws GuestProtocolError when it stops all the same
   */
  async execute(batch: Batch, options: RunOptions = {}): Promise<CommandResult[]> {
    const stop = await this.start(batch, options);
    if (stop.kind === 'done') return stop.results;
    throw new GuestProtocolError(
      `L1 vCPU ${this.index} stopped in a batch: ${describe(stop)}`,
      stop.kind === 'kvm-exit' ? stop.exit : undefined,
    );
  }

  /** Executes a batch in which every command must succeed. @throws VmxError, GuestFault, GuestProtocolError */
  async executeAll(batch: Batch, options: RunOptions = {}): Promise<CommandResult[]> {
    const results = await this.execute(batch, options);
    for (let i = 0; i < results.length; i += 1) if (results[i]!.status !== 'ok') this.check(results[i]!);
    return results;
  }

  /** Turns a failed command into its error. */
  check(result: CommandResult, instruction: string = result.command): void {
    const [first, second, third] = result.values;
    switch (result.status) {
      case 'ok':
        return;
      case 'vmfail-invalid':
        throw new VmxError(instruction, undefined);
      case 'vmfail-valid':
        throw new VmxError(instruction, Number(first));
      case 'fault':
        throw new GuestFault({
          level: 'L1',
          vector: Number(first),
          errorCode: second,
          rip: third,
          symbol: this.#images.l1.locate(third),
          line: this.#images.l1.line(third),
          cr2: this.area.inner('fault', 'fault').u64('cr2'),
          during: instruction,
        });
      default:
        throw new GuestProtocolError(`L1 did not execute ${instruction}: ${result.status}`);
    }
  }

  async #one(batch: Batch): Promise<readonly [bigint, bigint, bigint]> {
    const [result] = await this.executeAll(batch);
    return result!.values;
  }

  /** VMXON with this vCPU's own region, after the feature-control lock and the fixed bits of CR0 and CR4. */
  async vmxon(region: number = this.vmxonRegion): Promise<void> {
    await this.#one(new Batch().vmxon(region));
  }

  async vmxoff(): Promise<void> {
    await this.#one(new Batch().vmxoff());
  }

  /** @param area the L2 area that belongs to the VMCS, if any */
  async vmclear(vmcs: number, area = 0): Promise<void> {
    await this.#one(new Batch().vmclear(vmcs, area));
  }

  async vmptrld(vmcs: number): Promise<void> {
    await this.#one(new Batch().vmptrld(vmcs));
  }

  async vmptrst(): Promise<bigint> {
    return (await this.#one(new Batch().vmptrst()))[0];
  }

  async vmread(field: VmcsField | number): Promise<bigint> {
    return (await this.#one(new Batch().vmread(field)))[0];
  }

  async vmwrite(field: VmcsField | number, value: bigint | number): Promise<void> {
    await this.#one(new Batch().vmwrite(field, value));
  }

  async invept(type: number, eptPointer: bigint): Promise<void> {
    await this.#one(new Batch().invept(type, eptPointer));
  }

  async invvpid(type: number, vpid: number, address = 0n): Promise<void> {
    await this.#one(new Batch().invvpid(type, vpid, address));
  }

  async rdmsr(index: number): Promise<bigint> {
    return (await this.#one(new Batch().rdmsr(index)))[0];
  }

  async wrmsr(index: number, value: bigint): Promise<void> {
    await this.#one(new Batch().wrmsr(index, value));
  }

  async cpuid(leaf: number, subleaf = 0): Promise<Pick<CpuidEntry, 'eax' | 'ebx' | 'ecx' | 'edx'>> {
    const [ab, cd] = await this.#one(new Batch().cpuid(leaf, subleaf));
    const low = (value: bigint) => Number(value & 0xffff_ffffn);
    const high = (value: bigint) => Number(value >> 32n);
    return { eax: low(ab), ebx: high(ab), ecx: low(cd), edx: high(cd) };
  }

  /** A load by L1 itself. */
  async read(gpa: number, size: AccessSize): Promise<bigint> {
    return (await this.#one(new Batch().read(gpa, size)))[0];
  }

  /** A store by L1 itself. */
  async write(gpa: number, size: AccessSize, value: bigint | number): Promise<void> {
    await this.#one(new Batch().write(gpa, size, value));
  }

  /** Calls code in L1's memory and returns RAX. @throws GuestFault when it faults */
  async call(address: number, ...args: (bigint | number)[]): Promise<bigint> {
    return (await this.#one(new Batch().call(address, ...args)))[0];
  }

  /** Switches to x2APIC mode and enables the local APIC; returns the APIC id. Needs an in-kernel irqchip. */
  async x2apicEnable(): Promise<number> {
    return Number((await this.#one(new Batch().x2apicEnable()))[0]);
  }

  /** EOI to its x2APIC: owed after an exit that acknowledged an interrupt. */
  async eoi(): Promise<void> {
    await this.wrmsr(0x80b, 0n);
  }

  async rdtsc(): Promise<bigint> {
    return (await this.#one(new Batch().rdtsc()))[0];
  }

  /** Interrupts (or NMIs, vector 2) this vCPU took while in L1. */
  interruptCount(vector: number): number {
    return this.area.u32('irq_counts', vector);
  }

  #finish(): CommandResult[] {
    const batch = this.#batch!;
    this.#batch = undefined;
    const results = batch.results(this.#pages);
    for (const i of batch.tracked) {
      const { command, status } = results[i]!;
      if (status !== 'ok') continue;
      if (command === 'VMPTRLD') this.#current = batch.argument(i);
      else if (command === 'VMCLEAR' && this.#evmcs === batch.argument(i)) this.#evmcs = undefined;
      else if (command === 'VMCLEAR' && this.#current === batch.argument(i)) this.#current = undefined;
      else if (command !== 'VMCLEAR') {
        this.#isInVmx = command === 'VMXON';
        this.#current = undefined;
        this.#evmcs = undefined;
      }
    }
    return results;
  }

  /** L1 restarts its command loop after an exception: one more run parks it there. */
  async #failL1(options: RunOptions): Promise<never> {
    const fault = this.#read(this.area.inner('fault', 'fault'), 'L1', this.#images.l1);
    const stop = await this.continue(options);
    if (stop.kind !== 'done') {
      throw new GuestProtocolError(`L1 did not recover from ${fault.message}: ${describe(stop)}`);
    }
    throw fault;
  }

  #faultOfL2(vector: number): Error {
    const control = this.#controlOfActive();
    if (!control) return new GuestProtocolError(`exception ${vector} in an L2 this library did not make`);
    return this.#read(control.inner('fault', 'fault'), 'L2', this.#images.l2);
  }

  /** The L2 that is running: a batch may have switched VMCSs since the last report. */
  #controlOfActive(): RecordView<'control'> | undefined {
    let current = this.current;
    const batch = this.#batch!;
    const results = batch.results(this.#pages);
    for (const i of batch.tracked) {
      const { command, status } = results[i]!;
      if (command === 'VMPTRLD' && status === 'ok') current = batch.argument(i);
    }
    return current === undefined ? undefined : this.#controls.get(current);
  }

  #read(record: RecordView<'fault'>, level: 'L1' | 'L2', image: Image): GuestFault {
    const rip = record.u64('rip');
    return new GuestFault({
      level,
      vector: record.u32('vector'),
      errorCode: record.u64('error_code'),
      rip,
      symbol: image.locate(rip),
      line: image.line(rip),
      cr2: record.u64('cr2'),
    });
  }
}

function describe(stop: VcpuStop): string {
  if (stop.kind === 'kvm-exit') return `KVM_RUN returned "${stop.exit.type}"`;
  return stop.kind === 'sync' ? `L2 synchronised with value ${stop.value}` : 'the batch is done';
}
