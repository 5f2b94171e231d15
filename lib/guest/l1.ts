// SPDX-License-Identifier: Apache-2.0
import {
  type CpuidEntry,
  Kvm,
  KvmUnsupportedError,
  type MemoryRegion,
  MP_STATE,
  type Vcpu,
  type Vm,
} from '../kvm/index.ts';
import { abi, type RecordView, records } from './abi.ts';
import { Batch } from './batch.ts';
import { VMX_CAPABILITY_MSRS, VmxControls } from './controls.ts';
import { type Image, loadImage } from './elf.ts';
import { Ept, type EptOptions } from './ept.ts';
import { MissingControlError } from './errors.ts';
import { evmcsMap } from './evmcs.ts';
import { L1Vcpu, type RunOptions, type VcpuPlaces } from './l1_vcpu.ts';
import { L2 } from './l2.ts';
import type { L2Options } from './l2_options.ts';
import { PAGE_SIZE, PageAllocator } from './layout.ts';
import { PageTables, type TreeOptions } from './paging.ts';
import { L2Program } from './program.ts';

const DEFAULT_MEMORY = 16 * 1024 * 1024;
const STACK_PAGES = 4;
const COMMAND_PAGES = Math.ceil((abi.MAX_COMMANDS * records.command.size) / PAGE_SIZE);
/** PE, MP, ET, NE, WP, PG: NE because VMX insists on it. */
const CR0 = 0x8001_0033n;
const CR4_PAE = 0x20n;
/** LME, LMA. */
const EFER = 0x500n;
const CPUID_VMX = 1 << 5;

export interface BootOptions extends RunOptions {
  /** vCPUs of L1, with ids and APIC ids from 0; default 1. */
  vcpus?: number;
  /** Bytes of memory from GPA 0; default 16 MiB. */
  memory?: number;
  /** Create an in-kernel interrupt controller (x2APIC, IPIs, posted interrupts need it); default true. */
  irqchip?: boolean;
  /** What L1 sees in CPUID; default everything KVM supports. APIC ids are filled in. */
  cpuid?: readonly CpuidEntry[];
  /** KVM_SET_MSRS for every vCPU before it runs: VMX capability MSRs that offer L1 less, say. */
  msrs?: Iterable<readonly [index: number, value: bigint]>;
  /**
   * Hyper-V's enlightened VMCS (KVM_CAP_HYPERV_ENLIGHTENED_VMCS): Hyper-V CPUID leaves, the VP assist page. KVM then
   * hides from L1 the VMX controls that an eVMCS has no field for. L2s choose with `createL2({ evmcs: true })`.
   */
  evmcs?: boolean;
}

/** The L1 hypervisor in a VM: its vCPUs take commands, its memory holds everything L1 and L2 use. */
export class L1 implements AsyncDisposable {
  readonly vm: Vm;
  readonly memory: MemoryRegion;
  readonly vcpus: readonly L1Vcpu[];
  /** L2's EPT, one for all L2s: 4 GiB identity. After an edit, INVEPT. */
  readonly ept: Ept;
  readonly pageTables: PageTables;
  readonly images: { readonly l1: Image; readonly l2: Image };
  readonly #pages: PageAllocator;
  readonly #l2Controls: Map<number, RecordView<'control'>>;
  readonly #l2s = new Map<number, L2>();
  /** By the address of the top table. */
  readonly #trees = new Map<number, Ept | PageTables>();
  readonly #page = () => this.#pages.allocate();
  #controls: VmxControls | undefined;

