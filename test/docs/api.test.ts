// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { exportsOf, membersOf, missing, namesIn, surfaceOf } from './surface.ts';

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

  test(`${page} has every type`, () => {
    expect(missing(surface.types, text(page))).toEqual([]);
    expect(surface.types.length).toBeGreaterThan(20);
  });
});

test('docs/api-kvm.md has every request that the addon can make', () => {
  const requests = [...text('native/kvm/ioctls.cc').matchAll(/NVMX_[A-Z]+\((KVM_\w+)/g)].map(
    ([, name]) => name!,
  );
  expect(requests.length).toBeGreaterThan(60);
  const page = text('docs/api-kvm.md');
  expect([...new Set(requests)].filter((name) => !new RegExp(`\\b${name}\\b`).test(page))).toEqual([]);
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
    '  protected six(): void {}',
    '}',
  ].join('\n');
  expect(membersOf(source, 'D', () => '')).toEqual(['one', 'four', 'five', 'shared']);
  expect(membersOf(source, 'E', () => '')).toBeUndefined();
  expect([...namesIn('run `one(two)` three\n```ts\nfour();\n```')]).toEqual(['one', 'two', 'ts', 'four']);
  expect(missing(['D.one', 'D.five'], '`one`')).toEqual(['D.five']);
});
