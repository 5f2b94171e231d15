// SPDX-License-Identifier: Apache-2.0
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { structMembers } from '../../lib/probe/btf.ts';
import { type Fingerprint, fingerprint, type PatchFinding } from '../../lib/probe/fingerprint.ts';
import { readSeries } from '../../lib/probe/series.ts';

const folder = mkdtempSync(join(tmpdir(), 'nvmx-btf-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** A BTF file with the given structs after one INT and one ARRAY, whose sizes a reader must step over. */
function btf(structs: Record<string, string[]>, baseStrings = ''): Buffer {
  let strings = baseStrings === '' ? '\0' : '';
  const shift = Buffer.byteLength(baseStrings);
  const add = (text: string): number => {
    const inBase = baseStrings.indexOf(`\0${text}\0`);
    if (inBase >= 0) return inBase + 1;
    const at = shift + Buffer.byteLength(strings);
    strings += `${text}\0`;
    return at;
  };
  const words: number[] = [add('int'), 1 << 24, 4, 0x0100_0020, 0, 3 << 24, 0, 1, 1, 4];
  for (const [name, members] of Object.entries(structs)) {
    words.push(add(name), (4 << 24) | members.length, 4 * members.length);
    for (const [i, member] of members.entries()) words.push(add(member), 1, 32 * i);
  }
  const types = Buffer.from(Uint32Array.from(words).buffer);
  const text = Buffer.from(strings);
  const header = Buffer.alloc(24);
  header.writeUInt16LE(0xeb9f, 0);
  header.writeUInt8(1, 2);
  header.writeUInt32LE(24, 4);
  header.writeUInt32LE(0, 8);
  header.writeUInt32LE(types.length, 12);
  header.writeUInt32LE(types.length, 16);
  header.writeUInt32LE(text.length, 20);
  return Buffer.concat([header, types, text]);
}

function file(name: string, data: Buffer): string {
  const path = join(folder, name);
  writeFileSync(path, data);
  return path;
}

describe('structMembers', () => {
  test('finds the members of the structs asked for and no others', () => {
    const path = file('own', btf({ a: ['x', 'y'], nested_vmx: ['vmxon', 'msr_bitmap_cache'], b: ['z'] }));
    expect(structMembers(path, new Set(['nested_vmx', 'missing']))).toEqual(
      new Map([['nested_vmx', new Set(['vmxon', 'msr_bitmap_cache'])]]),
    );
  });

  test("a module's strings go on where the base's end", () => {
    const base = '\0int\0vmxon\0';
    const basePath = file('base', btf({}, ''));
    const whole = btf({ s: ['vmxon', 'fresh'] }, base);
    // The base file must hold exactly those strings.
    const baseData = btf({ q: [] });
    const text = Buffer.from(base);
    baseData.writeUInt32LE(text.length, 20);
    const start = 24 + baseData.readUInt32LE(16);
    writeFileSync(basePath, Buffer.concat([baseData.subarray(0, start), text]));
    expect(structMembers(file('module', whole), new Set(['s']), basePath)).toEqual(
      new Map([['s', new Set(['vmxon', 'fresh'])]]),
    );
  });

  test('what is not BTF is refused', () => {
    expect(() => structMembers(file('bad', Buffer.from('ELF')), new Set())).toThrow('not BTF data');
  });
});

describe('fingerprint', () => {
  const find = (found: Fingerprint, number: number): PatchFinding =>
    found.patches.find(({ patch }) => patch === number)!;

  test('no source: stock is only assumed', () => {
    const found = fingerprint({ notes: [] });
    expect([found.kind, found.certain]).toEqual(['stock', false]);
    expect(new Set(found.patches.map((patch) => patch.state))).toEqual(new Set(['unknown']));
  });

  test('statistics without the counters: certainly stock', () => {
    const found = fingerprint({ vmStats: new Set(['remote_tlb_flush']), notes: [] });
    expect([found.kind, found.certain]).toEqual(['stock', true]);
    expect(found.patches.find((patch) => patch.patch === 8)?.state).toBe('absent');
  });

  test('either trace of a deciding patch makes it patched', () => {
    const structsOfOthers = new Map([['nested_vmx', new Set(['vmxon', 'pi_desc'])]]);
    const byStat = fingerprint({
      vmStats: new Set(['nested_context_reuse']),
      structs: structsOfOthers,
      notes: [],
    });
    expect([byStat.changes.contexts, byStat.certain]).toEqual(['patched', true]);
    const structs = new Map([['nested_vmx', new Set(['apic_access_page_cache'])]]);
    const byBtf = fingerprint({ vmStats: new Set(), structs, notes: [] });
    expect(byBtf.changes.pages).toBe('patched');
    expect(find(byBtf, 4).evidence).toEqual(['BTF nested_vmx.apic_access_page_cache: there']);
  });

  test('a part of the series: each change has its own answer', () => {
    const structs = new Map([
      ['nested_vmx', new Set(['msr_bitmap_cache', 'apic_access_page_cache'])],
      ['gfn_to_pfn_cache', new Set(['vcpu'])],
    ]);
    const found = fingerprint({ vmStats: new Set(), structs, notes: [] });
    expect(found.kind).toBe('partly patched');
    expect(found.changes).toEqual({
      'msr-bitmap': 'patched',
      pages: 'patched',
      evmcs: 'stock',
      contexts: 'stock',
    });
  });

  test('what is unknown follows from the patches around it', () => {
    const late = fingerprint({ vmStats: new Set(['nested_context_reuse']), notes: [] });
    expect([late.kind, late.certain]).toEqual(['patched', true]);
    expect(find(late, 1)).toMatchObject({
      state: 'present',
      evidence: [
        'BTF nested_vmx.msr_bitmap_cache: cannot be looked up here',
        'patch 8 is there, which comes after it',
      ],
    });
    expect(find(late, 9).state).toBe('unknown');
    const early = fingerprint({ symbols: new Set(['__kvm_gpc_init']), notes: [] });
    expect([1, 2, 3, 4, 7, 8, 9].map((patch) => find(early, patch).state)).toEqual([
      'present',
      'present',
      ...Array.from({ length: 5 }, () => 'absent'),
    ]);
    expect(find(early, 4).evidence.at(-1)).toBe('patch 3 is not there');
  });

  test('a member that older kernels had in another struct of that name', () => {
    const cache = (...members: string[]) =>
      fingerprint({ structs: new Map([['gfn_to_pfn_cache', new Set(members)]]), notes: [] });
    expect(find(cache('vcpu', 'usage'), 2)).toMatchObject({
      state: 'absent',
      evidence: ['BTF gfn_to_pfn_cache.vcpu without usage: not there'],
    });
    expect(find(cache('vcpu'), 2).state).toBe('present');
  });

  test('what an L2 saw, and what nobody tried', () => {
    const behaviours = new Map([['discarded-page-traps', true]] as const);
    const found = fingerprint({ behaviours, notes: [] });
    expect(find(found, 4)).toMatchObject({
      state: 'present',
      evidence: [expect.stringContaining('BTF'), 'behaviour discarded-page-traps: seen, an L2 ran'],
    });
    expect(find(found, 7)).toMatchObject({ state: 'unknown', evidence: [expect.stringContaining('BTF')] });
  });
});

describe('the names of a series', () => {
  const own = JSON.parse(readFileSync(new URL('../../lib/probe/series.json', import.meta.url), 'utf8'));
  const written = (value: unknown): string => file('series.json', Buffer.from(JSON.stringify(value)));

  test('come from the file that NVMX_SERIES names', () => {
    const renamed = {
      ...own,
      patches: [{ patch: 3, title: 't', traces: [{ kind: 'vm-stat', name: 'new' }] }],
    };
    const changes = { 'msr-bitmap': 3, pages: 3, evmcs: 3, contexts: 3 };
    process.env['NVMX_SERIES'] = written({ ...renamed, changes });
    try {
      expect(fingerprint({ vmStats: new Set(['new']), notes: [] })).toMatchObject({
        kind: 'patched',
        certain: true,
        patches: [{ patch: 3, state: 'present', evidence: ['VM statistic new: there'] }],
      });
    } finally {
      delete process.env['NVMX_SERIES'];
    }
    expect(fingerprint({ vmStats: new Set(['new']), notes: [] })).toMatchObject({ kind: 'stock' });
  });

  test.each([
    [{ ...own, title: 1 }, '"title" is not a text'],
    [{ ...own, patches: [] }, '"patches" is not a list'],
    [{ ...own, patches: [{ patch: 0 }] }, 'patches[0]: "patch" is not a whole number'],
    [
      { ...own, patches: [{ patch: 1, title: 't', traces: [{ kind: 'btf-member', struct: 's' }] }] },
      'traces[0] is no',
    ],
    [
      { ...own, patches: [{ patch: 1, title: 't', traces: [{ kind: 'behaviour', name: 'nice' }] }] },
      '{kind: "behaviour", name: "discarded-page-traps" or ',
    ],
    [{ ...own, changes: { ...own.changes, pages: 5 } }, '"changes" does not give msr-bitmap, pages, evmcs'],
    [{ ...own, contextStats: { reuse: 'a' } }, '"contextStats" does not name'],
    [{ ...own, contextsPerCpu: 0 }, '"contextsPerCpu" is not a whole number'],
    [[], 'it is not a JSON object'],
  ])('that are wrong are refused with the place %#', (value, why) => {
    expect(() => readSeries(written(value))).toThrow(why);
  });

  test('that are not JSON, or not there, are refused', () => {
    expect(() => readSeries(file('bad.json', Buffer.from('{')))).toThrow(/bad\.json cannot be used: .*JSON/);
    expect(() => readSeries(join(folder, 'missing.json'))).toThrow('ENOENT');
  });
});
