// SPDX-License-Identifier: Apache-2.0
// The public types of nvmx/guest as a caller sees them. tsc reads this file (npm run check), nothing runs it.
import { expectTypeOf } from 'vitest';
import {
  type ControlName,
  type Ept,
  type EptPageOptions,
  type ExitDetail,
  type ExitReason,
  exitReasonName,
  GuestFault,
  GuestProtocolError,
  type InjectedEvent,
  type L1,
  type L2,
  type L2Options,
  type L2Stop,
  MissingControlError,
  type VmcsField,
  type VmcsFieldOf,
  type VmExit,
  type VmxControls,
  VmxError,
  vmcsFieldInfo,
  type WidthOf,
} from '../../lib/guest/index.ts';
import type { Exit } from '../../lib/kvm/index.ts';

declare const l1: L1;
declare const l2: L2;
declare const ept: Ept;
declare const controls: VmxControls;

export function stops(stop: L2Stop): void {
  switch (stop.kind) {
    case 'sync':
      expectTypeOf(stop.value).toEqualTypeOf<number>();
      // @ts-expect-error: L2 is active, there was no VM exit
      stop.exit;
      break;
    case 'exit':
      expectTypeOf(stop.exit).toEqualTypeOf<VmExit>();
      expectTypeOf(stop.counts).toEqualTypeOf<Map<string, number>>();
      break;
    case 'kvm-exit':
      expectTypeOf(stop.exit).toEqualTypeOf<Exit>();
      // @ts-expect-error: of VM exits only
      stop.counts;
      break;
    default:
      stop satisfies never;
  }
}

export function details(exit: VmExit): void {
  expectTypeOf(exit.qualification).toEqualTypeOf<bigint>();
  expectTypeOf(exit.guestPhysicalAddress).toEqualTypeOf<number>();
  const detail: ExitDetail = exit.detail;
  if (detail.reason === 'io-instruction') {
    expectTypeOf(detail.size).toEqualTypeOf<1 | 2 | 4>();
    expectTypeOf(detail.portOperand).toEqualTypeOf<'dx' | 'immediate'>();
    // @ts-expect-error: the instruction went to a port
    detail.offset;
  }
  if (detail.reason === 'apic-access') {
    expectTypeOf(detail.offset).toEqualTypeOf<number>();
    expectTypeOf(detail.access).toExtend<string>();
    // @ts-expect-error: an access of the APIC page names no port
    detail.port;
  }
  if (detail.reason === 'ept-violation') {
    expectTypeOf(detail.allowed).toEqualTypeOf<{
      readonly read: boolean;
      readonly write: boolean;
      readonly execute: boolean;
    }>();
    expectTypeOf(detail.guestLinearAddress).toEqualTypeOf<bigint | undefined>();
  }
  if (detail.reason === 'wrmsr' || detail.reason === 'rdmsr') {
    expectTypeOf(detail.value).toEqualTypeOf<bigint | undefined>();
  }
  if (detail.reason === 'vmcall') {
    expectTypeOf<keyof typeof detail>().toEqualTypeOf<'reason'>();
  }
  // @ts-expect-error: no exit of the SDM is called so
  if (detail.reason === 'io') return;
  // @ts-expect-error: which exit it was must be known first
  detail.port;
}

export async function vmcs(): Promise<void> {
  expectTypeOf(await l2.fields.read('GUEST_RIP')).toEqualTypeOf<bigint>();
  expectTypeOf(await l2.fields.readAll(['GUEST_RIP', 'GUEST_CR3'])).toEqualTypeOf<
    Record<'GUEST_RIP' | 'GUEST_CR3', bigint>
  >();
  expectTypeOf(await l2.fields.dump()).toEqualTypeOf<Map<VmcsField, bigint>>();
  await l2.fields.write('GUEST_RIP', 0x1000);
  await l2.fields.write(0x681e, 0x1000n);
  await l2.fields.writeAll({ GUEST_RIP: 0n, GUEST_CS_SELECTOR: 8 });
  // @ts-expect-error: fields have the SDM's names in capitals
  await l2.fields.read('guest-rip');
  // @ts-expect-error: there is no such field
  await l2.fields.writeAll({ GUEST_EIP: 0n });
  // @ts-expect-error: a value is a number
  await l2.fields.write('GUEST_RIP', '0x1000');
  const values = await l2.fields.readAll(['GUEST_RIP']);
  // @ts-expect-error: it was not read
  values.GUEST_CR3;

  const info = vmcsFieldInfo('GUEST_RIP');
  expectTypeOf(info.width).toEqualTypeOf<'natural'>();
  expectTypeOf(info.type).toEqualTypeOf<'control' | 'read-only' | 'guest' | 'host'>();
  expectTypeOf(vmcsFieldInfo('GUEST_CS_SELECTOR').width).toEqualTypeOf<16>();
  expectTypeOf(vmcsFieldInfo('EXCEPTION_BITMAP').width).toEqualTypeOf<32>();
  expectTypeOf(vmcsFieldInfo('TSC_OFFSET').width).toEqualTypeOf<64>();
  expectTypeOf(vmcsFieldInfo(0x681e).width).toEqualTypeOf<16 | 32 | 64 | 'natural'>();
  // @ts-expect-error: no field has this width
  if (vmcsFieldInfo(0x681e).width === 8) return;
  expectTypeOf<WidthOf<'VIRTUAL_PROCESSOR_ID' | 'GUEST_CR3'>>().toEqualTypeOf<16 | 'natural'>();
  expectTypeOf<'HOST_RSP'>().toExtend<VmcsFieldOf<'natural'>>();
  // @ts-expect-error: the EPT pointer has 64 bits
  expectTypeOf<'EPT_POINTER'>().toExtend<VmcsFieldOf<16 | 32>>();
}

