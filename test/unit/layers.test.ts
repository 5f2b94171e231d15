// SPDX-License-Identifier: Apache-2.0
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';

// From the bottom up; folders on one line stand side by side and do not know each other.
const LAYERS = [['kvm'], ['guest'], ['lab', 'probe'], ['selftest', 'bench'], ['report'], ['cli']];
const lib = new URL('../../lib/', import.meta.url).pathname;

const height = (folder: string): number => LAYERS.findIndex((layer) => layer.includes(folder));

function importsOf(text: string): string[] {
  const statements = /^(?:import|export)\b[^;'"`]*?\bfrom '([^']+)'|^import '([^']+)'/gm;
  return [...text.matchAll(statements)].map((match) => (match[1] ?? match[2])!);
}

/** Why an import in `lib/<folder>/...` is not allowed, or nothing. */
function objection(folder: string, file: string, specifier: string): string | undefined {
  if (specifier.startsWith('node:')) return undefined;
  if (!specifier.startsWith('.')) return `${file} imports the package ${specifier}`;
  const target = join('/lib', folder, file.slice(folder.length + 1), '..', specifier).split('/')[2]!;
  if (target === folder) return undefined;
  return height(target) < height(folder) && height(target) >= 0
    ? undefined
    : `${file} imports ${specifier}: "${folder}" must not know "${target}"`;
}

describe('layers', () => {
  test('every folder of lib is a layer', () => {
    const folders = readdirSync(lib, { withFileTypes: true })
      .filter((entry) => entry.isDirectory())
      .map((entry) => entry.name);
    expect(folders.filter((folder) => height(folder) < 0)).toEqual([]);
  });

  test('no import runs upward or sideways', () => {
    const objections: string[] = [];
    for (const file of readdirSync(lib, { recursive: true, encoding: 'utf8' })) {
      if (!file.endsWith('.ts')) continue;
      const folder = file.split('/')[0]!;
      for (const specifier of importsOf(readFileSync(join(lib, file), 'utf8'))) {
        const text = objection(folder, file, specifier);
        if (text) objections.push(text);
      }
    }
    expect(objections).toEqual([]);
  });

  test('the check itself sees an import that runs upward, sideways, or out of the project', () => {
    expect(objection('kvm', 'kvm/vm.ts', '../guest/index.ts')).toContain('must not know "guest"');
    expect(objection('lab', 'lab/index.ts', '../probe/index.ts')).toContain('must not know "probe"');
    expect(objection('selftest', 'selftest/engine/runner.ts', '../../report/index.ts')).toContain('"report"');
    expect(objection('kvm', 'kvm/vm.ts', 'left-pad')).toContain('left-pad');
    expect(objection('guest', 'guest/l1.ts', '../kvm/index.ts')).toBeUndefined();
    expect(objection('selftest', 'selftest/engine/runner.ts', './model.ts')).toBeUndefined();
  });

  test('native code below the binding does not know Node-API', () => {
    const native = new URL('../../native/kvm/', import.meta.url).pathname;
    const users = readdirSync(native).filter((file) =>
      /napi|node_api/i.test(readFileSync(join(native, file), 'utf8')),
    );
    expect(users).toEqual([]);
  });
});
