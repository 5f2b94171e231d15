// SPDX-License-Identifier: Apache-2.0
import { type CpuidEntry, cpuidBuffer, decodeCpuid } from './abi/cpuid.ts';
import { decodeMsrList, getMsrs, msrListBuffer } from './abi/msrs.ts';
import { type CapabilityName, capabilities, capabilityNumber } from './capabilities.ts';
import { checkInteger, checkIterable, checkObject } from './check.ts';
import { cloneInto } from './clone.ts';
import { native, type SystemHandle } from './loader.ts';
import { Vm } from './vm.ts';

/** KVM_X86_*_VM. */
export const VM_TYPE = {
  default: 0,
  'sw-protected': 1,
  sev: 2,
  'sev-es': 3,
  snp: 4,
  tdx: 5,
} as const;
export type VmTypeName = keyof typeof VM_TYPE;

/**
 * Milliseconds that the vCPUs of this process have spent in KVM_RUN so far, all threads added up; what remains of the
 * wall time is the price of driving them from here.
 */
export function kvmRunTime(): number {
  return native().runTime();
}

/** An open /dev/kvm. */
export class Kvm implements Disposable {
  /** KVM_GET_API_VERSION: 12 since 2007. */
  readonly apiVersion: number;
  readonly #handle: SystemHandle;
  readonly #vms = new Set<Vm>();
  #closed = false;

  private constructor(handle: SystemHandle) {
    this.#handle = handle;
    this.apiVersion = this.#ioctl('KVM_GET_API_VERSION');
  }

  /** Opens the device. @throws KvmError (`syscall: 'open'`) that says what to do. */
  static open(path = '/dev/kvm'): Kvm {
    if (typeof path !== 'string') throw new TypeError('path must be a string');
    return new Kvm(native().systemOpen(path));
  }

  get closed(): boolean {
    return this.#closed;
  }

  /** KVM_CHECK_EXTENSION on the system: 0 when absent. */
  checkExtension(capability: CapabilityName | number): number {
    return this.#ioctl('KVM_CHECK_EXTENSION', capabilityNumber(capability));
  }

  /** KVM_CHECK_EXTENSION for every capability this library has a name for; 0 when absent. */
  capabilities(): Map<CapabilityName, number> {
    const names = Object.keys(capabilities) as CapabilityName[];
    return new Map(names.map((name) => [name, this.checkExtension(name)]));
  }

  /** KVM_CAP_VM_TYPES: the types createVm() takes. Kernels without the capability have the default one. */
  vmTypes(): VmTypeName[] {
    const bits = this.checkExtension('KVM_CAP_VM_TYPES') | 1;
    return (Object.keys(VM_TYPE) as VmTypeName[]).filter((name) => bits & (1 << VM_TYPE[name]));
  }

  /** KVM_GET_EMULATED_CPUID: features KVM emulates, slowly, without support of the CPU. */
  emulatedCpuid(): CpuidEntry[] {
    const bytes = cpuidBuffer(512);
    this.#ioctl('KVM_GET_EMULATED_CPUID', bytes);
    return decodeCpuid(bytes);
  }

  /** KVM_GET_SUPPORTED_CPUID: what the kernel can give to a guest. */
  supportedCpuid(): CpuidEntry[] {
    const bytes = cpuidBuffer(512);
    this.#ioctl('KVM_GET_SUPPORTED_CPUID', bytes);
    return decodeCpuid(bytes);
  }

  /** KVM_GET_SUPPORTED_HV_CPUID: the Hyper-V leaves. */
  supportedHvCpuid(): CpuidEntry[] {
    const bytes = cpuidBuffer(64);
    this.#ioctl('KVM_GET_SUPPORTED_HV_CPUID', bytes);
    return decodeCpuid(bytes);
  }

  /** KVM_GET_MSR_INDEX_LIST: the MSRs to save and restore. */
  msrIndices(): number[] {
    const bytes = msrListBuffer(4096);
    this.#ioctl('KVM_GET_MSR_INDEX_LIST', bytes);
    return decodeMsrList(bytes);
  }

  /** KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs that describe features, such as the VMX capabilities. */
  featureMsrIndices(): number[] {
    const bytes = msrListBuffer(1024);
    this.#ioctl('KVM_GET_MSR_FEATURE_INDEX_LIST', bytes);
    return decodeMsrList(bytes);
  }

  /** KVM_GET_MSRS on the system: values of feature MSRs. @throws KvmMsrError at the first that is none. */
  readFeatureMsrs(indices: Iterable<number>): Map<number, bigint> {
    return getMsrs(checkIterable('indices', indices), (bytes) => this.#ioctl('KVM_GET_MSRS', bytes));
  }

  /** KVM_CREATE_VM; `type` is one of {@link VM_TYPE}. */
  createVm(options: { type?: number } = {}): Vm {
    const type = checkInteger('type', checkObject('options', options).type ?? 0, 0, 0x7fffffff);
    const vm = new Vm(native().systemCreateVm(this.#handle, type), {
      type,
      msrIndices: () => this.#cachedMsrIndices(),
      clone: (source) => this.cloneVm(source),
      forget: (closed) => this.#vms.delete(closed),
    });
    this.#vms.add(vm);
    return vm;
  }

  /**
   * A second VM like `source`, which must be idle: the same set-up, memory with the same contents, interrupt
   * controllers, clock, and vCPUs with the same state, an active L2 included. `source` stays as it is. Memory gets the
   * backing it has there, except that a file of yours is copied to anonymous memory. Not cloned: irqfds, ioeventfds,
   * userfaultfds, exit filters, and capabilities' own side effects.
   * @throws VcpuBusyError when a vCPU of `source` runs, RangeError when it has private memory (setMemoryPrivate).
   */
  cloneVm(source: Vm): Vm {
    if (!(source instanceof Vm)) throw new TypeError('source must be a Vm');
    const clone = this.createVm({ type: source.type });
    try {
      cloneInto(source, clone);
    } catch (error) {
      clone.close();
      throw error;
    }
    return clone;
  }

  #msrs: readonly number[] | undefined;
  #cachedMsrIndices(): readonly number[] {
    this.#msrs ??= this.msrIndices();
    return this.#msrs;
  }

  /** Closes its VMs, then the device. Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    for (const vm of this.#vms) vm.close();
    native().systemClose(this.#handle);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #ioctl(request: string, argument?: Uint8Array | number): number {
    return native().systemIoctl(this.#handle, native().ioctls.system[request]!, argument);
  }
}
