// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { Ept } from '../../lib/guest/ept.ts';
import { evmcsMap, evmcsMapIndex } from '../../lib/guest/evmcs.ts';
import { exitDetail } from '../../lib/guest/exit_detail.ts';
import {
  Batch,
  CommandPages,
  decodeEvent,
  EVMCS_FIELDS,
  EVMCS_WORDS,
  encodeEvent,
  eoiExitBitmap,
  PostedInterruptDescriptor,
  VirtualApicPage,
  VMCS_FIELD_NAMES,
  VMCS_FIELDS,
  vmcsFieldInfo,
} from '../../lib/guest/index.ts';
import { IoBitmap } from '../../lib/guest/io_bitmap.ts';
import { type L2Options, L2Structures } from '../../lib/guest/l2_options.ts';
import { PageTables } from '../../lib/guest/paging.ts';

const memory = () => new ArrayBuffer(64 * 4096);
function pages(): () => number {
  let next = -4096;
  return () => {
    next += 4096;
    return next;
  };
}
const at = (buffer: ArrayBuffer) => (gpa: number, length: number) => new Uint8Array(buffer, gpa, length);

test('an I/O bitmap: bit n of the two pages is port n', () => {
  const buffer = memory();
  const bitmap = new IoBitmap(buffer, 4096);
  bitmap.intercept(0x3f8, 2);
  bitmap.intercept(0xffff);
  bitmap.intercept(0x3f9, 1, false);
  const bytes = new Uint8Array(buffer, 4096, 8192);
  expect([bytes[0x7f], bytes[0x1fff]]).toEqual([1, 0x80]);
  expect([0x3f7, 0x3f8, 0x3f9, 0xffff].map((port) => bitmap.intercepts(port))).toEqual([
    false,
    true,
    false,
    true,
  ]);
  expect(() => bitmap.intercept(0xffff, 2)).toThrow('there is no port 0x10000');
});

test('a batch: the records of its commands, and their results', () => {
  const buffer = memory();
  const places = new CommandPages(buffer, 4096);
  new Uint8Array(buffer).fill(0xee, 4096, 4096 + 3 * 64);
  const batch = new Batch().vmwrite('GUEST_CR3', 0x12_3456_7890).wrmsr(0x10, -2n).keepGoing().rdtsc();
  batch.store(places);
  const bytes = Buffer.from(buffer);
  const record = (index: number) => bytes.toString('hex', 4096 + index * 64, 4160 + index * 64);
  expect(record(0)).toBe(`0700000000000000${'0268000000000000'}${'9078563412000000'}${'00'.repeat(40)}`);
  expect(record(1)).toBe(`0d00010000000000${'1000000000000000'}${'feffffffffffffff'}${'00'.repeat(40)}`);
  expect(record(2)).toBe(`16000000${'00'.repeat(60)}`);
  for (const [index, status] of [1, 4, 1].entries()) bytes.writeUInt32LE(status, 4096 + index * 64 + 4);
  for (const index of [1, 2]) bytes.writeBigUInt64LE(13n, 4096 + index * 64 + 40);
  expect(batch.results(places)).toEqual([
    { command: 'VMWRITE', status: 'ok', values: [0n, 0n, 0n] },
    { command: 'WRMSR', status: 'fault', values: [13n, 0n, 0n] },
    { command: 'RDTSC', status: 'ok', values: [13n, 0n, 0n] },
  ]);
});

test('a posted-interrupt descriptor: PIR, ON, SN, NV, NDST at their places', () => {
  const buffer = memory();
  const descriptor = new PostedInterruptDescriptor(at(buffer), 64);
  descriptor.post(0x41);
  descriptor.suppressed = true;
  descriptor.notificationVector = 0xf2;
  descriptor.destination = 5;
  expect(Buffer.from(buffer, 64, 40).toString('hex')).toBe(
    `${'00'.repeat(8)}02000000${'00'.repeat(20)}0300f20005000000`,
  );
  expect(descriptor.pending).toEqual([0x41]);
  descriptor.request(0x41, false);
  descriptor.outstanding = false;
  expect([descriptor.pending, descriptor.outstanding, descriptor.suppressed]).toEqual([[], false, true]);
  expect(() => new PostedInterruptDescriptor(at(buffer), 32)).toThrow('a multiple of 64');
  expect(eoiExitBitmap([0, 65, 255])).toEqual([1n, 2n, 0n, 1n << 63n]);
});

