// SPDX-License-Identifier: Apache-2.0
import { existsSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { errorFromNative } from './errors.ts';

declare const brand: unique symbol;
/** An object of the addon; only the addon can make or read one. */
export interface Handle<Kind extends string> {
  readonly [brand]: Kind;
}
export type SystemHandle = Handle<'system'>;
export type VmHandle = Handle<'vm'>;
export type VcpuHandle = Handle<'vcpu'>;
export type RegionHandle = Handle<'region'>;
export type EventHandle = Handle<'event'>;
export type UserfaultHandle = Handle<'userfault'>;

/** backing, fd, offset, pageShift, hugePages, bits: see native/binding/wrap_memory.h. */
export type MemoryRequest = readonly [number, number, number, number, number, number];

/** name, flags, exponent, bucket size, index and count in 64-bit words. */
export type StatRow = [string, number, number, number, number, number];

/** What is called by the thousand, bound to its vCPU. struct kvm_regs is in the first bytes of a shared buffer. */
export interface VcpuCalls {
  ioctl(ioctl: number, argument?: Uint8Array | number): number;
  /** Three words a request: row, offset in `bytes`, size. See kvm::call_list. */
  ioctls(list: Uint32Array, bytes: Uint8Array, first: number, end: number): number;
  runSync(): number;
  getRegs(): void;
  setRegs(): void;
}

/** Bound to their VM. */
export interface VmCalls {
  /** -1: the lowest free slot. The number of the slot. */
  addMemory(slot: number, gpa: number, size: number, flags: number, request?: MemoryRequest): number;
  removeMemory(slot: number): void;
  /** What the calls on a region take. */
  region(slot: number): RegionHandle;
}

/** The addon's functions: handle first, structures as bytes. */
export interface Native {
  readonly ioctls: { readonly [Scope in 'system' | 'vm' | 'vcpu']: Readonly<Record<string, number>> };
  setErrorFactory(make: (kind: string, ...details: unknown[]) => Error): void;
  detach(buffer: ArrayBuffer): void;

  systemOpen(path: string): SystemHandle;
  systemIoctl(system: SystemHandle, ioctl: number, argument?: Uint8Array | number): number;
  systemCreateVm(system: SystemHandle, type: number): VmHandle;
  systemClose(system: SystemHandle): void;
  runTime(): number;

  vmIoctl(vm: VmHandle, ioctl: number, argument?: Uint8Array | number): number;
  vmCreateVcpu(vm: VmHandle, id: number, onExit: (errno: number) => void): VcpuHandle;
  vmCalls(vm: VmHandle): VmCalls;
  vmStats(vm: VmHandle): StatRow[];
  vmReadStats(vm: VmHandle, words: BigUint64Array): void;
  vmClose(vm: VmHandle): void;

  regionUpdate(region: RegionHandle, gpa: number, flags: number): void;
  regionSwap(region: RegionHandle, request: MemoryRequest | undefined, copy: boolean): void;
  regionDiscard(region: RegionHandle, offset: number, length: number, onlyPrivate: boolean): void;
  regionAdvise(region: RegionHandle, offset: number, length: number, advice: number): void;
  regionProtect(region: RegionHandle, offset: number, length: number, protection: number): void;
  regionMigrate(region: RegionHandle, offset: number, length: number, node: number): Int32Array;
  regionCopyFrom(region: RegionHandle, source: RegionHandle, isFresh: boolean): void;
  regionClearDirtyLog(region: RegionHandle, firstPage: number, pages: number, bitmap: Uint8Array): void;
  regionWatchFaults(
    region: RegionHandle,
    offset: number,
    length: number,
    minor: boolean,
    onReady: () => void,
  ): UserfaultHandle;
  regionDirtyLog(region: RegionHandle): Uint8Array;
  regionHva(region: RegionHandle): bigint;
  regionWindow(region: RegionHandle, offset: number, length: number): ArrayBuffer;

  timestamp(): bigint;
  /** Fills `times`; [steps done, wrong words, errno of the last KVM_RUN]. */
  runSteps(
    vcpu: VcpuHandle | null,
    regions: readonly RegionHandle[],
    steps: BigUint64Array,
    rounds: number,
    times: Float64Array,
    buffer: Uint8Array,
  ): [number, number, number];

  vcpuCalls(vcpu: VcpuHandle, registers: ArrayBuffer): VcpuCalls;
  vcpuGetNestedState(vcpu: VcpuHandle, out: Uint8Array): number;
  vcpuSetNestedState(vcpu: VcpuHandle, bytes: Uint8Array): void;
  vcpuEnableEvmcs(vcpu: VcpuHandle): number;
  /** KVM_RUN's errno when the run is over already, for vcpuFinish(); else undefined, and the callback has it later. */
  vcpuRun(vcpu: VcpuHandle): number | undefined;
  vcpuFinish(vcpu: VcpuHandle): void;
  vcpuRunWithin(vcpu: VcpuHandle, timeoutMs: number): number;
  vcpuSettle(vcpu: VcpuHandle): number;
  vcpuSetFilter(vcpu: VcpuHandle, rules: BigUint64Array): void;
  vcpuFilterCounts(vcpu: VcpuHandle, out: BigUint64Array): void;
  vcpuMapDirtyRing(vcpu: VcpuHandle, bytes: number): void;
  vcpuHarvest(vcpu: VcpuHandle, out: BigUint64Array): number;
  vcpuXsaveSize(vcpu: VcpuHandle): number;
  vcpuGetXsave(vcpu: VcpuHandle, out: Uint8Array): void;
  vcpuSetXsave(vcpu: VcpuHandle, bytes: Uint8Array): void;
  vcpuKick(vcpu: VcpuHandle): void;
  vcpuRunPage(vcpu: VcpuHandle): ArrayBuffer;
  vcpuStats(vcpu: VcpuHandle): StatRow[];
  vcpuReadStats(vcpu: VcpuHandle, words: BigUint64Array): void;
  vcpuClose(vcpu: VcpuHandle): void;

  eventCreate(semaphore: boolean, onReady: () => void): EventHandle;
  eventFd(event: EventHandle): number;
  eventSignal(event: EventHandle, value: bigint): void;
  eventTake(event: EventHandle): bigint | undefined;
  eventWait(event: EventHandle): void;
  eventClose(event: EventHandle): void;

  userfaultRead(userfault: UserfaultHandle): [number, boolean] | undefined;
  userfaultWait(userfault: UserfaultHandle): void;
  userfaultCopy(userfault: UserfaultHandle, offset: number, bytes: Uint8Array): void;
  userfaultZero(userfault: UserfaultHandle, offset: number, length: number): void;
  userfaultContinue(userfault: UserfaultHandle, offset: number, length: number): void;
  userfaultClose(userfault: UserfaultHandle): void;
}

// lib/kvm and dist/kvm are equally deep below the package.
const packageRoot = fileURLToPath(new URL('../..', import.meta.url));

function candidates(root: string): string[] {
  const prebuilds = join(root, 'prebuilds', 'linux-x64');
  const shipped = existsSync(prebuilds)
    ? readdirSync(prebuilds)
        .filter((name) => name.endsWith('.node'))
        .map((name) => join(prebuilds, name))
    : [];
  // What was built here fits here: a checkout's own build, or one made at installation because the shipped did not.
  return [join(root, 'build', 'Release', 'nvmx.node'), ...shipped];
}

/** What to do when no addon can be loaded; exported for its test. */
export function loadFailure(
  attempts: { path: string; reason: string }[],
  platform: string,
  arch: string,
): Error {
  const lines = ['nvmx cannot load its native addon.'];
  for (const { path, reason } of attempts) lines.push(`  tried ${path}: ${reason}`);
  lines.push('Possible solutions:');
  if (platform !== 'linux' || arch !== 'x64') {
    lines.push(
      `- run it on Linux x64: this is ${platform} ${arch}, and nested VMX is a matter of x86 KVM only`,
    );
  } else {
    lines.push(
      '- in a clone of the repository, build it: npm run build (needs g++ 12 or newer, make and python3)',
    );
    lines.push(
      '- in a project that depends on nvmx, build it there: npm rebuild nvmx --ignore-scripts=false',
    );
    lines.push(
      '- when the message names GLIBC, that is the way too: the shipped addon is for Debian 12 and newer',
    );
    lines.push('- when node_modules comes from another machine, run npm ci on this one');
  }
  return Object.assign(new Error(lines.join('\n')), { code: 'ERR_NVMX_ADDON' });
}

let loaded: Native | undefined;

/** The addon, loaded at the first call: importing nvmx must stay cheap for those who only want types. */
export function native(): Native {
  if (loaded) return loaded;
  const require = createRequire(import.meta.url);
  const attempts: { path: string; reason: string }[] = [];
  for (const path of candidates(packageRoot)) {
    if (!existsSync(path)) {
      attempts.push({ path, reason: 'no such file' });
      continue;
    }
    try {
      const addon = require(path) as Native;
      addon.setErrorFactory(errorFromNative);
      loaded = addon;
      return addon;
    } catch (error) {
      attempts.push({ path, reason: error instanceof Error ? error.message : String(error) });
    }
  }
  throw loadFailure(attempts, process.platform, process.arch);
}