  private constructor(vm: Vm, from: BootOptions | L1) {
    this.vm = vm;
    this.#l2Controls = new Map();
    if (from instanceof L1) {
      this.images = from.images;
      this.memory = vm.memory.regionAt(0)!;
      this.#pages = new PageAllocator(from.#pages.limit);
      this.pageTables = this.counterpart(from.pageTables);
      this.ept = this.counterpart(from.ept);
      this.vcpus = from.vcpus.map(({ index, places }) => this.#wrap(index, vm.vcpus[index]!, places));
      this.#adopt(from);
      return;
    }
    const options = from;
    const { vcpus: count = 1, memory: size = DEFAULT_MEMORY } = options;
    if (!Number.isSafeInteger(count) || count < 1 || count > 64) {
      throw new RangeError(`L1 has between 1 and 64 vCPUs, not ${count}`);
    }
    this.#pages = new PageAllocator(size);
    this.images = { l1: loadImage('l1.elf'), l2: loadImage('l2.elf') };
    this.memory = vm.memory.add({ gpa: 0, size });
    this.pageTables = this.createPageTables();
    this.ept = this.createEpt();
    for (const image of [this.images.l1, this.images.l2]) {
      for (const segment of image.segments) this.bytes(segment.gpa, segment.size).set(segment.bytes);
    }
    if (options.irqchip ?? true) vm.createIrqchip();
    const cpuid = options.cpuid ?? supportedCpuid();
    if (options.evmcs && vm.checkExtension('KVM_CAP_HYPERV_ENLIGHTENED_VMCS') === 0) {
      throw new KvmUnsupportedError('KVM_CAP_HYPERV_ENLIGHTENED_VMCS', 'KVM_ENABLE_CAP');
    }
    this.vcpus = Array.from({ length: count }, (_, id) =>
      this.#createVcpu(id, cpuid, options.irqchip ?? true, options.evmcs ?? false),
    );
    const msrs = [...(options.msrs ?? [])];
    if (msrs.length > 0) for (const { vcpu } of this.vcpus) vcpu.setMsrs(msrs);
  }

  /**
   * Loads the images into a VM that has no memory at GPA 0 yet, creates its vCPUs and starts L1 on all of them.
   * @throws GuestProtocolError when L1 does not come up
   */
  static async boot(vm: Vm, options: BootOptions = {}): Promise<L1> {
    const l1 = new L1(vm, options);
    const run = options.signal ? { signal: options.signal } : {};
    for (const vcpu of l1.vcpus) await vcpu.ready(run);
    if (options.evmcs) await l1.#enableHyperV();
    return l1;
  }

  async #enableHyperV(): Promise<void> {
    const map = this.place(new Uint8Array(evmcsMap().buffer));
    for (const cpu of this.vcpus) {
      cpu.area.setU64('evmcs_map', map);
      await cpu.enableHyperV(this.allocate(), this.allocate());
    }
  }

  #createVcpu(id: number, cpuid: readonly CpuidEntry[], irqchip: boolean, evmcs: boolean): L1Vcpu {
    const vcpu = this.vm.createVcpu(id);
    if (evmcs) vcpu.enableEnlightenedVmcs();
    vcpu.setCpuid(withApicId(evmcs ? withHyperV(cpuid, vcpu.supportedHvCpuid()) : cpuid, id));
    if (irqchip && id > 0) vcpu.setMpState(MP_STATE.runnable);
    const places = {
      area: this.#pages.allocate(),
      commands: this.#pages.allocate(COMMAND_PAGES),
      vmxonRegion: this.#pages.allocate(),
    };
    const stackTop = this.#pages.allocate(STACK_PAGES) + STACK_PAGES * PAGE_SIZE;
    const cpu = this.#wrap(id, vcpu, places);
    cpu.area.setU64('commands', places.commands);
    cpu.area.setU32('index', id);
    cpu.area.setU64('stack_top', stackTop);
    cpu.area.setU64('ist_top', this.#pages.allocate() + PAGE_SIZE);
    enterLongMode(vcpu, this.pageTables.root);
    vcpu.setRegs({
      rip: BigInt(this.images.l1.entry),
      rsp: BigInt(stackTop),
      rdi: BigInt(places.area),
      rflags: 2n,
    });
    return cpu;
  }

  #wrap(id: number, vcpu: Vcpu, places: VcpuPlaces): L1Vcpu {
    return new L1Vcpu(id, vcpu, this.memory.buffer, places, this.images, this.#l2Controls);
  }

  /** What a script knows of `other`, whose vCPUs and memory are here too. */
  #adopt(other: L1): void {
    this.#pages.adopt(other.#pages);
    this.#controls = other.#controls;
    for (const cpu of this.vcpus) cpu.adopt(other.cpu(cpu.index));
    for (const vmcs of this.#l2s.keys()) if (!other.#l2s.has(vmcs)) this.#forget(vmcs);
    for (const [vmcs, its] of other.#l2s) {
      const own = this.#l2s.get(vmcs);
      if (own?.control.gpa === its.control.gpa) own.adopt(its);
      else this.#remember(new L2(this, this.#controls!, this.#translate(its.options), its.program, its));
    }
  }