test('a virtual-APIC page: TPR, PPR and the vectors requested and in service', () => {
  const buffer = memory();
  const page = new VirtualApicPage(at(buffer), 4096);
  page.tpr = 0x50;
  page.request(0x91);
  const view = new DataView(buffer, 4096);
  expect([view.getUint32(0x80, true), view.getUint32(0x240, true)]).toEqual([0x50, 1 << 17]);
  view.setUint32(0x110, 2, true);
  view.setUint32(0x80, 0x1_0070, true);
  view.setUint32(0xa0, 0x1_0060, true);
  expect([page.tpr, page.ppr, page.requested, page.inService]).toEqual([0x70, 0x60, [0x91], [0x21]]);
});

test('events to inject and events seen are the same 32 bits', () => {
  expect(encodeEvent({ type: 'hardware-exception', vector: 14, errorCode: 2 })).toEqual({
    info: 0x8000_0b0e,
    errorCode: 2,
    length: 0,
  });
  expect(encodeEvent({ type: 'software-interrupt', vector: 0x80, length: 2 }).info).toBe(0x8000_0480);
  expect(decodeEvent(0x8000_1b0e, 7)).toEqual({
    type: 'hardware-exception',
    vector: 14,
    errorCode: 7,
    nmiUnblocking: true,
  });
  expect(decodeEvent(0x0000_0b0e, 7)).toBeUndefined();
  expect(() => encodeEvent({ type: 'nmi', vector: 256 })).toThrow(RangeError);
});

test('options that their VMCS field cannot hold', () => {
  const buffer = memory();
  const host = { memory: buffer, allocate: pages(), at: at(buffer), ept: new Ept(buffer, pages(), {}) };
  const made = (options: L2Options) => () => new L2Structures(host, options);
  expect(made({ exceptionBitmap: 2 ** 32 })).toThrow('the exception bitmap is between 0 and 4294967295');
  expect(made({ vpid: 0x1_0000 })).toThrow('a VPID is between 1 and 65535, not 65536');
  expect(made({ tprThreshold: 16 })).toThrow('a TPR threshold is between 0 and 15, not 16');
  expect(made({ preemptionTimer: -1 })).toThrow('the preemption timer is between 0 and 4294967295');
  expect(made({ postedInterrupts: { vector: 256 } })).toThrow('a notification vector is between 0 and 255');
  const badAddresses: L2Options[] = [
    { apicAccess: -4096 },
    { virtualApic: 1.5 },
    { msrBitmap: 2 ** 53 },
    { entry: -1 },
  ];
  badAddresses.push({ postedInterrupts: { vector: 1, descriptor: -64 } });
  for (const options of badAddresses) expect(made(options)).toThrow(/is between 0 and 9007199254740991, not/);
});

