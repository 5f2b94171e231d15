// SPDX-License-Identifier: Apache-2.0
import type { CapabilityName } from './capabilities.ts';
import { checkBytes, checkInteger, checkObject } from './check.ts';
import { type DirtyPage, DirtyRingReader } from './dirty_ring.ts';
import { type EnableCapOptions, encodeEnableCap } from './enable_cap.ts';
import { KvmClosedError, VcpuBusyError } from './errors.ts';
import { decodeExit, type Exit } from './exit.ts';
import { type ExitRule, encodeRules } from './exit_filter.ts';
import { KvmRun } from './kvm_run.ts';
import { native, type VcpuCalls, type VcpuHandle, type VmHandle } from './loader.ts';
import { getNestedState, setNestedState } from './nested_state.ts';
import { restoreVcpu, saveVcpu, type VcpuSnapshot } from './snapshot.ts';
import { type StatSchema, type Stats, StatsReader } from './stats.ts';
import { give } from './turns.ts';
import { VcpuMsrs } from './vcpu_msrs.ts';
import { VcpuState } from './vcpu_state.ts';

const CR8_AT = 16;

/** What a vCPU needs of its VM. */
export interface VcpuOwner {
  readonly handle: VmHandle;
  readonly hasLapic: boolean;
  /** Bytes of the dirty ring, 0 for none. */
  readonly dirtyRingBytes: number;
  checkExtension(capability: CapabilityName): number;
  msrIndices(): readonly number[];
  forget(vcpu: Vcpu): void;
}

/** Keeps a vCPU from being collected while somebody awaits its run. */
const running = new Set<Vcpu>();

interface PendingRun {
  resolve(exit: Exit): void;
  reject(reason: unknown): void;
  signal: AbortSignal | undefined;
}

/**
 * A vCPU and its native thread. State calls are synchronous; during a run they throw {@link VcpuBusyError}.
 * Made by `Vm.createVcpu`.
 */
export class Vcpu extends VcpuState implements Disposable {
  readonly id: number;
  readonly #owner: VcpuOwner;
  readonly #handle: VcpuHandle;
  readonly #calls: VcpuCalls;
  readonly #page: ArrayBuffer;
  readonly #view: DataView<ArrayBuffer>;
  readonly #kvmRun: KvmRun;
  readonly #requests: Readonly<Record<string, number>>;
  readonly #msrs: VcpuMsrs;
  #enabled: Uint8Array[] = [];
  #evmcs = false;
  #settled = true;
  #pending: PendingRun | undefined;
  #closed = false;
  #stats: StatsReader | undefined;
  #ruleCount = 0;
  #harvester: DirtyRingReader | undefined;

