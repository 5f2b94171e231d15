// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import {
  exitReasonCode,
  exitReasonName,
  foldChecksum,
  MissingControlError,
  offeredControls,
  VMCS_FIELDS,
  VMX_CAPABILITY_MSRS,
  type VmcsField,
  VmxControls,
  vmcallRegsValues,
  vmcsEncoding,
  vmcsFieldInfo,
} from '../../lib/guest/index.ts';
import { FIELDS_BY_WIDTH } from '../../lib/guest/vmcs_fields.ts';

const allowed = (zero: number, one: number) => (BigInt(one) << 32n) | BigInt(zero);
const BASIC = 0x1234n | (1n << 55n);
const msrs = new Map<number, bigint>([
  [0x480, BASIC],
  [0x482, allowed(0x0401_e172, 0xfff9_fffe)],
  [0x48e, allowed(0x0400_6172, 0xfff9_fffe)],
  [0x48b, allowed(0, 0b10_0010)],
]);

describe('VMX controls', () => {
  test('the true-controls MSR counts where there is one, and what must be 1 is', () => {
    const controls = new VmxControls(msrs);
    expect(controls.revision).toBe(0x1234);
    expect(controls.value('primary', ['primary.use-msr-bitmaps', 'secondary.enable-ept'])).toBe(0x1400_6172);
    expect(controls.value('primary', ['primary.activate-secondary-controls'])).toBe(0x8400_6172);
    const older = new VmxControls(new Map([...msrs, [0x480, 0x1234n]]));
    expect(older.value('primary', [])).toBe(0x0401_e172);
  });

  test('a control that must be 0 is named', () => {
    const controls = new VmxControls(msrs);
    expect(controls.value('secondary', ['secondary.enable-vpid', 'secondary.enable-ept'])).toBe(0x22);
    expect(() => controls.value('secondary', ['secondary.virtualize-apic-accesses'])).toThrow(
      new MissingControlError('secondary.virtualize-apic-accesses'),
    );
    expect(() => controls.value('pin', ['pin.nmi-exiting'])).toThrow(MissingControlError);
  });

  test('no secondary control is offered without the control that activates them', () => {
    expect(offeredControls(msrs)).toMatchObject({
      'primary.use-msr-bitmaps': true,
      'secondary.enable-vpid': true,
      'secondary.unrestricted-guest': false,
      'pin.nmi-exiting': false,
    });
    const inactive = new Map([...msrs, [0x48e, allowed(0, 0x7fff_ffff)]]);
    expect(offeredControls(inactive)['secondary.enable-vpid']).toBe(false);
    expect(VMX_CAPABILITY_MSRS[0]).toBe(0x480);
    expect(VMX_CAPABILITY_MSRS.at(-1)).toBe(0x491);
  });
});

test('a field is in the group of its width, which is the width its type has', () => {
  for (const [width, fields] of Object.entries(FIELDS_BY_WIDTH)) {
    for (const name of Object.keys(fields)) {
      expect([name, String(vmcsFieldInfo(name as VmcsField).width)]).toEqual([name, width]);
    }
  }
});

test('VMCS encodings have the width and type their names say', () => {
  expect(new Set(Object.values(VMCS_FIELDS)).size).toBe(Object.keys(VMCS_FIELDS).length);
  for (const [name, encoding] of Object.entries(VMCS_FIELDS)) {
    const type = (encoding >> 10) & 3;
    if (name.startsWith('HOST_')) expect(type, name).toBe(3);
    if (name.startsWith('GUEST_') && !/_ADDRESS$/.test(name)) expect(type, name).toBe(2);
    if (/_SELECTOR$/.test(name)) expect(encoding >> 13, name).toBe(0);
    if (/_(LIMIT|AR_BYTES)$/.test(name)) expect(encoding >> 13, name).toBe(2);
    if (/_BASE$/.test(name)) expect(encoding >> 13, name).toBe(3);
  }
  expect(vmcsEncoding('APIC_ACCESS_ADDR')).toBe(0x2014);
  expect(vmcsEncoding(0x6c16)).toBe(0x6c16);
  expect(() => vmcsEncoding('NONSENSE' as never)).toThrow('"NONSENSE" is not a VMCS field');
});

test('exit reasons have names both ways', () => {
  expect(exitReasonCode('apic-access')).toBe(44);
  expect(exitReasonName(48)).toBe('ept-violation');
  expect(exitReasonName(35)).toBe('reason-35');
  expect(() => exitReasonCode('nonsense' as never)).toThrow('"nonsense" is not an exit reason');
});

test('the checksum is the 64-bit FNV-1a of the folded words', () => {
  expect(foldChecksum([])).toBe(0xcbf2_9ce4_8422_2325n);
  // FNV-1a of the one byte "a", a published test vector
  expect(foldChecksum([0x61])).toBe(0xaf63_dc4c_8601_ec8cn);
  expect(vmcallRegsValues(100)).toHaveLength(15);
  expect(vmcallRegsValues(100)).not.toContain(104n);
});