describe('paging', () => {
  /** A walk of our own: the frame, the level and the entry that an address ends at. */
  function walk(buffer: ArrayBuffer, root: number, address: number, large = 0x80n) {
    const view = new DataView(buffer);
    let table = root;
    for (let level = 4; ; level -= 1) {
      const index = Number((BigInt(address) >> BigInt(12 + 9 * (level - 1))) & 511n);
      const entry = view.getBigUint64(table + index * 8, true);
      if (level === 1 || (entry & 7n) === 0n || (level < 4 && entry & large)) return { level, entry };
      table = Number(entry & 0xf_ffff_ffff_f000n);
    }
  }

  // First of all: what a tree may share with others is made with the first
  test('a second tree is like the first when that was new', () => {
    const buffer = memory();
    const allocate = pages();
    const first = new Ept(buffer, allocate, {});
    first.unmap(0xffe0_0000, '2M');
    const second = new Ept(buffer, allocate, {});
    expect(walk(buffer, first.root, 0xffe0_0000)).toEqual({ level: 2, entry: 0n });
    expect(walk(buffer, second.root, 0xffe0_0000)).toEqual({ level: 2, entry: 0xffe0_00b7n });
    const tables = new PageTables(buffer, allocate, {});
    expect(walk(buffer, tables.root, 0xffe0_0000)).toEqual({ level: 2, entry: 0xffe0_00e3n });
  });

  test('an EPT maps 4 GiB to itself; pages are split, moved, protected and broken one at a time', () => {
    const buffer = memory();
    const ept = new Ept(buffer, pages(), { accessedDirty: true });
    expect(ept.pointer).toBe(0x5en);
    const look = (gpa: number) => walk(buffer, ept.root, gpa);
    expect(look(0xffe0_0000)).toEqual({ level: 2, entry: 0xffe0_00b7n });
    expect(look(0x1_0000_0000).entry).toBe(0n);
    ept.map(0x20_3000, 0x5000);
    expect(look(0x20_3000)).toEqual({ level: 1, entry: 0x5037n });
    expect(look(0x20_4000)).toEqual({ level: 1, entry: 0x20_4037n });
    ept.protect(0x20_3000, { write: false, execute: false });
    expect(look(0x20_3000).entry).toBe(0x5031n);
    ept.misconfigure(0x20_4000);
    expect(look(0x20_4000).entry & 7n).toBe(2n);
    ept.misconfigure(0x20_5000, 'memory-type');
    expect((look(0x20_5000).entry >> 3n) & 7n).toBe(7n);
    ept.map(0x80_0000_0000, { to: 0x4000_0000, size: '1G', memoryType: 'uncacheable' });
    expect(look(0x80_3fff_f000)).toEqual({ level: 3, entry: 0x4000_0087n });
    ept.unmap(0x80_0020_0000, '2M');
    expect(look(0x80_0020_0000)).toEqual({ level: 2, entry: 0n });
    expect(look(0x80_0040_0000)).toEqual({ level: 2, entry: 0x4040_0087n });
    expect(() => ept.map(2 ** 48)).toThrow('outside the 256 TiB');
  });

  test('page tables: sizes, permissions, flags', () => {
    const buffer = memory();
    const allocate = pages();
    const tables = new PageTables(buffer, allocate, { pageSize: '1G' });
    expect(walk(buffer, tables.root, 0xc000_1000)).toEqual({ level: 3, entry: 0xc000_00e3n });
    tables.map(0x4_0000_0000, { to: 0x7000, writable: false, user: true });
    expect(walk(buffer, tables.root, 0x4_0000_0000)).toEqual({ level: 1, entry: 0x7065n });
    tables.clearFlags(0x4_0000_0000);
    expect(tables.flags(0x4_0000_0000)).toEqual({ accessed: false, dirty: false });
    const empty = new PageTables(buffer, allocate, { empty: true });
    expect(empty.entry(0)).toEqual({ at: empty.root, value: 0n, level: 4 });
  });
});

describe('VMCS fields', () => {
  test('the whole table: each name has the width and the type that its encoding says', () => {
    const count = new Map<string, number>();
    for (const name of VMCS_FIELD_NAMES) {
      const { encoding, width, type, high } = vmcsFieldInfo(name);
      expect(high, name).toBe(false);
      expect(encoding & 0x9000, name).toBe(0);
      count.set(`${width} ${type}`, (count.get(`${width} ${type}`) ?? 0) + 1);
      if (/_(ADDR|ADDRESS|BITMAP\d?|PAT|EFER)$/.test(name) && !/LINEAR|EXCEPTION_BITMAP/.test(name))
        expect(width, name).toBe(64);
      if (/^VM_EXIT_(REASON|INTR|INSTR)/.test(name)) expect([width, type], name).toEqual([32, 'read-only']);
      if (/_COUNT$|_CONTROLS?$/.test(name) && !/SECONDARY_VM_EXIT|TERTIARY|VM_FUNCTION/.test(name))
        expect(width, name).toBe(32);
    }
    expect(Object.fromEntries(count)).toEqual({
      '16 control': 5,
      '16 guest': 11,
      '16 host': 7,
      '64 control': 37,
      '64 read-only': 1,
      '64 guest': 13,
      '64 host': 4,
      '32 control': 19,
      '32 read-only': 8,
      '32 guest': 23,
      '32 host': 1,
      'natural control': 8,
      'natural read-only': 6,
      'natural guest': 23,
      'natural host': 15,
    });
  });

  test('an eVMCS: no two fields overlap, each is aligned, the last ends at 1016', () => {
    const places = [...EVMCS_FIELDS.values(), ...Object.values(EVMCS_WORDS)];
    const used = new Map<number, number>();
    for (const { offset, bytes } of places) {
      expect(offset % bytes).toBe(0);
      for (let i = 0; i < bytes; i += 1) used.set(offset + i, (used.get(offset + i) ?? 0) + 1);
    }
    expect([...used.values()].every((times) => times === 1)).toBe(true);
    expect(Math.max(...used.keys())).toBe(1015);
    for (const missing of [
      'APIC_ACCESS_ADDR',
      'POSTED_INTR_DESC_ADDR',
      'GUEST_INTR_STATUS',
      'EOI_EXIT_BITMAP0',
    ] as const) {
      expect(EVMCS_FIELDS.has(VMCS_FIELDS[missing]), missing).toBe(false);
    }
    expect(EVMCS_FIELDS.get(VMCS_FIELDS.GUEST_RIP)).toEqual({ offset: 816, bytes: 8, group: null });
    const indices = [...EVMCS_FIELDS.keys()].map(evmcsMapIndex);
    expect(new Set(indices).size).toBe(indices.length);
    expect(evmcsMap()[evmcsMapIndex(VMCS_FIELDS.EXCEPTION_BITMAP)]).toBe(((1 << 7) << 16) | 792);
  });
});

