// SPDX-License-Identifier: Apache-2.0
import { readdirSync, readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import {
  entriesOf,
  exportsOf,
  membersOf,
  misnamed,
  missing,
  namesIn,
  signaturesOf,
  surfaceOf,
} from './surface.ts';

const root = new URL('../../', import.meta.url);
const text = (path: string) => readFileSync(new URL(path, root), 'utf8');

describe.each([
  ['kvm', 'docs/api-kvm.md', ['Vm.clone', 'Vcpu.getRegs', 'Kvm.cloneVm', 'MemoryRegion.discard', 'EventFd']],
  ['guest', 'docs/api-guest.md', ['L1.clone', 'L2.enter', 'Ept.map', 'Batch.vmxon', 'foldChecksum']],
] as const)('lib/%s', (folder, page, known) => {
  const surface = surfaceOf(folder);

  test(`${page} has every call`, () => {
    expect(missing(surface.calls, text(page))).toEqual([]);
    expect(surface.calls).toEqual(expect.arrayContaining([...known]));
  });

  test(`${page} says what each method takes`, () => {
    expect(misnamed(surface.signatures, text(page))).toEqual([]);
    expect(surface.signatures.size).toBeGreaterThan(80);
  });

  test(`${page} has every type`, () => {
    expect(missing(surface.types, text(page))).toEqual([]);
    expect(surface.types.length).toBeGreaterThan(20);
  });
});

test('docs/api-kvm.md has every request that the addon can make, beside a call', () => {
  const sources = readdirSync(new URL('native/kvm', root))
    .filter((name) => name.endsWith('.cc'))
    .map((name) => text(`native/kvm/${name}`))
    .join('\n');
  // The table's rows, the wrappers of single requests, and what those with a number of ours name in their errors
  const known = /NVMX_[A-Z]+\((KVM_\w+)|\bioctl\([^,;]+, (KVM_\w+)|"ioctl", "(KVM_\w+)"/g;
  const requests = new Set(
    [...sources.matchAll(known)].map(([, ...names]) => names.find((name) => name !== undefined)!),
  );
  expect([...requests]).toEqual(
    expect.arrayContaining(['KVM_SET_REGS', 'KVM_RUN', 'KVM_SET_USER_MEMORY_REGION2', 'KVM_GET_XSAVE2']),
  );
  expect(requests.size).toBeGreaterThan(70);
  const calls = new Set(surfaceOf('kvm').calls.map((call) => call.split('.').at(-1)!));
  const entries = entriesOf(text('docs/api-kvm.md')).map((entry) => ({
    words: new Set(entry.match(/\bKVM_\w+/g)),
    hasCall: [...namesIn(entry)].some((name) => calls.has(name)),
  }));
  const said = (request: string) => entries.some(({ words, hasCall }) => hasCall && words.has(request));
  expect([...requests].filter((request) => !said(request))).toEqual([]);
});

test('the check sees what is public and what is not', () => {
  const index = "export { a, type B } from './x.ts';\nexport type {\n  C,\n} from './y.ts';\n";
  expect(exportsOf(index, 'kvm').map(({ name, isType }) => [name, isType])).toEqual([
    ['a', false],
    ['B', true],
    ['C', true],
  ]);
  const source = [
    'export abstract class Base {',
    '  shared(): void {}',
    '}',
    'export class D extends Base {',
    '  readonly one: number;',
    '  #two = 1;',
    '  /** @internal */',
    '  three(): void {}',
    '  /** Public. */',
    '  static async *four<T>(): T {',
    '    inner();',
    '  }',
    '  get five(): number {',
    '  six(a = f(1, 2), b?: Map<A, B>, { c, d }: E = {}, ...e: F[]): void {',
    '  protected seven(): void {}',
    '}',
  ].join('\n');
  expect(membersOf(source, 'D', () => '')).toEqual(['one', 'four', 'five', 'six', 'shared']);
  expect(membersOf(source, 'E', () => '')).toBeUndefined();
  const signatures = signaturesOf(source, 'D', () => '');
  expect([...signatures]).toEqual([['six', ['a', 'b', '', '']]]);
  const page = (call: string) => misnamed(new Map([['D.six', signatures.get('six')!]]), `\`${call}\``);
  expect(page('d.six(a = 1, b?, { c, d }, …)')).toEqual([]);
  expect([page('six(a, b)'), page('six(a, x, {}, e)')]).toEqual([['D.six(a, b, , )'], ['D.six(a, b, , )']]);
  expect(entriesOf('| a |\n| b |\n\nc\nd\n* e\n  f')).toEqual(['| a |', '| b |', '\nc\nd', '* e\n  f']);
  expect([...namesIn('run `one(two)` three\n```ts\nfour();\n```')]).toEqual(['one', 'two', 'ts', 'four']);
  expect(missing(['D.one', 'D.five'], '`one`')).toEqual(['D.five']);
});
