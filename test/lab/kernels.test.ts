// SPDX-License-Identifier: Apache-2.0
// The kernels that a lab machine boots: which one is meant, its image and its modules.
import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { expect, test } from 'vitest';
import {
  isImage,
  matchesVersion,
  parseKernelSpec,
  parseMadison,
  prepareKernel,
} from '../../lib/lab/kernel.ts';
import { bootImages, readLinuxImage } from '../../lib/lab/linux_image.ts';
import { loadModules, moduleDepends, splitSignature } from '../../lib/lab/modules.ts';
import { bzImage, moduleFile, ownCache } from './fixtures.ts';

let folder: string;
ownCache((own) => {
  folder = own;
});

test('what the text means', () => {
  expect(parseKernelSpec(undefined)).toEqual({ kind: 'running' });
  const cloud = { kind: 'debian', flavour: 'cloud-amd64' };
  expect(parseKernelSpec('debian:6.12')).toEqual({ ...cloud, version: '6.12' });
  expect(parseKernelSpec('debian:6.12.107-1')).toEqual({ ...cloud, version: '6.12.107-1' });
  expect(parseKernelSpec('debian:7-amd64')).toEqual({ kind: 'debian', version: '7', flavour: 'amd64' });
  expect(parseKernelSpec('debian:7.3.4-1~bpo13+1-rt-amd64')).toEqual({
    kind: 'debian',
    version: '7.3.4-1~bpo13+1',
    flavour: 'rt-amd64',
  });
  expect(parseKernelSpec('/boot/vmlinuz')).toEqual({ kind: 'path', path: '/boot/vmlinuz' });
  expect(() => parseKernelSpec('')).toThrow('no kernel is named');
  expect(() => parseKernelSpec('debian:../x')).toThrow('this is no kernel version');
});

test('an image of a flavour is told from the others', () => {
  for (const release of ['6.1.0-50', '6.12.107+deb13', '6.12.12+bpo', '7.3.4+deb13']) {
    expect(isImage(`linux-image-${release}-amd64`, 'amd64')).toBe(true);
    expect(isImage(`linux-image-${release}-cloud-amd64`, 'amd64')).toBe(false);
    expect(isImage(`linux-image-${release}-cloud-amd64`, 'cloud-amd64')).toBe(true);
    expect(isImage(`linux-image-${release}-amd64-unsigned`, 'amd64')).toBe(false);
    expect(isImage(`linux-image-${release}-amd64-dbg`, 'amd64')).toBe(false);
  }
  expect(isImage('linux-image-amd64', 'amd64')).toBe(false);
});

test('a version prefix ends where a number ends', () => {
  expect(matchesVersion('6.12.107-1', '6.12')).toBe(true);
  expect(matchesVersion('6.12.107-1', '6.1')).toBe(false);
  expect(matchesVersion('6.12.107-1', '6.')).toBe(true);
  expect(matchesVersion('6.12.107-1', '6.12.107-1')).toBe(true);
});

test('versions are sorted as numbers, each once', () => {
  const row = (version: string): string =>
    `linux-image-x | ${version} | http://mirror.test trixie/main amd64 Packages`;
  const table = [row('6.12.9-1'), row('6.12.107-1'), row('6.12.9-1')].join('\n');
  expect(parseMadison(table).map((one) => one.version)).toEqual(['6.12.9-1', '6.12.107-1']);
});

test('a file that is no kernel, a file that is not there, a folder without a kernel', async () => {
  const file = join(folder, 'text');
  writeFileSync(file, 'x'.repeat(100_000));
  await expect(prepareKernel(file)).rejects.toMatchObject({
    name: 'LabError',
    what: 'this is not a Linux kernel',
  });
  await expect(prepareKernel(join(folder, 'no'))).rejects.toMatchObject({
    what: 'there is no such kernel',
  });
  await expect(prepareKernel(folder)).rejects.toMatchObject({ what: 'there is no kernel here' });
});

test.each([
  ['boot/vmlinuz-7.2.13', 'lib/modules/7.2.13'],
  ['usr/lib/modules/7.2.13/vmlinuz', 'usr/lib/modules/7.2.13'],
])('the image of an unpacked package is found at %s', async (image, modules) => {
  for (const path of [image, `${modules}/kvm.ko`, `${modules}/kvm-intel.ko`])
    mkdirSync(join(folder, dirname(path)), { recursive: true });
  writeFileSync(join(folder, image), bzImage('7.2.13'));
  writeFileSync(join(folder, modules, 'kvm.ko'), moduleFile(''));
  writeFileSync(join(folder, modules, 'kvm-intel.ko'), moduleFile('kvm'));
  const kernel = await prepareKernel(folder);
  expect(kernel.release).toBe('7.2.13');
  expect(kernel.modules.map((module) => module.name)).toEqual(['kvm', 'kvm_intel']);
});

test('a kernel is laid out as the boot protocol asks', () => {
  const image = readLinuxImage(bzImage('6.1.0-test'), 'k');
  expect(image.release).toBe('6.1.0-test');
  const { low, kernel, ramdisk, floppy } = bootImages(image, 'quiet', 0x5000, 512 << 20);
  expect(ramdisk).toBe((496 << 20) - 0x5000);
  expect(low.readUInt32LE(0x218)).toBe(ramdisk);
  expect(low.readUInt32LE(0x21c)).toBe(0x5000);
  expect(low.toString('latin1', low.readUInt32LE(0x228) - 0x90000).split('\0')[0]).toBe('quiet');
  expect(kernel.toString('latin1', 0, 6)).toBe('kernel');
  expect(floppy.readUInt16LE(510)).toBe(0xaa55);
  expect(() => bootImages(image, 'x'.repeat(3000), 0, 512 << 20)).toThrow('too long');
  expect(() => bootImages(image, '', 200 << 20, 256 << 20)).toThrow('too little memory');
});

test('modules are loaded after what they depend on', () => {
  const files = ['/m/kvm-intel.ko', '/m/kvm.ko', '/m/irqbypass.ko', '/m/other.ko'];
  const depends: Record<string, string> = { '/m/kvm-intel.ko': 'kvm', '/m/kvm.ko': 'irqbypass,built-in' };
  const order = loadModules(['kvm', 'kvm_intel', 'absent'], files, (path) => moduleFile(depends[path] ?? ''));
  expect(order.map((module) => module.name)).toEqual(['irqbypass', 'kvm', 'kvm_intel']);
  expect(moduleDepends(moduleFile('a-b,c'))).toEqual(['a_b', 'c']);
});

test('the signature at the end of a module comes off whole', () => {
  const module = moduleFile('');
  // struct module_signature: lengths of signer and key id at 3 and 4, of the signature at 8, big-endian
  const header = Buffer.from([0, 0, 2, 3, 2, 0, 0, 0, 0, 0, 1, 4]);
  const signature = Buffer.concat([
    Buffer.from(`sigid${'s'.repeat(0x104)}`),
    header,
    Buffer.from('~Module signature appended~\n'),
  ]);
  const parts = splitSignature(Buffer.concat([module, signature]));
  expect(parts.module.equals(module)).toBe(true);
  expect(parts.signature.equals(signature)).toBe(true);
  expect(splitSignature(module)).toEqual({ module, signature: Buffer.alloc(0) });
  const cut = signature.subarray(200);
  expect(splitSignature(cut)).toEqual({ module: cut, signature: Buffer.alloc(0) });
});