test('exit qualifications', () => {
  const registers = Object.fromEntries(
    [
      'rax',
      'rcx',
      'rdx',
      'rbx',
      'rsp',
      'rbp',
      'rsi',
      'rdi',
      'r8',
      'r9',
      'r10',
      'r11',
      'r12',
      'r13',
      'r14',
      'r15',
    ].map((name, i) => [name, BigInt(i)]),
  ) as never;
  const common = {
    guestLinearAddress: 0x77n,
    guestPhysicalAddress: 0x88,
    instructionInfo: 3 << 28,
    registers,
  };
  const detail = (reason: string, qualification: bigint, info = 0) =>
    exitDetail({
      ...common,
      reason: reason as never,
      qualification,
      interruptionInfo: info,
      interruptionErrorCode: 9,
    });
  expect(detail('control-register-access', 0x0f03n)).toMatchObject({
    register: 3,
    access: 'mov-to',
    operand: 'r15',
  });
  expect(detail('control-register-access', 0x1234_0030n)).toMatchObject({
    access: 'lmsw',
    source: 0x1234,
    operand: undefined,
  });
  expect(detail('mov-dr', 0x317n)).toMatchObject({ register: 7, access: 'mov-from', operand: 'rbx' });
  expect(detail('io-instruction', 0x03f8_0079n)).toEqual({
    reason: 'io-instruction',
    port: 0x3f8,
    size: 2,
    direction: 'in',
    string: true,
    rep: true,
    portOperand: 'immediate',
  });
  expect(detail('wrmsr', 0n)).toEqual({ reason: 'wrmsr', index: 1, value: 0x2_0000_0000n });
  expect(detail('apic-access', 0x1080n)).toEqual({
    reason: 'apic-access',
    offset: 0x80,
    access: 'linear-write',
  });
  expect(detail('ept-violation', 0x8dn)).toMatchObject({
    read: true,
    write: false,
    execute: true,
    guestLinearAddress: 0x77n,
    translated: false,
    allowed: { read: true, write: false, execute: false },
  });
  expect(detail('ept-violation', 0x2n)).toMatchObject({ write: true, guestLinearAddress: undefined });
  expect(detail('task-switch', 0xc000_0028n)).toMatchObject({ selector: 0x28, source: 'task-gate' });
  expect(detail('gdtr-idtr-access', 0n)).toMatchObject({ instruction: 'lidt' });
  expect(detail('external-interrupt', 0n, 0x8000_0061)).toEqual({
    reason: 'external-interrupt',
    vector: 0x61,
  });
  expect(detail('external-interrupt', 0n)).toEqual({ reason: 'external-interrupt', vector: undefined });
  expect(detail('exception-or-nmi', 5n, 0x8000_0b0e)).toMatchObject({
    event: { vector: 14, errorCode: 9 },
    qualification: 5n,
  });
  expect(detail('invalid-guest-state', 4n)).toMatchObject({ why: 'vmcs-link-pointer' });
  expect(detail('vmcall', 0n)).toEqual({ reason: 'vmcall' });
});
