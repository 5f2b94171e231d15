// SPDX-License-Identifier: Apache-2.0
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { aptSources, findMirror, networkSettings, parseTargets } from '../../lib/lab/apt.ts';
import { acquireLock, cacheEntry, cacheFolder, checkEntry, temporaryFolder } from '../../lib/lab/cache.ts';
import { consoleExcerpt, findDefect } from '../../lib/lab/console.ts';
import { CpioWriter } from '../../lib/lab/cpio.ts';
import { parseCpuModels, prepareEngine } from '../../lib/lab/engine.ts';
import { applyEdit, findTarball } from '../../lib/lab/engine_source.ts';
import { initScript, jobScript, parseMark, quote } from '../../lib/lab/init_script.ts';
import { CommandMissingError, run, splitLines } from '../../lib/lab/process.ts';
import { ownCache } from './fixtures.ts';

let folder: string;
ownCache((own) => {
  folder = own;
});

describe('the mirror comes from the machine own apt', () => {
  const text = [
    'http://example.test/tools|trixie|Somebody',
    'http://mirror.test/debian/|trixie|Debian',
    'http://mirror.test/debian-security/|trixie-security|$(ORIGIN)',
    '',
  ].join('\n');

  test('another archive with the same suite name is not taken for Debian', () => {
    expect(findMirror(parseTargets(text), 'trixie')).toEqual({
      codename: 'trixie',
      main: 'http://mirror.test/debian/',
      security: 'http://mirror.test/debian-security/',
    });
    expect(findMirror(parseTargets(text), 'bookworm')).toBeUndefined();
  });

  test('an old list is accepted of later suites only', () => {
    const mirror = { codename: 'bookworm', main: 'http://m.test/', security: 'http://s.test/' };
    const suites = [
      'bookworm',
      'bookworm-updates',
      'security:bookworm-security',
      'trixie',
      'security:trixie-security',
    ];
    const stanzas = aptSources(mirror, 'deb', suites);
    const read = stanzas.map((text) => [
      /^URIs: (.*)$/m.exec(text)?.[1],
      /^Suites: (.*)$/m.exec(text)?.[1],
      /^Check-Valid-Until: (.*)$/m.exec(text)?.[1],
    ]);
    expect(read).toEqual([
      ['http://m.test/', 'bookworm bookworm-updates', undefined],
      ['http://m.test/', 'trixie', 'no'],
      ['http://s.test/', 'bookworm-security', undefined],
      ['http://s.test/', 'trixie-security', 'no'],
    ]);
  });

  test('only network settings are taken over', () => {
    const dump = [
      'Acquire::http::Proxy "http://proxy.test:3128";',
      'Acquire::https "";',
      'Acquire::Retries "3";',
      'Acquire::IndexTargets "";',
      'APT::Update::Post-Invoke:: "rm -f /var/cache/apt/*.bin";',
      'Dir::Cache "/var/cache/apt";',
    ].join('\n');
    expect(networkSettings(dump)).toEqual([
      'Acquire::http::Proxy "http://proxy.test:3128";',
      'Acquire::https "";',
      'Acquire::Retries "3";',
    ]);
  });
});

describe('the engine source', () => {
  const edit = { file: 'a.cc', why: 'w', find: 'if (x) {', replace: 'if ($& y) {' };

  test('an edit replaces the text that is there exactly once', () => {
    expect(applyEdit('a\nif (x) {\nb', edit)).toBe('a\nif ($& y) {\nb');
  });

  test.each([
    ['never', 'nothing', 0],
    ['twice', 'if (x) { if (x) {', 2],
  ])('an edit whose text occurs %s fails loudly', (_how, source, count) => {
    expect(() => applyEdit(source, edit)).toThrow(`occurs ${count} times instead of once`);
  });

  test('the tarball of the wanted version is found with size and hash', () => {
    const record = (version: string, sum: string): string =>
      `Package: bochs\nVersion: ${version}-1\nFiles:\n 00 1 bochs_${version}.orig.tar.xz\nChecksums-Sha256:\n` +
      ` aa 10 bochs_${version}-1.dsc\n ${sum} 20 bochs_${version}.orig.tar.xz\nHomepage: x\n`;
    const text = `${record('2.7+dfsg', 'b1')}\n${record('3.0+dfsg', 'b2')}`;
    expect(findTarball(text, '3.0+dfsg')).toEqual({
      version: '3.0+dfsg-1',
      name: 'bochs_3.0+dfsg.orig.tar.xz',
      size: 20,
      sha256: 'b2',
    });
    expect(findTarball(text, '3.1+dfsg')).toBeUndefined();
  });
});

