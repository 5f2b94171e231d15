// SPDX-License-Identifier: Apache-2.0
import { constants } from 'node:os';
import type { Exit } from './exit.ts';

const ADVICE: Readonly<Record<string, string>> = {
  ENOENT:
    'there is no such device: load kvm_intel or kvm_amd (`modprobe kvm_intel`), switch virtualization on in the firmware, or, in a container, pass the device in (`--device /dev/kvm`)',
  EACCES:
    'no permission: run as root or join the group that owns the device (`usermod -aG kvm $USER`, then log in again)',
  EPERM: 'no permission: run as root, or ask who set up this container or sandbox to allow the device',
  ENODEV: 'the kernel has the device node but no driver behind it: load kvm_intel or kvm_amd',
  ENXIO: 'the kernel has the device node but no driver behind it: load kvm_intel or kvm_amd',
  EBUSY: 'another hypervisor owns the virtualization hardware: stop it first',
};

const NAMES = new Map(Object.entries(constants.errno).map(([name, number]) => [number, name]));
NAMES.set(133, 'EHWPOISON');
NAMES.set(11, 'EAGAIN');

function errnoName(errno: number): string {
  return NAMES.get(errno) ?? `E${errno}`;
}

/** What the kernel refused. */
export interface KvmErrorInit {
  /** As the kernel gave it, positive; 0 when no call failed. */
  errno: number;
  syscall: string;
  /** `KVM_CREATE_VM`, or the path for `open`. */
  request?: string;
  code?: string;
  message?: string;
}

/** A system call that KVM refused. `errno` is negative, as everywhere in Node. */
export class KvmError extends Error {
  readonly code: string;
  readonly errno: number;
  readonly syscall: string;
  readonly request: string | undefined;

  constructor(init: KvmErrorInit) {
    const code = init.code ?? errnoName(init.errno);
    super(init.message ?? describe(code, init));
    this.name = 'KvmError';
    this.code = code;
    this.errno = -init.errno;
    this.syscall = init.syscall;
    this.request = init.request;
  }
}

function describe(code: string, { syscall, request }: KvmErrorInit): string {
  if (syscall === 'open') {
    const advice = ADVICE[code];
    return `${code}: cannot open ${request ?? 'the device'}${advice ? `: ${advice}` : ''}`;
  }
  if (code === 'ENOMEM' && request?.startsWith('hugetlb')) {
    return `ENOMEM: no free ${request} pages: reserve some (\`echo 64 > /proc/sys/vm/nr_hugepages\`, or the kernel parameters hugepagesz= and hugepages=)`;
  }
  const what = request ? `${syscall} ${request}` : syscall;
  return `${code}: the kernel refused ${what}`;
}

/** The kernel lacks a capability. `capability` is its `KVM_CAP_*` name; a test skips on it. */
export class KvmUnsupportedError extends KvmError {
  readonly capability: string;

  constructor(capability: string, request: string, errno = constants.errno.EOPNOTSUPP, advice?: string) {
    const what = `${request} needs ${capability}, which this kernel or CPU does not offer`;
    super({ errno, syscall: 'ioctl', request, message: advice ? `${what}: ${advice}` : what });
    this.name = 'KvmUnsupportedError';
    this.capability = capability;
  }
}

/** `KVM_GET_MSRS` or `KVM_SET_MSRS` stopped half-way: the kernel tells how many MSRs it took, not why. */
export class KvmMsrError extends KvmError {
  /** The MSR that was refused. */
  readonly index: number;
  /** How many MSRs before it were read or written. */
  readonly processed: number;

  constructor(request: 'KVM_GET_MSRS' | 'KVM_SET_MSRS', index: number, processed: number) {
    super({
      errno: 0,
      code: 'ERR_KVM_MSR',
      syscall: 'ioctl',
      request,
      message: `${request} refused MSR 0x${index.toString(16)} after ${processed} others: the kernel, the CPUID of the vCPU or the value does not allow it`,
    });
    this.name = 'KvmMsrError';
    this.index = index;
    this.processed = processed;
  }
}

/** A handle was used after `close()`. */
export class KvmClosedError extends Error {
  readonly code = 'ERR_KVM_CLOSED';

  constructor(what: string) {
    super(`this ${what} is closed: it cannot be used any more`);
    this.name = 'KvmClosedError';
  }
}

/** vCPU state was asked for while the guest runs: KVM would block until it exits. */
export class VcpuBusyError extends Error {
  readonly code = 'ERR_KVM_VCPU_BUSY';

  constructor() {
    super('the vCPU is running: await its run(), or kick() it first');
    this.name = 'VcpuBusyError';
  }
}

/** `save()` had to complete the last exit, and that led to another one: `exit`, which is for you to handle. */
export class KvmPendingExitError extends Error {
  readonly code = 'ERR_KVM_PENDING_EXIT';
  readonly exit: Exit;

  constructor(exit: Exit) {
    super(
      `the guest's last access is not complete: it led to another exit (${exit.type}); handle it and save again`,
    );
    this.name = 'KvmPendingExitError';
    this.exit = exit;
  }
}

/** Builds what the addon throws; `kind` is its word for the C++ exception. */
export function errorFromNative(kind: string, ...details: unknown[]): Error {
  switch (kind) {
    case 'closed':
      return new KvmClosedError(String(details[0]));
    case 'busy':
      return new VcpuBusyError();
    default: {
      const [errno, syscall, request, capability] = details as [number, string, string, string];
      // ENOTTY is the kernel's "no such ioctl".
      if (errno === constants.errno.ENOTTY && capability)
        return new KvmUnsupportedError(capability, request, errno);
      return new KvmError({ errno, syscall, ...(request ? { request } : {}) });
    }
  }
}
