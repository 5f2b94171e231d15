// SPDX-License-Identifier: Apache-2.0

/** The two answers a kernel can give to the series' tests. */
export type KernelKind = 'stock' | 'patched';

/** One trace a patch of the series leaves where userspace can see it. */
export type Trace =
  | { readonly kind: 'vm-stat'; readonly name: string }
  | { readonly kind: 'btf-member'; readonly struct: string; readonly member: string }
  | { readonly kind: 'btf-struct'; readonly struct: string };

export interface SeriesPatch {
  /** Its number in the posted series. */
  readonly patch: number;
  readonly title: string;
  readonly traces: readonly Trace[];
}

/**
 * "KVM: nVMX: Improve performance for unmanaged guest memory", patch by patch. Names may change while the
 * series is reviewed, so they are data: any one trace of a patch is enough to call the patch present.
 */
export const SERIES: readonly SeriesPatch[] = [
  {
    patch: 1,
    title: 'L1 MSR bitmap in a gfn_to_pfn_cache',
    traces: [{ kind: 'btf-member', struct: 'nested_vmx', member: 'msr_bitmap_cache' }],
  },
  {
    patch: 2,
    title: 'gfn_to_pfn_cache used by a guest',
    traces: [{ kind: 'btf-member', struct: 'gfn_to_pfn_cache', member: 'vcpu' }],
  },
  {
    patch: 3,
    title: 'nested state validity',
    traces: [{ kind: 'btf-member', struct: 'kvm_x86_nested_ops', member: 'is_nested_state_invalid' }],
  },
  {
    patch: 4,
    title: 'APIC-access, virtual-APIC and posted-interrupt pages in a gfn_to_pfn_cache',
    traces: [{ kind: 'btf-member', struct: 'nested_vmx', member: 'apic_access_page_cache' }],
  },
  {
    patch: 6,
    title: 'eVMCS fields cached at VM entry',
    traces: [{ kind: 'btf-member', struct: 'nested_vmx', member: 'hv_clean_fields' }],
  },
  {
    patch: 7,
    title: 'eVMCS page in a gfn_to_pfn_cache',
    traces: [{ kind: 'btf-member', struct: 'nested_vmx', member: 'hv_evmcs_cache' }],
  },
  {
    patch: 8,
    title: 'nested context table',
    traces: [
      { kind: 'vm-stat', name: 'nested_context_reuse' },
      { kind: 'btf-member', struct: 'kvm_vm_stat', member: 'nested_context_reuse' },
    ],
  },
  {
    patch: 9,
    title: 'caches kept in the nested context',
    traces: [{ kind: 'btf-struct', struct: 'vmx_nested_context' }],
  },
];

/** The patch whose presence decides which answers the APIC-access and L2-switch tests expect. */
export const DECIDING_PATCHES: readonly number[] = [4, 8];

/** VM statistics of the nested context table (patch 8). */
export const CONTEXT_STATS = { reuse: 'nested_context_reuse', recycle: 'nested_context_recycle' } as const;

/** Contexts the table holds for each online CPU of the host (uapi KVM_NESTED_OVERSUB_RATIO, patch 8). */
export const CONTEXTS_PER_CPU = 8;
