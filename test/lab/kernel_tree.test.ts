// SPDX-License-Identifier: Apache-2.0
import { chmodSync, existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { replaceEntry } from '../../lib/lab/cache.ts';
import { prepareKernel } from '../../lib/lab/kernel.ts';
import { errorLines } from '../../lib/lab/kernel_build.ts';
import {
  checkRequired,
  LAB_CONFIG,
  mergeConfigs,
  parseConfig,
  renderConfig,
  unmetOptions,
} from '../../lib/lab/kernel_config.ts';
import { checkKernelName, findBuiltKernel, listKernels, removeKernel } from '../../lib/lab/kernel_store.ts';
import { missingBuildPackages } from '../../lib/lab/kernel_tools.ts';
import { locateTree, openTree, patchTree } from '../../lib/lab/kernel_tree.ts';
import { parsePatches } from '../../lib/lab/mbox.ts';
import { bzImage, ownCache } from './fixtures.ts';

let folder: string;
let origin: string;
ownCache((own) => {
  folder = own;
  origin = join(folder, 'linux');
  put('Kbuild', '');
  put('Makefile', 'VERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = 4\nEXTRAVERSION =\n');
  put('arch/x86/Kconfig', '');
  put('a.c', 'one\ntwo\nthree\n');
  put('b.c', 'other\n');
}, 'cache');

function put(path: string, text: string): void {
  mkdirSync(dirname(join(origin, path)), { recursive: true });
  writeFileSync(join(origin, path), text);
}

const patchOf = (old: string, fresh: string) =>
  parsePatches(`--- a/a.c\n+++ b/a.c\n@@ -1,3 +1,3 @@\n one\n-${old}\n+${fresh}\n three\n`, 'p');
const open = async () => await openTree(await locateTree(origin, {}), {});

describe('a kernel source', () => {
  test('is copied without what was built in it, and again only what changed', async () => {
    put('init/main.o', 'x');
    put('.config', 'x');
    put('include/generated/x.h', 'x');
    const tree = await open();
    expect(readFileSync(join(tree.source, 'a.c'), 'utf8')).toBe('one\ntwo\nthree\n');
    for (const path of ['init/main.o', '.config', 'include/generated/x.h'])
      expect(existsSync(join(tree.source, path))).toBe(false);
    const inode = statSync(join(tree.source, 'b.c')).ino;
    put('a.c', 'changed\n');
    rmSync(join(origin, 'arch/x86/Kconfig'));
    const again = await openTree({ folder: tree.folder, origin, debian: undefined }, {});
    expect(again.identity).not.toBe(tree.identity);
    expect(readFileSync(join(tree.source, 'a.c'), 'utf8')).toBe('changed\n');
    expect(existsSync(join(tree.source, 'arch/x86/Kconfig'))).toBe(false);
    expect(statSync(join(tree.source, 'b.c')).ino).toBe(inode);
  });

  test('patches are put on and taken off, and only files that change are written', async () => {
    const tree = await open();
    expect(await patchTree(tree, patchOf('two', '2'))).toEqual(['a.c']);
    expect(await patchTree(tree, patchOf('two', '2'))).toEqual([]);
    expect(await patchTree(tree, patchOf('two', 'II'))).toEqual(['a.c']);
    expect(readFileSync(join(tree.source, 'a.c'), 'utf8')).toBe('one\nII\nthree\n');
    expect(await patchTree(tree, [])).toEqual(['a.c']);
    expect(readFileSync(join(tree.source, 'a.c'), 'utf8')).toBe('one\ntwo\nthree\n');
    expect(readFileSync(join(origin, 'a.c'), 'utf8')).toBe('one\ntwo\nthree\n');
  });

  test('a change of the source beneath a patch is taken over with the patch on it', async () => {
    const tree = await open();
    await patchTree(tree, patchOf('two', '2'));
    put('a.c', 'zero\none\ntwo\nthree\n');
    await open();
    await patchTree(tree, patchOf('two', '2'));
    expect(readFileSync(join(tree.source, 'a.c'), 'utf8')).toBe('zero\none\n2\nthree\n');
    await patchTree(tree, []);
    expect(readFileSync(join(tree.source, 'a.c'), 'utf8')).toBe('zero\none\ntwo\nthree\n');
  });

  test('a series whose second patch does not apply changes nothing', async () => {
    const tree = await open();
    const series = [...patchOf('two', '2'), ...patchOf('two', 'again')];
    await expect(patchTree(tree, series)).rejects.toThrow('does not apply');
    expect(readFileSync(join(tree.source, 'a.c'), 'utf8')).toBe('one\ntwo\nthree\n');
  });

  test('an executable file stays one', async () => {
    put('a.c', 'one\ntwo\nthree\n');
    chmodSync(join(origin, 'a.c'), 0o755);
    const tree = await open();
    await patchTree(tree, patchOf('two', '2'));
    expect(statSync(join(tree.source, 'a.c')).mode & 0o777).toBe(0o755);
  });

  test('a folder that is no kernel source is refused', async () => {
    await expect(locateTree(folder, {})).rejects.toMatchObject({ what: 'this is not a kernel source' });
  });
});

describe('a configuration', () => {
  test('is read, merged with the last one winning, and written in order', () => {
    const one = parseConfig('# a comment\nCONFIG_B=y\nCONFIG_A="text"\n', 'f');
    const two = parseConfig('# CONFIG_B is not set\nCONFIG_C=8\n', 'f');
    expect(renderConfig(mergeConfigs(one, two))).toBe('CONFIG_A="text"\n# CONFIG_B is not set\nCONFIG_C=8\n');
    expect(() => parseConfig('CONFIG_A\n', 'f')).toThrow('f, line 1: CONFIG_A');
  });

  test('what Kconfig did not take is told, and a kernel without KVM is refused', () => {
    const made = parseConfig('CONFIG_A=y\nCONFIG_KVM=y\n', 'f');
    expect(unmetOptions(parseConfig('CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n', 'f'), made)).toEqual([
      'CONFIG_B=y (is n)',
    ]);
    expect(() => checkRequired(made)).toThrow('CONFIG_64BIT, CONFIG_KVM_INTEL');
    expect(() => checkRequired(LAB_CONFIG)).not.toThrow();
  });
});

describe('built kernels', () => {
  const about = {
    release: '7.3.4-mine',
    source: 'x',
    patches: ['P'],
    btf: false,
    builtAt: '1',
    contents: 'c',
  };
  const make = (name: string): Promise<unknown> =>
    replaceEntry(`kernel/built/${name}`, {}, async (place) => {
      writeFileSync(join(place, 'bzImage'), bzImage('7.3.4-mine'));
      return about;
    });

  test('a name is a kernel for the lab; a path is never a name', async () => {
    await make('mine');
    const kernel = await prepareKernel('mine');
    expect(kernel).toMatchObject({ release: '7.3.4-mine', source: 'mine (x, 1 patches)', modules: [] });
    await expect(prepareKernel('./mine')).rejects.toMatchObject({ what: 'there is no such kernel' });
    await expect(prepareKernel('yours')).rejects.toThrow('there are: mine');
  });

  test('they are listed and removed; a damaged one is thrown away with a notice', async () => {
    await make('one');
    await make('two');
    writeFileSync(join(folder, 'cache/kernel/built/two/bzImage'), 'x');
    const said: string[] = [];
    const found = await listKernels({ onProgress: (text) => said.push(text) });
    expect(found.map(({ name }) => name)).toEqual(['one']);
    expect(said).toHaveLength(1);
    expect(said[0]).toMatch(/two is damaged \(bzImage has 1 bytes instead of 65536\); build it again/);
    await removeKernel('one');
    expect(await findBuiltKernel('one')).toBeUndefined();
    await expect(removeKernel('one')).rejects.toMatchObject({ what: 'there is no such kernel' });
    await expect(removeKernel('../built')).rejects.toMatchObject({ what: 'there is no such kernel' });
  });

  test.each(['', '-x', 'a/b', '..', 'x'.repeat(41)])('"%s" is no name', (name) => {
    expect(() => checkKernelName(name)).toThrow('this is no name for a kernel');
  });
});

test('the packages that are missing are named', () => {
  const tool = (name: string, there: boolean) => ({ package: name, isThere: () => there });
  expect(missingBuildPackages(false, [tool('flex', false), tool('make', true), tool('bc', false)])).toEqual([
    'flex',
    'bc',
  ]);
});

test('of a failed build the compiler own words are shown', () => {
  const text = [
    '  CC      arch/x86/kvm/vmx/vmx.o',
    'arch/x86/kvm/vmx/nested.c: In function f:',
    "arch/x86/kvm/vmx/nested.c:12:3: error: 'x' undeclared",
    '   12 |   x = 1;',
    '  CC      mm/slub.o',
    'make[5]: *** [scripts/Makefile.build:229: arch/x86/kvm/vmx/nested.o] Error 1',
  ].join('\n');
  expect(errorLines(text)).toBe(
    "arch/x86/kvm/vmx/nested.c: In function f:\narch/x86/kvm/vmx/nested.c:12:3: error: 'x' undeclared\n   12 |   x = 1;",
  );
});
