// SPDX-License-Identifier: Apache-2.0
import { readdirSync, readFileSync } from 'node:fs';
import { release, version } from 'node:os';
import { offeredControls, VMX_CAPABILITY_MSRS } from '../guest/index.ts';
import { type CapabilityName, Kvm, KvmError, type Vm } from '../kvm/index.ts';
import { observeBehaviours } from './behaviour.ts';
import {
  type Fingerprint,
  type FingerprintSources,
  fingerprint,
  readStructs,
  readSymbols,
} from './fingerprint.ts';

export interface CpuProbe {
  readonly vendor: string;
  readonly model: string;
  /** As the kernel prints it, such as `0x2000065`; absent where the CPU or hypervisor hides it. */
  readonly microcode?: string;
  readonly online: number;
  /** CPUID says VMX (or SVM) is there for this kernel to use. */
  readonly vmx: boolean;
  readonly svm: boolean;
  /** This kernel itself runs under a hypervisor. */
  readonly hypervisor: boolean;
}

export interface KvmProbe {
  /** `ok`, or why /dev/kvm cannot be used. */
  readonly device: 'ok' | 'missing' | 'denied' | 'unusable';
  readonly problem?: string;
  readonly apiVersion?: number;
  /** The module that does the work: `kvm_intel`, `kvm_amd`, or whatever else drives /dev/kvm. */
  readonly backend?: string;
  /** KVM_CHECK_EXTENSION's answers; 0 means missing. */
  readonly capabilities: Readonly<Record<string, number>>;
  /** `module.parameter` → value as sysfs prints it. */
  readonly parameters: Readonly<Record<string, string>>;
}

/** What this machine is and what its KVM can do. Plain data: it travels from the lab machine as JSON. */
export interface HostProbe {
  readonly kernel: { readonly release: string; readonly version: string; readonly taint: string };
  readonly cpu: CpuProbe;
  readonly kvm: KvmProbe;
  readonly nestedVmx: { readonly usable: boolean; readonly reason: string };
  /** VMX controls this kernel offers an L1 guest (allowed 1-settings of the feature MSRs), by name. */
  readonly vmxControls: Readonly<Record<string, boolean>>;
  readonly fingerprint: Fingerprint;
}

const CAPABILITIES = [
  'KVM_CAP_NR_MEMSLOTS',
  'KVM_CAP_NR_VCPUS',
  'KVM_CAP_MAX_VCPUS',
  'KVM_CAP_NESTED_STATE',
  'KVM_CAP_BINARY_STATS_FD',
  'KVM_CAP_HYPERV_ENLIGHTENED_VMCS',
  'KVM_CAP_GET_MSR_FEATURES',
  'KVM_CAP_IMMEDIATE_EXIT',
  'KVM_CAP_SYNC_REGS',
  'KVM_CAP_READONLY_MEM',
  'KVM_CAP_DIRTY_LOG_RING',
  'KVM_CAP_GUEST_MEMFD',
  'KVM_CAP_GUEST_MEMFD_FLAGS',
  'KVM_CAP_X86_TRIPLE_FAULT_EVENT',
] as const satisfies readonly CapabilityName[];

/** Looks at this machine. Never throws for what a machine may lack: the lack is in the result. */
export function probeHost(devicePath = '/dev/kvm'): HostProbe {
  return look(devicePath).probe;
}

/** The same, and looks for the series wherever it may show: the kernel's symbols, and what L2s see. */
export async function probeDeeply(devicePath = '/dev/kvm'): Promise<HostProbe> {
  const { probe, sources } = look(devicePath);
  const symbols = sources.structs ? { notes: [] } : readSymbols();
  const seen = probe.nestedVmx.usable ? await observeBehaviours(probe) : { notes: [] };
  const notes = [...sources.notes, ...symbols.notes, ...seen.notes];
  return { ...probe, fingerprint: fingerprint({ ...sources, ...symbols, ...seen, notes }) };
}

