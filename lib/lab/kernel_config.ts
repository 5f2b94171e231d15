// SPDX-License-Identifier: Apache-2.0
import { LabError } from './errors.ts';

/** Values by the option's name without CONFIG_; `n` for one that is off. */
export type KernelConfig = ReadonlyMap<string, string>;

const on = (names: string): [string, string][] =>
  names
    .trim()
    .split(/\s+/)
    .map((name) => [name, 'y']);

/**
 * What the lab kernel has beyond the smallest kernel there is: what Node, KVM with nesting and our tests use, and
 * what a reader of a crash needs. No modules, no drivers, no mitigations, no random layout.
 */
export const LAB_CONFIG: KernelConfig = new Map([
  ...on(
    '64BIT SMP PRINTK PRINTK_TIME TTY UNIX98_PTYS SERIAL_8250 SERIAL_8250_CONSOLE BLK_DEV_INITRD RD_GZIP',
  ),
  ...on('BINFMT_ELF BINFMT_SCRIPT DEVTMPFS PROC_FS PROC_SYSCTL SYSCTL PROC_PAGE_MONITOR SYSFS TMPFS SHMEM'),
  ...on(
    'DEBUG_FS IKCONFIG IKCONFIG_PROC MULTIUSER POSIX_TIMERS SYSVIPC FUTEX EPOLL EVENTFD SIGNALFD TIMERFD',
  ),
  ...on('MEMFD_CREATE MEMBARRIER RSEQ AIO IO_URING ADVISE_SYSCALLS INOTIFY_USER FILE_LOCKING NET UNIX'),
  ...on('HUGETLBFS USERFAULTFD PERF_EVENTS HIGH_RES_TIMERS NO_HZ_IDLE ACPI PCI X86_MSR X86_CPUID'),
  ...on('VIRTUALIZATION KVM KVM_INTEL KVM_IOAPIC KVM_HYPERV KVM_SMM KVM_XEN KVM_SW_PROTECTED_VM'),
  ...on('DEVMEM DEVPORT MIGRATION COMPACTION SWAP TRANSPARENT_HUGEPAGE TRANSPARENT_HUGEPAGE_MADVISE'),
  ...on('BLOCK BLK_DEV BLK_DEV_RAM LIBNVDIMM BLK_DEV_PMEM X86_PMEM_LEGACY MISC_FILESYSTEMS EROFS_FS'),
  ...on('NUMA NUMA_EMU NUMA_MIGRATION'),
  ...on('KALLSYMS BUG DEBUG_BUGVERBOSE UNWINDER_ORC DEBUG_KERNEL MAGIC_SYSRQ FTRACE KPROBES KPROBE_EVENTS'),
  ...on('BPF_SYSCALL CC_OPTIMIZE_FOR_PERFORMANCE KERNEL_LZ4'),
  ['NR_CPUS', '8'],
  ...'STRICT_DEVMEM CPU_MITIGATIONS RANDOMIZE_BASE RELOCATABLE MODULES VT HYPERVISOR_GUEST'
    .split(' ')
    .map((name): [string, string] => [name, 'n']),
]);

/** Types for `nvmx probe` and for tracing; pahole makes them out of debug information. */
export const BTF_CONFIG: KernelConfig = new Map(on('DEBUG_INFO_DWARF_TOOLCHAIN_DEFAULT DEBUG_INFO_BTF'));

/** Without these the result is no lab kernel. */
const REQUIRED = ['64BIT', 'KVM', 'KVM_INTEL', 'SERIAL_8250_CONSOLE', 'BLK_DEV_INITRD', 'DEVTMPFS'];

/** Reads `CONFIG_X=y` and `# CONFIG_X is not set` lines. */
export function parseConfig(text: string, origin: string): KernelConfig {
  const config = new Map<string, string>();
  for (const [index, raw] of text.split('\n').entries()) {
    const line = raw.trim();
    const off = /^# CONFIG_(\w+) is not set$/.exec(line);
    const set = /^CONFIG_(\w+)=(.+)$/.exec(line);
    if (off) config.set(off[1]!, 'n');
    else if (set) config.set(set[1]!, set[2]!);
    else if (line !== '' && !line.startsWith('#')) {
      const why = `${origin}, line ${index + 1}: ${line}`;
      throw new LabError('this is no kernel configuration', why, 'lines are CONFIG_NAME=value');
    }
  }
  return config;
}

export function mergeConfigs(...configs: readonly KernelConfig[]): KernelConfig {
  return new Map(configs.flatMap((config) => [...config]));
}

export function renderConfig(config: KernelConfig): string {
  const lines = [...config].sort(([a], [b]) => (a < b ? -1 : 1));
  return lines
    .map(([name, value]) => (value === 'n' ? `# CONFIG_${name} is not set\n` : `CONFIG_${name}=${value}\n`))
    .join('');
}

/** What was asked for and is not so in the configuration that Kconfig made of it. */
export function unmetOptions(wanted: KernelConfig, made: KernelConfig): string[] {
  return [...wanted]
    .filter(([name, value]) => (made.get(name) ?? 'n') !== value)
    .map(([name, value]) => `CONFIG_${name}=${value} (is ${made.get(name) ?? 'n'})`);
}

/** @throws LabError when KVM or something else that the lab cannot do without is missing */
export function checkRequired(made: KernelConfig): void {
  const missing = REQUIRED.filter((name) => made.get(name) !== 'y');
  if (missing.length === 0) return;
  throw new LabError(
    'this configuration makes no lab kernel',
    `these options are not on: ${missing.map((name) => `CONFIG_${name}`).join(', ')}`,
    'take what turns them off out of --config',
  );
}
