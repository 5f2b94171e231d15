// SPDX-License-Identifier: Apache-2.0
// Memory the kernel does not manage: above a "mem=" limit it has no struct page, and /dev/mem maps it.
import { closeSync, openSync, readFileSync } from 'node:fs';
import type { HostProbe } from './host.ts';

/** Bytes of physical memory that nobody uses. */
export interface UnmanagedRange {
  readonly address: number;
  readonly size: number;
}

const PARAMETER = 'kvm.allow_unsafe_mappings';
/** The kernel's memory map works in sections of this size: only whole ones are sure to have no struct page. */
const SECTION = 128 * 1024 * 1024;
const LARGE_PAGE = 2 * 1024 * 1024;

export interface UnmanagedQuestion {
  readonly commandLine: string;
  readonly iomem: string;
  /** What the machine really has, where the caller knows (the lab); else the firmware's map is asked. */
  readonly memoryBytes?: number;
  /** End addresses (exclusive) of usable memory in the firmware's own map. */
  readonly firmwareEnds: readonly number[];
}

/** Finds the memory that "mem=" hides; pure, so that it can be tested with any machine's texts. */
export function findHidden(question: UnmanagedQuestion): UnmanagedRange | { readonly reason: string } {
  const limit = /(?:^|\s)mem=(\d+)([KMG]?)(?=\s|$)/i.exec(question.commandLine);
  if (!limit) {
    return {
      reason: `this kernel manages all memory: boot it with mem=SIZE below what is there, ${PARAMETER}=1 and iomem=relaxed`,
    };
  }
  const end = Math.max(question.memoryBytes ?? 0, ...question.firmwareEnds);
  const ram = [...question.iomem.matchAll(/^\s*([0-9a-f]+)-([0-9a-f]+) : System RAM$/gm)];
  const managed = Math.max(0, ...ram.map((range) => Number.parseInt(range[2]!, 16) + 1));
  if (managed <= 1) {
    return { reason: '/proc/iomem shows no addresses: reading them needs CAP_SYS_ADMIN' };
  }
  const address = Math.ceil(managed / SECTION) * SECTION;
  // Firmware tables and devices may lie above: what is below the first of them is free.
  const others = [...question.iomem.matchAll(/^([0-9a-f]+)-[0-9a-f]+ : (?!System RAM$)(.*)$/gm)]
    .map((range) => Number.parseInt(range[1]!, 16))
    .filter((start) => start >= address);
  const size = Math.floor((Math.min(end, ...others) - address) / LARGE_PAGE) * LARGE_PAGE;
  if (size < SECTION) {
    return {
      reason: `mem=${limit[1]}${limit[2]} leaves less than 128 MiB of memory from ${hex(address)} on: choose a lower limit`,
    };
  }
  return { address, size };
}

/** Looks for unmanaged memory on this machine, and whether KVM may use it. */
export function findUnmanaged(
  probe: HostProbe,
  memoryBytes?: number,
): UnmanagedRange | { readonly reason: string } {
  const found = hiddenMemory(memoryBytes);
  if ('reason' in found) return found;
  const allowed = probe.kvm.parameters[PARAMETER];
  if (allowed === 'N' || allowed === '0') {
    return { reason: `${PARAMETER} is off: boot with ${PARAMETER}=1` };
  }
  return found;
}

/** Looks for unmanaged memory that this process can map, whatever KVM makes of it. */
export function hiddenMemory(memoryBytes?: number): UnmanagedRange | { readonly reason: string } {
  const found = findHidden({
    commandLine: read('/proc/cmdline'),
    iomem: read('/proc/iomem'),
    firmwareEnds: firmwareEnds(),
    ...(memoryBytes === undefined ? {} : { memoryBytes }),
  });
  if ('reason' in found) return found;
  try {
    closeSync(openSync('/dev/mem', 'r+'));
  } catch (error) {
    return {
      reason: `/dev/mem cannot be opened (${(error as Error).message}): CONFIG_DEVMEM and root are needed`,
    };
  }
  return found;
}

function firmwareEnds(): number[] {
  const ends: number[] = [];
  for (let i = 0; ; i += 1) {
    const type = read(`/sys/firmware/memmap/${i}/type`).trim();
    if (type === '') return ends;
    if (type === 'System RAM') ends.push(Number(read(`/sys/firmware/memmap/${i}/end`).trim()) + 1);
  }
}

function read(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
