// SPDX-License-Identifier: Apache-2.0
import { type ControlName, exitReasonCode, VMCS_FIELDS } from '../../guest/index.ts';
import type { BackingName, Bench, BenchContext } from '../bench.ts';
import type { Measurement } from '../model.ts';
import { countCalls, tracingProblem } from '../trace.ts';
import {
  backingOf,
  benchL2,
  bootMachine,
  type ControlPage,
  ControlPages,
  type Machine,
  mustBe,
  sampleEntries,
  TickBuffer,
  VARIANTS,
  type Variant,
} from './machine.ts';

const TITLES: Record<Variant, string> = {
  none: 'no page of L1 that L0 needs',
  'msr-bitmap': 'L1 MSR bitmap',
  'apic-access': 'MSR bitmap, APIC-access page',
  vapic: 'MSR bitmap, APIC-access page, virtual-APIC page',
  'posted-interrupts': 'MSR bitmap, APIC-access, virtual-APIC page, posted-interrupt descriptor',
  evmcs: 'enlightened VMCS',
  'evmcs-vapic': 'enlightened VMCS, MSR bitmap, virtual-APIC page',
};
const NAMES = Object.keys(VARIANTS) as Variant[];
const CONTROLS: Partial<Record<ControlPage, readonly ControlName[]>> = {
  'apic-access': ['secondary.virtualize-apic-accesses'],
  vapic: ['primary.use-tpr-shadow'],
  'posted-interrupts': ['pin.process-posted-interrupts', 'secondary.virtual-interrupt-delivery'],
};
/** Functions of the kernel that map a page without struct page; stock KVM calls them at every entry and exit. */
const TRACED = ['memremap', 'memunmap'] as const;

const VMCALL = BigInt(exitReasonCode('vmcall'));
const EVMCS = 'KVM_CAP_HYPERV_ENLIGHTENED_VMCS';

const isEnlightened = (variant: Variant): boolean => VARIANTS[variant].some((page) => page === 'evmcs');

function missingControls({ probe }: BenchContext, variant: Variant): string | undefined {
  if (isEnlightened(variant) && !probe.kvm.capabilities[EVMCS]) {
    return `this kernel offers L1 no enlightened VMCS (${EVMCS}; CONFIG_KVM_HYPERV)`;
  }
  const wanted = VARIANTS[variant].flatMap((page) => CONTROLS[page] ?? []);
  const lacking = wanted.filter((name) => !probe.vmxControls[name]);
  return lacking.length === 0 ? undefined : `KVM does not offer L1 the control ${lacking.join(', ')}`;
}

/** Round trips inside one VM: `iterations` entries, each ended by a VMCALL that L1 skips. */
async function roundTrips(
  { l1 }: Machine,
  pages: ControlPages,
  variant: Variant,
  iterations: number,
): Promise<Uint32Array> {
  const warmUp = Math.ceil(iterations / 10);
  const l2 = await benchL2(l1, 'bench_vmcall', pages.options(0));
  const buffer = new TickBuffer(l1, iterations);
  const policy = { vmcall: 'skip' } as const;
  await l2.enter({ policy, limit: warmUp });
  sampleEntries(l2, buffer, iterations);
  const stop = await l2.enter({ policy, limit: iterations });
  mustBe('the last exit', stop.kind === 'exit' ? stop.exit.reason : stop.kind, 'vmcall');
  mustBe('VM entries', l2.timing.entries, warmUp + iterations);
  mustBe('VMCALL exits', l2.exitCount('vmcall'), warmUp + iterations);
  const written = l2.evmcs?.read(VMCS_FIELDS.VM_EXIT_REASON);
  mustBe('exit reason in the eVMCS', written, isEnlightened(variant) ? VMCALL : undefined);
  return buffer.take(iterations);
}

export function roundTrip(backing: BackingName): Bench {
  const iterations = (context: BenchContext): number => (context.quick ? 300 : context.slow ? 1500 : 100_000);
  return {
    family: `round-trip/${backing}`,
    nested: true,
    backing,
    figures: NAMES.map((variant) => ({
      id: `round-trip/${backing}/${variant}`,
      title: `L2 VMCALL to L1 and back: ${TITLES[variant]}`,
      missing: (context) => missingControls(context, variant),
    })),
    async measure(context, wanted) {
      const results: Measurement[] = [];
      for (const [i, variant] of NAMES.entries()) {
        const figure = this.figures[i]!;
        if (!wanted.has(figure.id)) continue;
        using machine = await bootMachine({ evmcs: isEnlightened(variant) });
        const pages = new ControlPages(machine.vm, 1, backingOf(backing, context), variant);
        const count = iterations(context);
        const samples = await roundTrips(machine, pages, variant, count);
        results.push({
          id: figure.id,
          title: figure.title,
          unit: 'cycles',
          samples,
          parameters: { iterations: count },
          counts: { vmcallExits: count },
        });
      }
      return results;
    },
  };
}

/** How often the kernel maps and unmaps unmanaged pages for one round trip with all pages. */
export function memremaps(backing: BackingName): Bench {
  return {
    family: `memremap/${backing}`,
    nested: true,
    backing,
    figures: TRACED.map((name) => ({
      id: `memremap/${backing}/${name}`,
      title: `calls of ${name}() per round trip with MSR bitmap, APIC-access and virtual-APIC page`,
      missing: (context) => missingControls(context, 'vapic') ?? tracingProblem(TRACED),
    })),
    async measure(context, wanted) {
      using machine = await bootMachine();
      const pages = new ControlPages(machine.vm, 1, backingOf(backing, context), 'vapic');
      const count = 200;
      const l2 = await benchL2(machine.l1, 'bench_vmcall', pages.options(0));
      await l2.enter({ policy: { vmcall: 'skip' }, limit: 1 });
      const calls = await countCalls(TRACED, async () => {
        await l2.enter({ policy: { vmcall: 'skip' }, limit: count });
      });
      return this.figures
        .filter(({ id }) => wanted.has(id))
        .map(({ id, title }) => ({
          id,
          title,
          unit: 'calls',
          samples: [(calls.get(id.split('/').at(-1)!) ?? 0) / count],
          parameters: { iterations: count },
        }));
    },
  };
}
