// SPDX-License-Identifier: Apache-2.0
import { CLOCK_SIZE, type Clock, decodeClock, encodeClock } from './abi/clock.ts';
import {
  encodeIoeventfd,
  encodeIrqfd,
  encodeRouting,
  type GsiRoute,
  type IoEvent,
  IRQ_CHIPS,
  type IrqChip,
} from './abi/irq.ts';
import { type CapabilityName, capabilityNumber } from './capabilities.ts';
import { checkBytes, checkFlag, checkInteger, checkName, checkObject, checkU64 } from './check.ts';
import { rewindTo } from './clone.ts';
import { type EnableCapOptions, encodeEnableCap } from './enable_cap.ts';
import { KvmClosedError, KvmUnsupportedError } from './errors.ts';
import { EventFd } from './event_fd.ts';
import { native, type VmHandle } from './loader.ts';
import { VmMemory } from './memory.ts';
import { PrivateRanges } from './private_ranges.ts';
import { type StatSchema, type Stats, StatsReader } from './stats.ts';
import { Vcpu } from './vcpu.ts';

const IRQCHIP_SIZE = 520;
const PIT_CONFIG_SIZE = 64;
const PIT_STATE_SIZE = 112;
const DIRTY_ENTRY_SIZE = 16;
const ATTRIBUTE_PRIVATE = 8n;
const PRIVATE_ADVICE =
  "make the VM with createVm({ type: VM_TYPE['sw-protected'] }), on a kernel with CONFIG_KVM_SW_PROTECTED_VM";
/** Requests that shape a VM once; a clone gets them again, in order. */
const SETUP: ReadonlySet<string> = new Set([
  'KVM_ENABLE_CAP',
  'KVM_SET_TSS_ADDR',
  'KVM_SET_IDENTITY_MAP_ADDR',
  'KVM_CREATE_IRQCHIP',
  'KVM_CREATE_PIT2',
  'KVM_SET_BOOT_CPU_ID',
  'KVM_SET_GSI_ROUTING',
]);

/** What a VM needs of its Kvm. */
export interface VmOwner {
  readonly type: number;
  msrIndices(): readonly number[];
  clone(vm: Vm): Vm;
  forget(vm: Vm): void;
}

/** One request of a VM's set-up. */
export interface SetupStep {
  readonly request: string;
  readonly argument: Uint8Array | number | undefined;
}

/** A VM (KVM_CREATE_VM). Made by `Kvm.createVm`. */
export class Vm implements Disposable, AsyncDisposable {
  readonly memory: VmMemory;
  readonly #handle: VmHandle;
  readonly #owner: VmOwner;
  readonly #vcpus = new Set<Vcpu>();
  readonly #setup: SetupStep[] = [];
  readonly #private = new PrivateRanges();
  readonly #extensions = new Map<CapabilityName, number>();
  #irqchip: 'none' | 'kernel' | 'split' = 'none';
  #dirtyRingBytes = 0;
  #closed = false;
  #stats: StatsReader | undefined;

  /** @internal */
  constructor(handle: VmHandle, owner: VmOwner) {
    this.#handle = handle;
    this.#owner = owner;
    this.memory = new VmMemory(handle);
  }

  get closed(): boolean {
    return this.#closed;
  }

  /** KVM_X86_*_VM, as given to createVm. */
  get type(): number {
    return this.#owner.type;
  }

  /** Where interrupt controllers are: nowhere, all in the kernel, or only the LAPICs. */
  get irqchip(): 'none' | 'kernel' | 'split' {
    return this.#irqchip;
  }