function look(devicePath: string): { probe: HostProbe; sources: FingerprintSources } {
  const cpu = probeCpu();
  const parameters = readParameters();
  const backend = findBackend();
  const common = { parameters, ...(backend === undefined ? {} : { backend }) };
  const kernel = {
    release: release(),
    version: version(),
    taint: read('/proc/sys/kernel/tainted') ?? 'unknown',
  };
  const structs = readStructs();

  let handle: Kvm;
  try {
    handle = Kvm.open(devicePath);
  } catch (error) {
    if (!(error instanceof KvmError)) throw error;
    const device = deviceState(error);
    const problem =
      device === 'unusable' ? `${devicePath} is no usable KVM device: ${error.message}` : error.message;
    const kvm: KvmProbe = { ...common, device, problem, capabilities: {} };
    const nestedVmx = { usable: false, reason: problem };
    const probe = { kernel, cpu, kvm, nestedVmx, vmxControls: {}, fingerprint: fingerprint(structs) };
    return { probe, sources: structs };
  }
  using opened = handle;
  const capabilities: Record<string, number> = {};
  for (const name of CAPABILITIES) capabilities[name] = opened.checkExtension(name);
  const kvm: KvmProbe = { ...common, device: 'ok', apiVersion: opened.apiVersion, capabilities };
  const vmStats = readVmStatNames(opened);
  const sources = { ...structs, ...(vmStats === undefined ? {} : { vmStats }) };
  const probe = {
    kernel,
    cpu,
    kvm,
    nestedVmx: nestedVmx(cpu, kvm),
    vmxControls: readControls(opened),
    fingerprint: fingerprint(sources),
  };
  return { probe, sources };
}

function deviceState(error: KvmError): 'missing' | 'denied' | 'unusable' {
  if (error.code === 'ENOENT') return 'missing';
  return error.code === 'EACCES' || error.code === 'EPERM' ? 'denied' : 'unusable';
}

function nestedVmx(cpu: CpuProbe, kvm: KvmProbe): { usable: boolean; reason: string } {
  const no = (reason: string): { usable: boolean; reason: string } => ({ usable: false, reason });
  if (!cpu.vmx && cpu.svm) return no('this CPU has SVM, not VMX: nested VMX needs an Intel CPU');
  if (!cpu.vmx)
    return no('this CPU offers no VMX (no hardware support, firmware switch, or a guest without it)');
  if (kvm.backend !== 'kvm_intel')
    return no(`/dev/kvm is driven by ${kvm.backend ?? 'an unknown module'}, not kvm_intel`);
  const nested = kvm.parameters['kvm_intel.nested'];
  if (nested !== 'Y' && nested !== '1') {
    return no('kvm_intel was loaded with nested=0: load it with nested=1 (modprobe kvm_intel nested=1)');
  }
  if (!kvm.capabilities['KVM_CAP_NESTED_STATE'])
    return no('KVM_CAP_NESTED_STATE is missing: the kernel is older than 4.20');
  return { usable: true, reason: 'kvm_intel with nested=Y and KVM_CAP_NESTED_STATE' };
}

function probeCpu(): CpuProbe {
  const text = read('/proc/cpuinfo') ?? '';
  const field = (name: string): string | undefined =>
    new RegExp(`^${name}\\s*:\\s*(.*)$`, 'm').exec(text)?.[1]?.trim();
  const flags = new Set((field('flags') ?? '').split(/\s+/));
  const microcode = field('microcode');
  return {
    vendor: field('vendor_id') ?? 'unknown',
    model: field('model name') ?? 'unknown',
    ...(microcode === undefined ? {} : { microcode }),
    online: text.match(/^processor\s*:/gm)?.length ?? 1,
    vmx: flags.has('vmx'),
    svm: flags.has('svm'),
    hypervisor: flags.has('hypervisor'),
  };
}

/** kvm's vendor modules are the ones whose name starts with `kvm_`; built in, they are in sysfs all the same. */
function findBackend(): string | undefined {
  return list('/sys/module').find((name) => name.startsWith('kvm_'));
}

function readParameters(): Record<string, string> {
  const parameters: Record<string, string> = {};
  for (const module of list('/sys/module').filter((name) => name === 'kvm' || name.startsWith('kvm_'))) {
    for (const name of list(`/sys/module/${module}/parameters`)) {
      const value = read(`/sys/module/${module}/parameters/${name}`);
      if (value !== undefined) parameters[`${module}.${name}`] = value;
    }
  }
  return parameters;
}

function readControls(kvm: Kvm): Record<string, boolean> {
  if (!kvm.checkExtension('KVM_CAP_GET_MSR_FEATURES')) return {};
  const known = new Set(kvm.featureMsrIndices());
  const wanted = VMX_CAPABILITY_MSRS.filter((index) => known.has(index));
  return wanted.length === 0 ? {} : offeredControls(kvm.readFeatureMsrs(wanted));
}

function readVmStatNames(kvm: Kvm): Set<string> | undefined {
  if (!kvm.checkExtension('KVM_CAP_BINARY_STATS_FD')) return undefined;
  let vm: Vm;
  try {
    vm = kvm.createVm();
  } catch {
    return undefined;
  }
  using opened = vm;
  return new Set(opened.stats().keys());
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return undefined;
  }
}

function list(path: string): string[] {
  try {
    return readdirSync(path).sort();
  } catch {
    return [];
  }
}
