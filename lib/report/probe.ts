// SPDX-License-Identifier: Apache-2.0
import { type Conclusion, conclude, type HostProbe } from '../probe/index.ts';

/** The probe for people: what this is, what it can do, and what is missing. */
export function renderProbe(probe: HostProbe, heading: string, more: readonly Conclusion[] = []): string {
  const { cpu, kvm, kernel, fingerprint } = probe;
  const offered = Object.entries(probe.vmxControls).filter(([, on]) => on);
  const lines = [
    heading,
    `  kernel       Linux ${kernel.release} (${kernel.version}), taint ${kernel.taint}`,
    `  cpu          ${cpu.model} (${cpu.vendor}), ${cpu.online} online${cpu.hypervisor ? ', under a hypervisor' : ''}` +
      `${cpu.microcode ? `, microcode ${cpu.microcode}` : ''}`,
    `  cpu flags    vmx ${yes(cpu.vmx)}, svm ${yes(cpu.svm)}`,
    `  /dev/kvm     ${kvm.device === 'ok' ? `API ${kvm.apiVersion}, backend ${kvm.backend ?? 'unknown'}` : kvm.problem}`,
    `  nested VMX   ${yes(probe.nestedVmx.usable)}: ${probe.nestedVmx.reason}`,
    '',
    'capabilities',
    ...columns(Object.entries(kvm.capabilities).map(([name, value]) => `${name} ${value}`)),
    '',
    'module parameters',
    ...columns(Object.entries(kvm.parameters).map(([name, value]) => `${name}=${value}`)),
    '',
    `VMX controls offered to L1: ${offered.length} of ${Object.keys(probe.vmxControls).length}`,
    ...columns(Object.entries(probe.vmxControls).map(([name, on]) => `${on ? '+' : '-'} ${name}`)),
    '',
    `the series: this kernel is ${fingerprint.kind}${fingerprint.certain ? '' : ' (assumed: nothing decides it)'}`,
    ...fingerprint.patches.flatMap((patch) => [
      `  patch ${patch.patch} ${patch.state}: ${patch.title}`,
      ...patch.evidence.map((text) => `      ${text}`),
    ]),
    ...fingerprint.sources.map((text) => `  source: ${text}`),
    '',
    'what can run here',
    ...[...conclude(probe), ...more].map((c) => `  ${c.possible ? 'yes' : 'no '}  ${c.what}: ${c.why}`),
  ];
  return `${lines.join('\n')}\n`;
}

function yes(value: boolean): string {
  return value ? 'yes' : 'no';
}

function columns(items: readonly string[]): string[] {
  return items.length === 0 ? ['  none'] : items.map((item) => `  ${item}`);
}