  /** The same as `Kvm.cloneVm` of the Kvm that made it. */
  clone(): Vm {
    if (this.#closed) throw new KvmClosedError('Vm');
    return this.#owner.clone(this);
  }

  /**
   * Makes memory, interrupt controllers, clock and vCPUs of this VM what those of `to` are: its clone, or one it is a
   * clone of. Both must be idle. What is not cloned stays as it is.
   * @throws RangeError when they differ in memslots or vCPUs or have private memory, VcpuBusyError while a vCPU runs.
   */
  rewind(to: Vm): void {
    if (!(to instanceof Vm)) throw new TypeError('to must be a Vm');
    if (this.#closed || to.closed) throw new KvmClosedError('Vm');
    rewindTo(this, to);
  }

  /** @internal What was done to shape this VM. */
  get setup(): readonly SetupStep[] {
    return this.#setup;
  }

  /** The open vCPUs, in the order of creation. */
  get vcpus(): readonly Vcpu[] {
    return [...this.#vcpus];
  }

  /** KVM_CHECK_EXTENSION on the VM: 0 when absent. */
  checkExtension(capability: CapabilityName | number): number {
    return this.ioctl('KVM_CHECK_EXTENSION', capabilityNumber(capability));
  }

  /** KVM_ENABLE_CAP on the VM. */
  enableCap(capability: CapabilityName | number, options: EnableCapOptions = {}): void {
    this.ioctl('KVM_ENABLE_CAP', encodeEnableCap(capability, options));
  }

  /** KVM_SET_TSS_ADDR: three pages below 4 GiB that Intel needs for real mode. Before the first vCPU runs. */
  setTssAddr(gpa: number): void {
    this.ioctl('KVM_SET_TSS_ADDR', checkInteger('gpa', gpa, 0, 0xffffffff));
  }

  /** KVM_SET_IDENTITY_MAP_ADDR: one page below 4 GiB. Before any vCPU is created. */
  setIdentityMapAddr(gpa: number): void {
    const words = new BigUint64Array([BigInt(checkInteger('gpa', gpa, 0, 0xffffffff))]);
    this.ioctl('KVM_SET_IDENTITY_MAP_ADDR', new Uint8Array(words.buffer));
  }

  /** KVM_CREATE_IRQCHIP: PIC, IOAPIC and LAPICs in the kernel. Before any vCPU is created. */
  createIrqchip(): void {
    this.ioctl('KVM_CREATE_IRQCHIP');
  }

  /** KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP): LAPICs in the kernel, `pins` IOAPIC inputs in userspace. */
  createSplitIrqchip(pins = 24): void {
    this.enableCap('KVM_CAP_SPLIT_IRQCHIP', { args: [BigInt(checkInteger('pins', pins, 0, 0xffffffff))] });
  }

  /** KVM_CREATE_PIT2: a timer chip in the kernel. After createIrqchip(). */
  createPit(options: { speakerDummy?: boolean } = {}): void {
    const words = new Uint32Array(PIT_CONFIG_SIZE / 4);
    words[0] = checkFlag('speakerDummy', checkObject('options', options).speakerDummy) ? 1 : 0;
    this.ioctl('KVM_CREATE_PIT2', new Uint8Array(words.buffer));
  }

  /** KVM_GET_PIT2: struct kvm_pit_state2, 112 bytes. */
  getPit(): Uint8Array {
    const bytes = new Uint8Array(PIT_STATE_SIZE);
    this.ioctl('KVM_GET_PIT2', bytes);
    return bytes;
  }

  /** KVM_SET_PIT2. */
  setPit(state: Uint8Array): void {
    this.ioctl('KVM_SET_PIT2', checkBytes('state', state));
  }

  /** KVM_GET_IRQCHIP: struct kvm_irqchip, 520 bytes, of one controller. */
  getIrqchip(chip: IrqChip): Uint8Array {
    const words = new Uint32Array(IRQCHIP_SIZE / 4);
    words[0] = checkName('chip', chip, IRQ_CHIPS);
    const bytes = new Uint8Array(words.buffer);
    this.ioctl('KVM_GET_IRQCHIP', bytes);
    return bytes;
  }

  /** KVM_SET_IRQCHIP: what getIrqchip() gave; the structure says which controller it is. */
  setIrqchip(state: Uint8Array): void {
    this.ioctl('KVM_SET_IRQCHIP', checkBytes('state', state));
  }

  /** KVM_SET_GSI_ROUTING: replaces the whole table. */
  setGsiRouting(routes: Iterable<GsiRoute>): void {
    this.ioctl('KVM_SET_GSI_ROUTING', encodeRouting(routes));
  }

  /** KVM_IRQFD: signalling `event` raises `gsi`. `resample` is signalled when a level interrupt gets its EOI. */
  addIrqfd(event: EventFd, gsi: number, options: { resample?: EventFd } = {}): void {
    const { resample } = checkObject('options', options);
    this.ioctl('KVM_IRQFD', encodeIrqfd(fdOf(event), gsi, false, resample && fdOf(resample)));
  }

  /** KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN. */
  removeIrqfd(event: EventFd, gsi: number): void {
    this.ioctl('KVM_IRQFD', encodeIrqfd(fdOf(event), gsi, true, undefined));
  }

  /** KVM_IOEVENTFD: the guest's write signals `event` and does not exit. */
  addIoeventfd(event: EventFd, on: IoEvent): void {
    this.ioctl('KVM_IOEVENTFD', encodeIoeventfd(fdOf(event), on, false));
  }

  /** KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN; `on` as it was given. */
  removeIoeventfd(event: EventFd, on: IoEvent): void {
    this.ioctl('KVM_IOEVENTFD', encodeIoeventfd(fdOf(event), on, true));
  }

  /** KVM_IRQ_LINE: sets an input of the in-kernel irqchip. */
  setIrqLine(irq: number, level: 0 | 1): void {
    const words = new Uint32Array([
      checkInteger('irq', irq, 0, 0xffffffff),
      checkInteger('level', level, 0, 1),
    ]);
    this.ioctl('KVM_IRQ_LINE', new Uint8Array(words.buffer));
  }

  /** KVM_SIGNAL_MSI: how many vCPUs took it, 0 when the guest blocked it. */
  signalMsi(msi: { address: bigint; data: number }): number {
    const { address, data } = checkObject('msi', msi);
    const view = new DataView(new ArrayBuffer(32));
    view.setBigUint64(0, checkU64('address', address), true);
    view.setUint32(8, checkInteger('data', data, 0, 0xffffffff), true);
    return this.ioctl('KVM_SIGNAL_MSI', new Uint8Array(view.buffer));
  }

  /** KVM_GET_CLOCK. */
  getClock(): Clock {
    const bytes = new Uint8Array(CLOCK_SIZE);
    this.ioctl('KVM_GET_CLOCK', bytes);
    return decodeClock(bytes);
  }

  /** KVM_SET_CLOCK. */
  setClock(clock: Clock): void {
    this.ioctl('KVM_SET_CLOCK', encodeClock(clock));
  }

  /**
   * KVM_ENABLE_CAP(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): dirtyLog() no longer clears, clearDirtyLog() does.
   * `initiallySet`: a new log has every page, and pages are write-protected at their first clearing only.
   */
  enableManualDirtyLog(options: { initiallySet?: boolean } = {}): void {
    const bits = checkFlag('initiallySet', checkObject('options', options).initiallySet) ? 3n : 1n;
    this.enableCap('KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2', { args: [bits] });
  }

  /**
   * KVM_ENABLE_CAP(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, or KVM_CAP_DIRTY_LOG_RING): vCPUs made from now on record the pages
   * they write in slots with `logDirtyPages` in a ring of `entries` (a power of two, at least 512 in practice).
   * There is no dirty log then. Before any vCPU is created.
   */
  enableDirtyRing(entries: number): void {
    const bytes = checkInteger('entries', entries, 256, 65536) * DIRTY_ENTRY_SIZE;
    const acquire = this.checkExtension('KVM_CAP_DIRTY_LOG_RING_ACQ_REL') > 0;
    const capability = acquire ? 'KVM_CAP_DIRTY_LOG_RING_ACQ_REL' : 'KVM_CAP_DIRTY_LOG_RING';
    this.enableCap(capability, { args: [BigInt(bytes)] });
  }

  /** KVM_RESET_DIRTY_RINGS: harvested entries are free again. @returns how many. */
  resetDirtyRings(): number {
    return this.ioctl('KVM_RESET_DIRTY_RINGS');
  }

  /**
   * KVM_SET_MEMORY_ATTRIBUTES: from now on the guest's accesses to [gpa, gpa + size), whole pages, go to the private
   * pages of the slot's guest_memfd (true) or to the shared ones, which this process sees. Also while vCPUs run. Both
   * keep their contents; where there is no guest_memfd, an access to private memory is a `memory-fault` exit.
   * @throws KvmUnsupportedError for a VM without KVM_CAP_MEMORY_ATTRIBUTES: one of type `default`, for one.
   * @throws KvmError EINVAL for no size, or what is not whole pages.
   */
  setMemoryPrivate(gpa: number, size: number, isPrivate: boolean): void {
    const words = new BigUint64Array(4);
    words[0] = BigInt(checkInteger('gpa', gpa, 0));
    words[1] = BigInt(checkInteger('size', size, 0));
    words[2] = checkFlag('isPrivate', isPrivate) ? ATTRIBUTE_PRIVATE : 0n;
    const request = 'KVM_SET_MEMORY_ATTRIBUTES';
    const capability = 'KVM_CAP_MEMORY_ATTRIBUTES';
    // Asked first: of a VM that has private memory nowhere the kernel says EINVAL, as of any wrong attribute.
    if ((this.#cachedExtension(capability) & Number(ATTRIBUTE_PRIVATE)) === 0)
      throw new KvmUnsupportedError(capability, request, undefined, PRIVATE_ADVICE);
    this.ioctl(request, new Uint8Array(words.buffer));
  }

  /** @internal Whether any guest-physical page is private. */
  get hasPrivateMemory(): boolean {
    return !this.#private.isEmpty;
  }

  /** Starts the vCPU's native thread, which makes KVM_CREATE_VCPU. @throws KvmError EEXIST when `id` is taken. */
  createVcpu(id = 0): Vcpu {
    const vcpu = new Vcpu(
      {
        handle: this.#handle,
        hasLapic: this.#irqchip !== 'none',
        dirtyRingBytes: this.#dirtyRingBytes,
        checkExtension: (capability) => this.#cachedExtension(capability),
        msrIndices: () => this.#owner.msrIndices(),
        forget: (closed) => this.#vcpus.delete(closed),
      },
      id,
    );
    this.#vcpus.add(vcpu);
    return vcpu;
  }

  #requireStats(): StatsReader {
    const handle = this.#handle;
    this.#stats ??= new StatsReader(
      this,
      () => native().vmStats(handle),
      (words) => native().vmReadStats(handle, words),
    );
    return this.#stats;
  }

  /** The VM's statistics by name (KVM_GET_STATS_FD), also while vCPUs run. @throws KvmUnsupportedError */
  stats(): Stats {
    return this.#requireStats().read();
  }

  /** What each statistic is: type, unit, scale, buckets. */
  statsSchema(): StatSchema[] {
    return this.#requireStats().schema();
  }

  /**
   * Kicks and joins the vCPU threads (at most 3 s each; a KVM_RUN that is stuck in the kernel is left behind),
   * closes the fds and gives the memory back. Pending runs reject with KvmClosedError. Idempotent.
   */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    native().vmClose(this.#handle);
    for (const vcpu of this.#vcpus) vcpu.close();
    this.memory.retire();
    this.#owner.forget(this);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }

  /**
   * Any VM request of the addon's table by its KVM_ name, on raw bytes. The buffer must be as long as the request's
   * structure. @returns the ioctl's result.
   */
  ioctl(request: string, argument?: Uint8Array | number): number {
    const row = typeof request === 'string' ? native().ioctls.vm[request] : undefined;
    if (row === undefined)
      throw new TypeError(
        `this is not a VM request of this library: ${typeof request === 'string' ? request : typeof request}`,
      );
    const result = native().vmIoctl(this.#handle, row, argument);
    if (SETUP.has(request)) this.#record(request, argument);
    if (request === 'KVM_SET_MEMORY_ATTRIBUTES' && argument instanceof Uint8Array)
      this.#private.set(argument);
    return result;
  }

  #record(request: string, argument: Uint8Array | number | undefined): void {
    this.#setup.push({ request, argument: argument instanceof Uint8Array ? argument.slice() : argument });
    if (request === 'KVM_CREATE_IRQCHIP') this.#irqchip = 'kernel';
    if (request !== 'KVM_ENABLE_CAP' || !(argument instanceof Uint8Array)) return;
    const view = new DataView(argument.buffer, argument.byteOffset);
    const capability = view.getUint32(0, true);
    if (capability === capabilityNumber('KVM_CAP_SPLIT_IRQCHIP')) this.#irqchip = 'split';
    if (
      capability === capabilityNumber('KVM_CAP_DIRTY_LOG_RING') ||
      capability === capabilityNumber('KVM_CAP_DIRTY_LOG_RING_ACQ_REL')
    ) {
      this.#dirtyRingBytes = Number(view.getBigUint64(8, true));
    }
  }

  /** For what does not change under a VM; snapshots ask at every turn. */
  #cachedExtension(capability: CapabilityName): number {
    if (this.#closed) throw new KvmClosedError('Vm');
    let value = this.#extensions.get(capability);
    if (value === undefined) {
      value = this.checkExtension(capability);
      this.#extensions.set(capability, value);
    }
    return value;
  }
}

function fdOf(event: EventFd): number {
  if (!(event instanceof EventFd)) throw new TypeError('this must be an EventFd');
  return event.fd;
}