describe('the cache', () => {
  const make = (text: string) => async (place: string) => {
    writeFileSync(join(place, 'part'), text);
    return { text };
  };

  test('NVMX_CACHE, then XDG_CACHE_HOME, then the home folder', () => {
    expect(cacheFolder({ NVMX_CACHE: '/a', XDG_CACHE_HOME: '/b' })).toBe('/a');
    expect(cacheFolder({ XDG_CACHE_HOME: '/b' })).toBe('/b/nvmx');
    expect(cacheFolder({ XDG_CACHE_HOME: 'relative' })).toMatch(/\/\.cache\/nvmx$/);
  });

  test.each(['/proc/nvmx', '/dev/null/x'])(
    'a folder that cannot be made is told at once: %s',
    async (place) => {
      process.env['NVMX_CACHE'] = place;
      const made = cacheEntry('one', {}, make('first'));
      await expect(made).rejects.toMatchObject({ name: 'LabError', what: 'the cache folder cannot be used' });
      await expect(temporaryFolder('x')).rejects.toMatchObject({ what: 'the cache folder cannot be used' });
    },
  );

  test('an entry is made once', async () => {
    await cacheEntry('kind/one', {}, make('first'));
    const again = await cacheEntry('kind/one', {}, make('second'));
    expect(again.about).toEqual({ text: 'first' });
    expect(readFileSync(join(again.folder, 'part'), 'utf8')).toBe('first');
  });

  test.each([
    ['other contents', 'FIRST', 'part has other contents'],
    ['another size', 'first and more', 'part has 14 bytes instead of 5'],
  ])('an entry whose file has %s is made again, with a notice', async (_how, text, why) => {
    const { folder: place } = await cacheEntry('one', {}, make('first'));
    writeFileSync(join(place, 'part'), text);
    expect(await checkEntry(place)).toBe(why);
    const said: string[] = [];
    await cacheEntry('one', { onProgress: (line) => said.push(line) }, make('again'));
    expect(said).toEqual([`${place} is damaged (${why}); making it again`]);
    expect(readFileSync(join(place, 'part'), 'utf8')).toBe('again');
  });

  test('a failed making leaves nothing', async () => {
    const failing = cacheEntry('one', {}, async (place) => {
      writeFileSync(join(place, 'part'), 'half');
      throw new Error('broken');
    });
    await expect(failing).rejects.toThrow('broken');
    expect(await checkEntry(join(folder, 'one'))).toBeUndefined();
    expect((await run('find', [folder, '-type', 'f'])).stdout).toBe('');
  });

  test('a full disk is said in plain words', async () => {
    const full = cacheEntry('one', {}, async () => {
      throw Object.assign(new Error('write'), { code: 'ENOSPC' });
    });
    await expect(full).rejects.toMatchObject({ name: 'LabError', what: 'the disk is full' });
  });

  test('a lock of a process that no longer lives is taken over, a living one is waited for', async () => {
    const file = join(folder, 'x.lock');
    writeFileSync(file, '999999999 1');
    const lock = await acquireLock(file, 'x', {});
    const stop = AbortSignal.timeout(300);
    await expect(acquireLock(file, 'x', { signal: stop })).rejects.toThrow();
    lock.release();
    (await acquireLock(file, 'x', {})).release();
    expect((await run('find', [folder, '-type', 'f'])).stdout).toBe('');
  });

  test('temporary folders of dead processes are removed, those of living ones stay', async () => {
    const mine = await temporaryFolder('run');
    const dead = join(folder, 'tmp', '999999999-1-run-abcd');
    await run('mkdir', [dead]);
    const second = await temporaryFolder('run');
    const left = (await run('ls', [join(folder, 'tmp')])).stdout.trim().split('\n');
    expect(left.map((name) => join(folder, 'tmp', name)).sort()).toEqual([mine, second].sort());
  });
});