  #remember(l2: L2): void {
    this.#l2s.set(l2.vmcs, l2);
    this.#l2Controls.set(l2.vmcs, l2.control);
  }

  #forget(vmcs: number): void {
    this.#l2s.delete(vmcs);
    this.#l2Controls.delete(vmcs);
  }

  /** The options of an L2 of another L1, as they are here. */
  #translate(options: L2Options): L2Options {
    const { ept, pageTables } = options;
    return {
      ...options,
      ...(ept && { ept: this.counterpart(ept) }),
      ...(pageTables && { pageTables: this.counterpart(pageTables) }),
    };
  }

  /**
   * A second L1 in a VM of its own (Vm.clone), with everything as it is now: memory, vCPUs, L2s, also one that is active
   * (after a `sync` stop, say). Each goes on without the other. {@link counterpart} finds its L2s.
   * @throws VcpuBusyError while a vCPU runs
   */
  async clone(): Promise<L1> {
    return new L1(this.vm.clone(), this);
  }

  /**
   * Makes this L1 what `to` is now, its clone or one that it is a clone of: memory, vCPUs, and where its L2s stand. The
   * objects stay good; an L2 that `to` does not have is gone.
   * @throws VcpuBusyError while a vCPU of either runs, RangeError when the VMs differ in memslots or vCPUs
   */
  async rewind(to: L1): Promise<void> {
    this.vm.rewind(to.vm);
    this.#adopt(to);
  }

  /**
   * What here stands for an L2, an EPT or page tables of the L1 that this is a clone of, or the other way round.
   * @throws RangeError for an L2 that this L1 does not have
   */
  counterpart<T extends L2 | Ept | PageTables>(of: T): T;
  counterpart(of: L2 | Ept | PageTables): L2 | Ept | PageTables {
    if (of instanceof L2) {
      const own = this.#l2s.get(of.vmcs);
      if (own?.control.gpa !== of.control.gpa) throw new RangeError('this L1 has no counterpart of that L2');
      return own;
    }
    const known = this.#trees.get(of.root);
    if (known) return known;
    const { buffer } = this.memory;
    const tree = of instanceof Ept ? new Ept(buffer, this.#page, of) : new PageTables(buffer, this.#page, of);
    this.#trees.set(tree.root, tree);
    return tree;
  }

  /** The lib/kvm vCPU with this index. @throws RangeError */
  vcpu(index: number): Vcpu {
    return this.cpu(index).vcpu;
  }

  /** The L1 vCPU with this index. @throws RangeError */
  cpu(index: number): L1Vcpu {
    const cpu = this.vcpus[index];
    if (!cpu) throw new RangeError(`L1 has no vCPU ${index}: it has ${this.vcpus.length}`);
    return cpu;
  }

  /** Guest memory, in place. @throws RangeError outside L1's memory */
  bytes(gpa: number, length: number): Uint8Array {
    return new Uint8Array(this.memory.buffer, gpa, length);
  }

  /** Guest memory, in place, of L1 or of any memslot. @throws RangeError where no memslot holds all of it */
  memoryAt(gpa: number, length: number): Uint8Array {
    const region = this.vm.memory.regionAt(gpa);
    if (!region) throw new RangeError(`there is no memory at guest address 0x${gpa.toString(16)}`);
    return region.bytes(gpa - region.gpa, length);
  }

  /** An EPT for some of the L2s, apart from the common one; 4 GiB identity unless told otherwise. */
  createEpt(options: EptOptions = {}): Ept {
    const ept = new Ept(this.memory.buffer, this.#page, options);
    this.#trees.set(ept.root, ept);
    return ept;
  }

  /** Page tables for an L2 of its own; 4 GiB identity unless told otherwise. */
  createPageTables(options: TreeOptions = {}): PageTables {
    const tables = new PageTables(this.memory.buffer, this.#page, options);
    this.#trees.set(tables.root, tables);
    return tables;
  }

  /** @internal The L2 that a VMCS belongs to. */
  l2Of(vmcs: number | undefined): L2 | undefined {
    return vmcs === undefined ? undefined : this.#l2s.get(vmcs);
  }

  /** KVM_SIGNAL_MSI to an L1 vCPU's local APIC; returns whether it was accepted. */
  signal(vector: number, cpu = 0): boolean {
    return this.vm.signalMsi({ address: 0xfee0_0000n | BigInt(this.cpu(cpu).index << 12), data: vector }) > 0;
  }

  /** Zeroed pages of L1's memory; returns their guest-physical address. @throws RangeError when it is used up */
  allocate(pages = 1): number {
    return this.#pages.allocate(pages);
  }

  /** Puts bytes, such as machine code, into pages of their own; returns where. */
  place(bytes: Uint8Array): number {
    const gpa = this.allocate(Math.max(1, Math.ceil(bytes.length / PAGE_SIZE)));
    this.bytes(gpa, bytes.length).set(bytes);
    return gpa;
  }

  /** The VMX controls as L1 itself reads them. @throws MissingControlError when L1's CPU has no VMX */
  async controls(): Promise<VmxControls> {
    if (this.#controls) return this.#controls;
    const batch = new Batch().cpuid(1);
    for (const msr of VMX_CAPABILITY_MSRS) batch.rdmsr(msr).keepGoing();
    const [leaf, ...results] = await this.cpu(0).execute(batch);
    const ecx = Number(leaf!.values[1] & 0xffff_ffffn);
    if ((ecx & CPUID_VMX) === 0) throw new MissingControlError('VMX');
    const values = new Map<number, bigint>();
    for (const [i, msr] of VMX_CAPABILITY_MSRS.entries()) {
      if (results[i]!.status === 'ok') values.set(msr, results[i]!.values[0]);
    }
    this.#controls = new VmxControls(values);
    return this.#controls;
  }

  /** VMXON on one vCPU, with the revision identifier in its region. @throws MissingControlError without VMX */
  async vmxon(index = 0): Promise<void> {
    const { revision } = await this.controls();
    const cpu = this.cpu(index);
    new DataView(this.memory.buffer).setUint32(cpu.vmxonRegion, revision, true);
    await cpu.vmxon();
  }

  /**
   * Makes an L2: a VMCS, loaded on a vCPU (VMXON first if need be), and the program it will run.
   * @throws MissingControlError for an option that L1's CPU does not offer
   */
  async createL2(options: L2Options, build: (program: L2Program) => unknown): Promise<L2> {
    const program = new L2Program();
    build(program);
    const controls = await this.controls();
    const cpu = this.cpu(options.cpu ?? 0);
    const l2 = new L2(this, controls, options, program);
    if (!cpu.inVmxOperation) await this.vmxon(cpu.index);
    this.#remember(l2);
    await l2.initialize();
    return l2;
  }

  /** Closes the VM. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.vm.close();
  }
}

function supportedCpuid(): CpuidEntry[] {
  using kvm = Kvm.open();
  return kvm.supportedCpuid();
}

/** The signature of Hyper-V takes the place of KVM's own at 0x40000000. */
function withHyperV(entries: readonly CpuidEntry[], hyperv: readonly CpuidEntry[]): CpuidEntry[] {
  return [...entries.filter((entry) => entry.function >>> 16 !== 0x4000), ...hyperv];
}

function withApicId(entries: readonly CpuidEntry[], id: number): CpuidEntry[] {
  return entries.map((entry) => {
    if (entry.function === 1) return { ...entry, ebx: ((entry.ebx & 0x00ff_ffff) | (id << 24)) >>> 0 };
    if (entry.function === 0xb || entry.function === 0x1f) return { ...entry, edx: id };
    return entry;
  });
}

function enterLongMode(vcpu: Vcpu, cr3: number): void {
  const data = { base: 0n, limit: 0xffff_ffff, selector: abi.SELECTOR_DATA, type: 3, s: 1, db: 1, l: 0 };
  const flat = { ...data, dpl: 0, present: 1, g: 1, unusable: 0 };
  vcpu.setSregs({
    cs: { ...flat, selector: abi.SELECTOR_CODE, type: 11, db: 0, l: 1 },
    ds: flat,
    es: flat,
    fs: flat,
    gs: flat,
    ss: flat,
    tr: { base: 0n, limit: 0x67, selector: abi.SELECTOR_TSS, type: 11, s: 0, present: 1, unusable: 0 },
    cr0: CR0,
    cr3: BigInt(cr3),
    cr4: CR4_PAE,
    efer: EFER,
  });
}
