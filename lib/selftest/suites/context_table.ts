// SPDX-License-Identifier: Apache-2.0
// The nested context table of the series (patches 8 and 9) as a model: what its two counters show after any sequence
// of VMPTRLD, VMCLEAR, eVMCS pointer changes and VMXOFF.

export interface ContextCounters {
  /** VMCSs whose context was still there when they were loaded. */
  readonly reuse: number;
  /** Contexts taken from a VMCS that nobody had loaded, for another one. */
  readonly recycle: number;
}

/** A VMCS is whatever names it. */
export class ContextTable {
  readonly #max: number;
  /** Where each VMCS with a context is loaded; undefined: nowhere. */
  readonly #contexts = new Map<number, number | undefined>();
  /** VMCSs with a context that is loaded nowhere, the longest first. */
  #unused: number[] = [];
  readonly #current = new Map<number, number>();
  #reuse = 0;
  #recycle = 0;

  /** @param max contexts that the VM may have */
  constructor(max: number) {
    this.#max = max;
  }

  get counters(): ContextCounters {
    return { reuse: this.#reuse, recycle: this.#recycle };
  }

  /** VMPTRLD: the VMCS that was current stays loaded. */
  load(vcpu: number, vmcs: number): void {
    if (this.#current.get(vcpu) === vmcs) return;
    this.#current.set(vcpu, vmcs);
    if (this.#contexts.has(vmcs)) {
      this.#reuse += 1;
      this.#unused = this.#unused.filter((one) => one !== vmcs);
    } else if (this.#contexts.size >= this.#max) {
      const oldest = this.#unused.shift();
      // none to be had: this VMCS goes without
      if (oldest === undefined) return;
      this.#contexts.delete(oldest);
      this.#recycle += 1;
    }
    this.#contexts.set(vmcs, vcpu);
  }

  /** VMCLEAR: its context stays, to be found again or recycled. */
  clear(vcpu: number, vmcs: number): void {
    if (this.#current.get(vcpu) === vmcs) this.#current.delete(vcpu);
    if (this.#contexts.get(vmcs) === undefined) return;
    this.#contexts.set(vmcs, undefined);
    this.#unused.push(vmcs);
  }

  /** VM entry with this eVMCS: the one that was active is cleared. */
  enter(vcpu: number, vmcs: number): void {
    const active = this.#current.get(vcpu);
    if (active === vmcs) return;
    if (active !== undefined) this.clear(vcpu, active);
    this.load(vcpu, vmcs);
  }

  /** VMXOFF: only the current VMCS is cleared. */
  off(vcpu: number): void {
    const current = this.#current.get(vcpu);
    if (current !== undefined) this.clear(vcpu, current);
  }
}

/** How VMCSs take turns. */
export type SwitchMode = 'sched' | 'migrate' | 'evmcs' | 'sched-vcpus' | 'migrate-vcpus';

export interface Turn {
  readonly vmcs: number;
  readonly vcpu: number;
}

/**
 * Whose turn it is, c VMCSs for s rounds on v vCPUs of L1: lists that go on at the same time, each in its order.
 * `sched-vcpus` keeps a VMCS on its vCPU; `migrate-vcpus` moves it to the next one every round.
 */
export function turnsOf(mode: SwitchMode, c: number, s: number, v: number): Turn[][] {
  const vmcss = Array.from({ length: c }, (_, vmcs) => vmcs);
  const rounds = Array.from({ length: s }, (_, round) => round);
  if (mode === 'sched-vcpus') {
    return Array.from({ length: v }, (_, vcpu) =>
      rounds.flatMap(() => vmcss.filter((vmcs) => vmcs % v === vcpu).map((vmcs) => ({ vmcs, vcpu }))),
    );
  }
  const shift = mode === 'migrate-vcpus' ? 1 : 0;
  return [rounds.flatMap((round) => vmcss.map((vmcs) => ({ vmcs, vcpu: (shift * (vmcs + round)) % v })))];
}

/** The counters after those turns, with so many contexts for each vCPU of the VM. */
export function countersOf(
  mode: SwitchMode,
  c: number,
  s: number,
  v: number,
  perVcpu: number,
): ContextCounters {
  const table = new ContextTable(perVcpu * v);
  for (const { vmcs, vcpu } of turnsOf(mode, c, s, v).flat()) {
    if (mode === 'evmcs') table.enter(vcpu, vmcs);
    else table.load(vcpu, vmcs);
    if (mode === 'migrate' || mode === 'migrate-vcpus') table.clear(vcpu, vmcs);
  }
  return table.counters;
}
