// SPDX-License-Identifier: Apache-2.0
import { eoiExitBitmap, type MemoryAt, PostedInterruptDescriptor, VirtualApicPage } from './apic_pages.ts';
import type { ControlName } from './controls.ts';
import type { Ept } from './ept.ts';
import { IoBitmap } from './io_bitmap.ts';
import type { L2Controls } from './l2_vmcs.ts';
import { MsrBitmap } from './msr_bitmap.ts';
import { MsrList } from './msr_list.ts';
import type { PageTables } from './paging.ts';
import type { VmcsField } from './vmcs_fields.ts';

type MsrEntries = Iterable<readonly [index: number, value: bigint]>;

export interface L2Options {
  /** The L1 vCPU it starts on; default 0. */
  cpu?: number;
  /** Turns VPIDs on with this one (1 to 65535). */
  vpid?: number;
  /** An EPT of its own (L1.createEpt()), or false for none: then KVM shadows L2's page tables. Default L1.ept. */
  ept?: Ept | false;
  /** What CR3 holds: L1.createPageTables(). Default those of L1. */
  pageTables?: PageTables;
  /**
   * An MSR bitmap: one of L1's memory that intercepts nothing yet, or the page at this address as it is. Without one
   * every RDMSR and WRMSR exits.
   */
  msrBitmap?: boolean | number;
  /** Guest-physical address of the page that is its VMCS; default one of L1's memory. */
  vmcs?: number;
  /** Gives it I/O bitmaps that intercept nothing; without them no port exits, unless a control says so. */
  ioBitmap?: boolean;
  /** Guest-physical address of the APIC-access page. */
  apicAccess?: number;
  /** Turns the TPR shadow on with a virtual-APIC page: this one, or with `true` one of L1's memory. */
  virtualApic?: number | true;
  /** VTPR bits 7:4 below this value (0 to 15) exit; turns the TPR shadow on. */
  tprThreshold?: number;
  /** External interrupts exit; `acknowledge` also takes the vector from L1's APIC (L1 then owes it an EOI). */
  externalInterrupts?: 'exit' | 'acknowledge';
  /** Virtual-interrupt delivery; turns the TPR shadow and external-interrupt exiting on. */
  virtualInterrupts?: boolean;
  /**
   * Posted interrupts with this notification vector, and the descriptor at this address or in L1's memory. Turns
   * virtual-interrupt delivery and acknowledgement on, and L1's x2APIC, without which no notification arrives.
   */
  postedInterrupts?: { vector: number; descriptor?: number };
  /** Vectors whose virtual EOI exits. */
  eoiExits?: Iterable<number>;
  /** After an interrupt, L2 signals EOI by the x2APIC register, or in an APIC page at this address. */
  autoEoi?: 'x2apic' | number;
  /** Ticks of the VMX-preemption timer, loaded at every entry. */
  preemptionTimer?: number;
  /** MSRs that VM entry loads. */
  entryLoadMsrs?: MsrEntries;
  /** MSRs that VM exit stores. */
  exitStoreMsrs?: Iterable<number>;
  /** MSRs that VM exit loads, for L1. */
  exitLoadMsrs?: MsrEntries;
  /** Exceptions that exit, by vector. */
  exceptionBitmap?: number;
  /** Further controls to turn on. */
  controls?: readonly ControlName[];
  /** VMCS fields to write last, over everything else. */
  fields?: Partial<Record<VmcsField, bigint | number>>;
  /** Runs this instead of the interpreter: RDI holds the control page's address. The program is then unused. */
  entry?: number;
  /** An enlightened VMCS: L1 must be booted with `evmcs`. */
  evmcs?: boolean;
}

/** What L1 gives to an L2. */
export interface L2Host {
  readonly memory: ArrayBuffer;
  readonly allocate: (pages?: number) => number;
  readonly at: MemoryAt;
  readonly ept: Ept;
}

/** The structures in guest memory that an L2's options ask for. */
export class L2Structures {
  readonly ept: Ept | undefined;
  readonly msrBitmap: MsrBitmap | undefined;
  readonly ioBitmap: IoBitmap | undefined;
  readonly virtualApic: VirtualApicPage | undefined;
  readonly postedInterrupts: PostedInterruptDescriptor | undefined;
  readonly entryLoadMsrs: MsrList | undefined;
  readonly exitStoreMsrs: MsrList | undefined;
  readonly exitLoadMsrs: MsrList | undefined;
  readonly #options: L2Options;