describe('small parts', () => {
  test('an initramfs holds files, folders and the console, padded to a page', async () => {
    const path = join(folder, 'a.cpio');
    const archive = await CpioWriter.create(path);
    await archive.console();
    await archive.file('/a/b/c', 'text');
    expect(await archive.end()).toBe(4096);
    const listed = await run('sh', ['-c', 'cpio -itv <"$1"', 'sh', path]).catch(() => undefined);
    const text = readFileSync(path, 'latin1');
    expect(text.match(/070701/g)).toHaveLength(6);
    expect(text).toContain('a/b/c\0');
    if (listed?.status === 0) expect(listed.stdout).toMatch(/c.*5,\s+1.*dev\/console/);
  });

  test('arguments reach the shell whole', async () => {
    const odd = `a'b "c" $d \\ \n`;
    expect((await run('sh', ['-c', `printf %s ${quote(odd)}`])).stdout).toBe(odd);
  });

  test('init is a shell script, and a mark is known by its secret', async () => {
    const job = { mark: '@m-1', command: ['/usr/bin/node', 'a b.js', "it's"], env: { X: 'y z' } };
    for (const script of [initScript(), initScript(['node', "a'b"]), jobScript(job)]) {
      expect((await run('sh', ['-n', '-c', script])).stderr).toBe('');
    }
    expect(parseMark('@m-1 exit 7', '@m-1')).toEqual({ word: 'exit', rest: '7' });
    expect(parseMark('@m-2 exit 7', '@m-1')).toBeUndefined();
  });

  test('lines are whole whatever the pieces are', () => {
    const lines: string[] = [];
    const feed = splitLines((line) => lines.push(line));
    for (const piece of ['a', 'b\r\nc', '\n\n', 'rest']) feed(Buffer.from(piece));
    expect(lines).toEqual(['ab', 'c', '']);
  });

  test('a command that is not installed, one that fails, one that is stopped', async () => {
    await expect(run('nvmx-no-such-command', [])).rejects.toBeInstanceOf(CommandMissingError);
    expect((await run('sh', ['-c', 'echo x >&2; exit 3'])).status).toBe(3);
    const slow = run('sh', ['-c', 'sleep 100 & wait'], { signal: AbortSignal.timeout(100) });
    await expect(slow).rejects.toMatchObject({ name: 'TimeoutError' });
  });
});

test('the CPU models that the emulator names are known', () => {
  const help =
    'Bochs 3.0\nSupported CPU models:\n\ni386\ncorei7_skylake_x\n\n00000000000i[SIM   ] quit_sim\n';
  expect(parseCpuModels(help)).toEqual(['i386', 'corei7_skylake_x']);
});

test.each([
  ['[    1.5] BUG: kernel NULL pointer dereference, address: 0000000000000010\r', 'BUG: kernel NULL pointer'],
  [
    '[    1.5] Oops: general protection fault, probably for non-canonical address',
    'general protection fault',
  ],
  ['[    1.5] BUG: sleeping function called from invalid context at mm/x.c:1', 'BUG: sleeping function'],
])('a report of a kernel defect is found: %s', (line, words) => {
  expect(findDefect(`[    1.0] all is well\n${line}\n[    1.6] Call Trace:\n`)).toContain(words);
  expect(findDefect('[    1.0] DEBUG: fine\n')).toBeUndefined();
});

test("a console's excerpt begins where the kernel reports its end, else holds the last lines", () => {
  const lines = (count: number, text: string) =>
    Array.from({ length: count }, (_, i) => `${text} ${i}`).join('\r\n');
  const panic = 'Kernel panic - not syncing: why';
  expect(consoleExcerpt(`${lines(99, 'boot')}\r\n${panic}\r\n${lines(99, 'trace')}\r\n`).split('\n')).toEqual(
    [panic, ...lines(59, 'trace').split('\r\n')],
  );
  expect(consoleExcerpt(`BUG: first\n${panic}\n`)).toBe(`BUG: first\n${panic}`);
  expect(consoleExcerpt(`${lines(99, 'boot')}\n`).split('\n')[0]).toBe('boot 39');
});

describe('when our emulator cannot be built', () => {
  const build = async () => {
    throw new Error('no network');
  };
  const named = process.env['NVMX_BOCHS'];
  beforeEach(() => {
    delete process.env['NVMX_BOCHS'];
  });
  afterEach(() => {
    if (named !== undefined) process.env['NVMX_BOCHS'] = named;
  });
  const emulator = (version: string, options: string): string => {
    const path = join(folder, 'bochs');
    writeFileSync(path, `#!/bin/sh\necho 'Bochs x86 Emulator ${version}'\necho '${options}'\n`, {
      mode: 0o755,
    });
    return path;
  };

  test('the packaged one is used, with what it lacks', async () => {
    const said: string[] = [];
    const onProgress = (text: string): void => void said.push(text);
    const engine = await prepareEngine({ onProgress }, { build, system: emulator('2.7', '  -rc filename') });
    expect(engine).toMatchObject({
      kind: 'distribution',
      version: 'bochs 2.7',
      apicv: false,
      memoryImages: false,
      needsTerminal: true,
    });
    expect(said).toEqual(['the emulator could not be built (no network); using the slower package']);
  });

  test('without the package both ways out are told', async () => {
    const none = prepareEngine({}, { build, system: join(folder, 'none') });
    await expect(none).rejects.toMatchObject({ what: 'there is no emulator for the lab' });
    await expect(none).rejects.toThrow(
      /no network[\s\S]*apt-get install g\+\+ [\s\S]*apt-get install bochs bochs-term/,
    );
  });
});