export async function options(): Promise<void> {
  const wanted: L2Options = {
    vpid: 3,
    msrBitmap: true,
    virtualApic: true,
    controls: ['secondary.enable-ept', 'primary.hlt-exiting'],
    fields: { TSC_OFFSET: 5n },
  };
  expectTypeOf(await l1.createL2(wanted, (p) => p.vmcall())).toEqualTypeOf<L2>();
  expectTypeOf(await l2.enter()).toEqualTypeOf<L2Stop>();
  await l2.enter({ policy: { 'apic-access': 'skip', vmcall: 'return' }, limit: 5, mode: 'launch' });
  // @ts-expect-error: an unknown option
  await l1.createL2({ vipd: 3 }, (p) => p.vmcall());
  // @ts-expect-error: a control is written with its group
  await l1.createL2({ controls: ['enable-ept'] }, (p) => p.vmcall());
  // @ts-expect-error: HLT exiting is a primary control
  await l1.createL2({ controls: ['secondary.hlt-exiting'] }, (p) => p.vmcall());
  // @ts-expect-error: true makes a page, false says nothing
  await l1.createL2({ virtualApic: false }, (p) => p.vmcall());
  // @ts-expect-error: there is no such field
  await l1.createL2({ fields: { TSC_OFSET: 5n } }, (p) => p.vmcall());
  // @ts-expect-error: policies are by the reason's name
  await l2.enter({ policy: { 44: 'skip' } });
  // @ts-expect-error: no such action
  await l2.enter({ policy: { vmcall: 'ignore' } });

  expectTypeOf(controls.allows('pin.process-posted-interrupts')).toEqualTypeOf<boolean>();
  expectTypeOf<'exit.save-vmx-preemption-timer'>().toExtend<ControlName>();
  // @ts-expect-error: the timer is saved at exits
  expectTypeOf<'entry.save-vmx-preemption-timer'>().toExtend<ControlName>();
}

export async function clones(): Promise<void> {
  await using twin = await l1.clone();
  expectTypeOf(twin).toEqualTypeOf<L1>();
  expectTypeOf(twin.counterpart(l2)).toEqualTypeOf<L2>();
  expectTypeOf(twin.counterpart(ept)).toEqualTypeOf<Ept>();
  expectTypeOf(await l1.rewind(twin)).toEqualTypeOf<void>();
  // @ts-expect-error: a bitmap belongs to its L2
  twin.counterpart(l2.msrBitmap);
}

export function structures(): void {
  ept.map(0x1000, { to: 0x2000, size: '2M', memoryType: 'uncacheable', write: false });
  ept.protect(0x1000, { execute: false });
  // @ts-expect-error: pages have 4K, 2M or 1G
  expectTypeOf<EptPageOptions>({ size: '4M' });
  // @ts-expect-error: not a memory type
  ept.map(0, { memoryType: 'cached' });
  // @ts-expect-error: not a way to misconfigure an entry
  ept.misconfigure(0, 'unmapped');
  expectTypeOf<InjectedEvent>({ type: 'hardware-exception', vector: 13, errorCode: 0 });
  // @ts-expect-error: an event has a type
  expectTypeOf<InjectedEvent>({ vector: 13 });
  expectTypeOf(exitReasonName(18)).toEqualTypeOf<ExitReason | `reason-${number}`>();
}

export function errors(error: unknown): void {
  if (error instanceof GuestFault) {
    expectTypeOf(error.level).toEqualTypeOf<'L1' | 'L2'>();
    expectTypeOf(error.rip).toEqualTypeOf<bigint>();
    expectTypeOf(error.symbol).toEqualTypeOf<string | undefined>();
  } else if (error instanceof VmxError) {
    expectTypeOf(error.outcome).toEqualTypeOf<'VMfailInvalid' | 'VMfailValid'>();
    expectTypeOf(error.error).toEqualTypeOf<number | undefined>();
    // @ts-expect-error: a failed instruction is no exception
    error.vector;
  } else if (error instanceof MissingControlError) {
    expectTypeOf(error.control).toEqualTypeOf<string>();
  } else if (error instanceof GuestProtocolError) {
    expectTypeOf(error.exit).toEqualTypeOf<Exit | undefined>();
  }
}
