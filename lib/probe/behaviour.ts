// SPDX-License-Identifier: Apache-2.0
import { atEachSync, type ControlName, GuestFault, L1, type L2Stop, VP_ASSIST } from '../guest/index.ts';
import { Kvm } from '../kvm/index.ts';
import type { FingerprintSources } from './fingerprint.ts';
import type { HostProbe } from './host.ts';
import { BEHAVIOURS, type BehaviourName } from './series.ts';

const PAGE_GPA = 0xc000_0000;
const REGISTER = 0x80;

const EXPERIMENTS: Readonly<
  Record<BehaviourName, { can(probe: HostProbe): boolean; run(kvm: Kvm): Promise<boolean> }>
> = {
  'discarded-page-traps': {
    can: ({ vmxControls }) => CONTROLS.every((name) => vmxControls[name]),
    run: discardedPageTraps,
  },
  'unaligned-evmcs-refused': {
    can: ({ kvm }) => (kvm.capabilities['KVM_CAP_HYPERV_ENLIGHTENED_VMCS'] ?? 0) > 0,
    run: unalignedEvmcsRefused,
  },
};
const CONTROLS: readonly ControlName[] = ['secondary.virtualize-apic-accesses', 'secondary.enable-ept'];

/** Lets L2s show what the kernel of this machine with nested VMX does, in a VM each. */
export async function observeBehaviours(
  probe: HostProbe,
): Promise<Pick<FingerprintSources, 'behaviours' | 'notes'>> {
  const behaviours = new Map<BehaviourName, boolean>();
  const notes: string[] = [];
  using kvm = Kvm.open();
  for (const name of BEHAVIOURS) {
    const { can, run } = EXPERIMENTS[name];
    if (!can(probe)) continue;
    try {
      behaviours.set(name, await run(kvm));
    } catch (error) {
      notes.push(`behaviour ${name}: ${(error as Error).message}`);
    }
  }
  return { behaviours, notes };
}

/** The host discards the APIC-access page beneath an active L2: does L2's next access exit to L1? */
async function discardedPageTraps(kvm: Kvm): Promise<boolean> {
  await using l1 = await L1.boot(kvm.createVm());
  const page = l1.vm.memory.add({ gpa: PAGE_GPA, size: 4096 });
  const l2 = await l1.createL2({ apicAccess: PAGE_GPA, msrBitmap: true }, (program) =>
    program
      .write32(PAGE_GPA + REGISTER, 1)
      .sync(0)
      .write32(PAGE_GPA + REGISTER, 2)
      .vmcall(),
  );
  const stop = await atEachSync(l2, () => page.discard(), { policy: { 'apic-access': 'skip' } });
  mustBeVmcall(stop);
  return l2.exitCount('apic-access') === 2;
}

/** L1 names an eVMCS that does not begin where a page does: is VMLAUNCH #UD? */
async function unalignedEvmcsRefused(kvm: Kvm): Promise<boolean> {
  await using l1 = await L1.boot(kvm.createVm(), { evmcs: true });
  const l2 = await l1.createL2({ evmcs: true }, (program) => program.vmcall());
  l1.cpu(0).vpAssistPage.setBigUint64(VP_ASSIST.currentNestedVmcs, BigInt(l2.vmcs + 8), true);
  try {
    mustBeVmcall(await l2.enter());
    return false;
  } catch (error) {
    if (error instanceof GuestFault && error.level === 'L1' && error.vector === 6) return true;
    throw error;
  }
}

function mustBeVmcall(stop: L2Stop): void {
  const reason = stop.kind === 'exit' ? stop.exit.reason : stop.kind;
  if (reason !== 'vmcall') throw new Error(`L2 ended with ${reason} instead of its VMCALL`);
}