  /** @param like those of an L2 in another L1, whose memory this one's is a copy of */
  constructor(host: L2Host, options: L2Options, like?: L2Structures) {
    checkOptions(options);
    const { memory, allocate, at } = host;
    const { virtualApic, postedInterrupts, tprThreshold, virtualInterrupts } = options;
    this.#options = options;
    this.ept = options.ept === false ? undefined : (options.ept ?? host.ept);
    this.msrBitmap = makeMsrBitmap(host, like?.msrBitmap?.gpa ?? options.msrBitmap);
    this.ioBitmap = options.ioBitmap ? new IoBitmap(memory, like?.ioBitmap?.gpa ?? allocate(2)) : undefined;
    const wantsApic = virtualApic ?? postedInterrupts ?? tprThreshold ?? virtualInterrupts;
    if (wantsApic !== undefined && wantsApic !== false) {
      const own = typeof virtualApic === 'number' ? virtualApic : undefined;
      this.virtualApic = new VirtualApicPage(at, like?.virtualApic?.gpa ?? own ?? allocate());
    }
    if (postedInterrupts) {
      const gpa = like?.postedInterrupts?.gpa ?? postedInterrupts.descriptor ?? allocate();
      this.postedInterrupts = new PostedInterruptDescriptor(at, gpa);
      if (!like) this.postedInterrupts.notificationVector = postedInterrupts.vector;
    }
    const list = (entries: MsrEntries | undefined, its: MsrList | undefined) =>
      entries && new MsrList(memory, its?.gpa ?? allocate(), its?.entries() ?? entries);
    const stored = options.exitStoreMsrs;
    this.entryLoadMsrs = list(options.entryLoadMsrs, like?.entryLoadMsrs);
    this.exitStoreMsrs = list(stored && Array.from(stored, (msr) => [msr, 0n]), like?.exitStoreMsrs);
    this.exitLoadMsrs = list(options.exitLoadMsrs, like?.exitLoadMsrs);
  }

  /** Whether L1's local APIC has to take part. */
  get needsApic(): boolean {
    return this.postedInterrupts !== undefined || this.#options.externalInterrupts !== undefined;
  }

  /** What goes into the VMCS. */
  get controls(): L2Controls {
    const { postedInterrupts, externalInterrupts, virtualInterrupts, eoiExits } = this.#options;
    return {
      eptPointer: this.ept?.pointer,
      vpid: this.#options.vpid,
      msrBitmap: this.msrBitmap?.gpa,
      ioBitmap: this.ioBitmap?.gpa,
      apicAccess: this.#options.apicAccess,
      virtualApic: this.virtualApic?.gpa,
      tprThreshold: this.#options.tprThreshold,
      externalInterrupts: postedInterrupts ? 'acknowledge' : (externalInterrupts ?? virtualInterrupts),
      virtualInterrupts: virtualInterrupts || postedInterrupts !== undefined,
      postedInterrupts: postedInterrupts && {
        vector: postedInterrupts.vector,
        descriptor: this.postedInterrupts!.gpa,
      },
      eoiExitBitmap: eoiExits && eoiExitBitmap(eoiExits),
      preemptionTimer: this.#options.preemptionTimer,
      entryLoadMsrs: this.entryLoadMsrs,
      exitStoreMsrs: this.exitStoreMsrs,
      exitLoadMsrs: this.exitLoadMsrs,
      exceptionBitmap: this.#options.exceptionBitmap,
      extra: this.#options.controls ?? [],
    };
  }
}

function makeMsrBitmap({ allocate, at }: L2Host, where: boolean | number = false): MsrBitmap | undefined {
  return where === false ? undefined : new MsrBitmap(at, typeof where === 'number' ? where : allocate());
}

/** Of what goes into the VMCS: VMWRITE drops bits that a field does not have. */
function checkOptions(options: L2Options): void {
  const { vpid, tprThreshold, preemptionTimer, postedInterrupts, exceptionBitmap, apicAccess } = options;
  const { virtualApic, msrBitmap, entry } = options;
  const whole = (
    what: string,
    value: number | boolean | undefined,
    max = Number.MAX_SAFE_INTEGER,
    min = 0,
  ) => {
    if (value === undefined || typeof value === 'boolean') return;
    if (!Number.isSafeInteger(value) || value < min || value > max) {
      throw new RangeError(`${what} is between ${min} and ${max}, not ${value}`);
    }
  };
  whole('a VPID', vpid, 0xffff, 1);
  whole('a TPR threshold', tprThreshold, 15);
  whole('the preemption timer', preemptionTimer, 0xffff_ffff);
  whole('a notification vector', postedInterrupts?.vector, 255);
  whole('the exception bitmap', exceptionBitmap, 0xffff_ffff);
  whole("the posted-interrupt descriptor's address", postedInterrupts?.descriptor);
  whole("the APIC-access page's address", apicAccess);
  whole("the virtual-APIC page's address", virtualApic);
  whole("the MSR bitmap's address", msrBitmap);
  whole('the entry point', entry);
}