  /** @internal */
  constructor(owner: VcpuOwner, id: number) {
    checkInteger('id', id, 0, 0xffffffff);
    // The addon holds the callback, so a strong `this` in it would keep an abandoned vCPU alive for ever.
    const self: { weak?: WeakRef<Vcpu> } = {};
    const onExit = (errno: number) => {
      const vcpu = self.weak?.deref();
      if (vcpu) give(() => vcpu.#finish(errno));
    };
    const handle = native().vmCreateVcpu(owner.handle, id, onExit);
    let calls: VcpuCalls | undefined;
    super((registers) => {
      calls = native().vcpuCalls(handle, registers);
      return calls;
    });
    self.weak = new WeakRef<Vcpu>(this);
    this.id = id;
    this.#owner = owner;
    this.#handle = handle;
    this.#calls = calls!;
    this.#page = native().vcpuRunPage(this.#handle);
    this.#view = new DataView(this.#page);
    this.#kvmRun = new KvmRun(this.#page);
    this.#requests = native().ioctls.vcpu;
    this.#msrs = new VcpuMsrs(this, owner.msrIndices);
    if (owner.dirtyRingBytes > 0) native().vcpuMapDirtyRing(this.#handle, owner.dirtyRingBytes);
  }

  /** @internal */
  get handle(): VcpuHandle {
    if (this.#closed) throw new KvmClosedError('Vcpu');
    return this.#handle;
  }

  get state(): 'idle' | 'running' | 'closed' {
    return this.#closed ? 'closed' : this.#pending ? 'running' : 'idle';
  }

  /** struct kvm_run and what follows it (PIO data), shared with the kernel; detached after close(). */
  get runPage(): ArrayBuffer {
    return this.#page;
  }

  /** The same page, typed. */
  get kvmRun(): KvmRun {
    return this.#kvmRun;
  }

  override ioctl(request: string, argument?: Uint8Array | number): number {
    if (this.#pending) throw new VcpuBusyError();
    const name = typeof request === 'string' ? request : typeof request;
    const row = name === request ? this.#requests[name] : undefined;
    if (row === undefined) throw new TypeError(`this is not a vCPU request of this library: ${name}`);
    if (request === 'KVM_SET_CPUID2') this.#msrs.forget();
    return this.#calls.ioctl(row, argument);
  }

  /** @internal Requests `first` to `end` of an `IoctlList`. @returns where it stopped, or `end`. */
  ioctls(list: Uint32Array, bytes: Uint8Array, first: number, end: number): number {
    if (this.#pending) throw new VcpuBusyError();
    return this.#calls.ioctls(list, bytes, first, end);
  }

  protected override setRunCr8(value: bigint): void {
    this.#view.setBigUint64(CR8_AT, value, true);
  }

  /** KVM_ENABLE_CAP on the vCPU. For KVM_CAP_HYPERV_ENLIGHTENED_VMCS use {@link enableEnlightenedVmcs}. */
  enableCap(capability: CapabilityName | number, options: EnableCapOptions = {}): void {
    const bytes = encodeEnableCap(capability, options);
    this.ioctl('KVM_ENABLE_CAP', bytes);
    this.#enabled.push(bytes);
    this.#msrs.forget();
  }

  /** KVM_ENABLE_CAP(KVM_CAP_HYPERV_ENLIGHTENED_VMCS): the eVMCS versions the kernel supports, low | high << 8. */
  enableEnlightenedVmcs(): number {
    const version = native().vcpuEnableEvmcs(this.#handle);
    this.#evmcs = true;
    this.#msrs.forget();
    return version;
  }

  /** @internal The capabilities enabled on this vCPU, in order, for a clone. */
  get enabledCaps(): { readonly caps: readonly Uint8Array[]; readonly evmcs: boolean } {
    return { caps: this.#enabled, evmcs: this.#evmcs };
  }

  /** Whether the VM has LAPICs in the kernel. @internal */
  get hasLapic(): boolean {
    return this.#owner.hasLapic;
  }

  /** @internal */
  get msrs(): VcpuMsrs {
    return this.#msrs;
  }

  /** @internal */
  checkExtension(capability: CapabilityName): number {
    return this.#owner.checkExtension(capability);
  }

  /** Bytes of the XSAVE area. @internal */
  get xsaveSize(): number {
    return native().vcpuXsaveSize(this.#handle);
  }

  /** KVM_GET_XSAVE2, or KVM_GET_XSAVE, into `room` or new memory: at least 4096 bytes, as large as the kernel has it. */
  getXsave(room?: Uint8Array): Uint8Array {
    const bytes = room === undefined ? new Uint8Array(this.xsaveSize) : checkBytes('room', room);
    native().vcpuGetXsave(this.#handle, bytes);
    return bytes;
  }

  /** KVM_SET_XSAVE. @throws RangeError for fewer bytes than {@link getXsave} gives. */
  setXsave(bytes: Uint8Array): void {
    native().vcpuSetXsave(this.#handle, checkBytes('bytes', bytes));
  }

  /**
   * KVM_GET_NESTED_STATE: a raw struct kvm_nested_state, 128 bytes when only the header says anything.
   * @param size room for it; default what KVM_CAP_NESTED_STATE reports. Too small is E2BIG.
   * @throws KvmUnsupportedError when this KVM has no nested virtualization.
   */
  getNestedState(size?: number): Uint8Array {
    return getNestedState(this, size);
  }

  /**
   * KVM_SET_NESTED_STATE.
   * @param bytes a raw struct kvm_nested_state; the header alone (128 bytes) is legal.
   * @throws RangeError when it is shorter than a header or than its own `size` field claims.
   */
  setNestedState(bytes: Uint8Array): void {
    setNestedState(this, bytes);
  }

  #requireStats(): StatsReader {
    if (this.#closed) throw new KvmClosedError('Vcpu');
    const handle = this.#handle;
    this.#stats ??= new StatsReader(
      this,
      () => native().vcpuStats(handle),
      (words) => native().vcpuReadStats(handle, words),
    );
    return this.#stats;
  }

  /** The vCPU's statistics by name. The first call must not happen during a run; later ones may. */
  stats(): Stats {
    return this.#requireStats().read();
  }

  /** What each statistic is: type, unit, scale, buckets. */
  statsSchema(): StatSchema[] {
    return this.#requireStats().schema();
  }

  /**
   * Everything of the vCPU that KVM keeps, L2 and all; the vCPU stays as it is. See docs/api-kvm.md for the order.
   * @throws KvmPendingExitError when completing the last exit led to another one: handle that first.
   */
  save(): VcpuSnapshot {
    return saveVcpu(this);
  }

  /**
   * Puts a snapshot into this vCPU, of this or another VM with the same memory.
   * @throws KvmMsrError for an MSR that the kernel refuses and that has another value now.
   */
  restore(snapshot: VcpuSnapshot): void {
    restoreVcpu(this, snapshot);
  }

  /**
   * Completes the last exit without entering the guest: KVM_RUN with immediate_exit. The data of an `in` or of an
   * MMIO read is taken now. @returns another exit, if that was needed (an access that spans more than one).
   */
  settle(): Exit | undefined {
    if (this.#pending) throw new VcpuBusyError();
    const exit = this.lastExit(native().vcpuSettle(this.#handle));
    return this.#settled ? undefined : exit;
  }

  /** Whether the last exit is complete. @internal */
  get settled(): boolean {
    return this.#settled;
  }

  /**
   * Exits that runs from now on count and answer in native code; everything else comes out as before. The first rule
   * that matches applies. Replaces earlier rules, counts begin at 0; `[]` turns it off.
   */
  setExitFilter(rules: Iterable<ExitRule>): void {
    const words = encodeRules(rules);
    native().vcpuSetFilter(this.#handle, words);
    this.#ruleCount = words.length / 4;
  }

  /** How often each rule applied, also while the guest runs. */
  exitCounts(): bigint[] {
    const counts = new BigUint64Array(this.#ruleCount);
    native().vcpuFilterCounts(this.#handle, counts);
    return [...counts];
  }

  /**
   * The pages written since the last harvest, also while the guest runs (Vm.enableDirtyRing). The kernel uses the
   * entries again, and records the pages again, after `Vm.resetDirtyRings()`.
   */
  harvestDirtyRing(): DirtyPage[] {
    this.#harvester ??= new DirtyRingReader();
    return this.#harvester.read(this.#handle);
  }

  /**
   * KVM_RUN on the vCPU's own thread.
   *
   * Resolves with the exit; a kick or a signal gives `interrupted`. When `signal` aborts, the run is kicked and the
   * promise rejects with the signal's reason; should a real exit arrive first, that exit is delivered instead, so
   * none is ever lost.
   * @throws KvmClosedError (as a rejection) when the vCPU or its VM is closed meanwhile.
   */
  run(options: { signal?: AbortSignal } = {}): Promise<Exit> {
    return new Promise((resolve, reject) => {
      const { signal } = checkObject('options', options);
      if (signal !== undefined && !(signal instanceof AbortSignal)) {
        throw new TypeError('signal must be an AbortSignal');
      }
      signal?.throwIfAborted();
      const errno = native().vcpuRun(this.#handle);
      signal?.addEventListener('abort', this.#onAbort);
      const pending = { resolve, reject, signal };
      this.#pending = pending;
      running.add(this);
      if (errno !== undefined) queueMicrotask(() => give(() => this.#answer(pending, errno)));
    });
  }

  readonly #onAbort = () => this.kick();

  /** The answer to a run that was over before {@link run} returned. */
  #answer(pending: PendingRun, errno: number): void {
    if (this.#pending !== pending) return;
    native().vcpuFinish(this.#handle);
    this.#finish(errno);
  }

  #finish(errno: number): void {
    const pending = this.#take();
    if (!pending) return;
    try {
      const exit = this.lastExit(errno);
      if (exit.type === 'interrupted' && pending.signal?.aborted) pending.reject(pending.signal.reason);
      else pending.resolve(exit);
    } catch (error) {
      pending.reject(error);
    }
  }

  #take(): PendingRun | undefined {
    const pending = this.#pending;
    this.#pending = undefined;
    running.delete(this);
    pending?.signal?.removeEventListener('abort', this.#onAbort);
    return pending;
  }

  /** @internal What is in the run page after a KVM_RUN that native code made. */
  lastExit(errno: number): Exit {
    const exit = decodeExit(this.#view, errno);
    this.#settled = exit.type === 'interrupted';
    return exit;
  }

  /**
   * KVM_RUN on the calling thread: the quickest way to the next exit, but JavaScript stands still until then. Without
   * `timeoutMs` nobody can kick it: only for guests that are known to exit. With it, the run is on the vCPU's thread
   * and ends as `interrupted` after that time. Older kernels pay an RCU grace period each time a vCPU changes
   * threads, so do not alternate with {@link run}.
   */
  runSync(options?: { timeoutMs?: number }): Exit {
    const timeoutMs = options === undefined ? undefined : checkObject('options', options).timeoutMs;
    if (timeoutMs === undefined) return this.lastExit(this.#calls.runSync());
    const limit = checkInteger('timeoutMs', timeoutMs, 0, 0x7fffffff);
    return this.lastExit(native().vcpuRunWithin(this.#handle, limit));
  }

  /**
   * Runs the vCPU for each turn of a `for await` loop, without end: break out of it. When `signal` aborts, the loop
   * throws its reason.
   */
  async *exits(options: { signal?: AbortSignal } = {}): AsyncGenerator<Exit, void, undefined> {
    for (;;) yield await this.run(options);
  }

  /** Makes the run that is under way return `interrupted`. Does nothing when none is. */
  kick(): void {
    if (this.#pending) native().vcpuKick(this.#handle);
  }

  /** Kicks, joins the thread (at most 3 s) and closes the fd; a pending run rejects. Idempotent. */
  close(): void {
    if (this.#closed) return;
    native().vcpuClose(this.#handle);
    this.retire();
    this.#owner.forget(this);
  }

  /** @internal The native side is closed. */
  retire(): void {
    if (this.#closed) return;
    this.#closed = true;
    native().detach(this.#page);
    this.#take()?.reject(new KvmClosedError('Vcpu'));
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
