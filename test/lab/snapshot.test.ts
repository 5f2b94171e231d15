// SPDX-License-Identifier: Apache-2.0
import { randomBytes } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { open, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, test } from 'vitest';
import { cacheEntry, checkEntry, replaceEntry } from '../../lib/lab/cache.ts';
import { cacheFolder, describeLab, type LabOptions, runCommandInLab } from '../../lib/lab/index.ts';
import { jobRom } from '../../lib/lab/job.ts';
import { findSnapshot, SnapshotKeeper, snapshotKey } from '../../lib/lab/snapshot.ts';
import { type Contents, contentsOfFile, sha256OfRanges } from '../../lib/lab/sparse.ts';
import { ownCache } from './fixtures.ts';

describe('what a snapshot is made of', () => {
  let cache: string;
  ownCache((folder) => {
    cache = folder;
  });

  async function memory(file: string, pages: Readonly<Record<number, string>>): Promise<void> {
    const handle = await open(file, 'w');
    await handle.truncate(64 << 20);
    for (const [at, text] of Object.entries(pages)) await handle.write(text, Number(at));
    await handle.close();
  }

  test('of a file of holes only what is there is read again', async () => {
    const file = join(cache, 'memory');
    await memory(file, { 0: 'first', 74565: 'second', [(64 << 20) - 4]: 'last' });
    const { sha256, data } = await contentsOfFile(file);
    expect(data).toEqual([
      [0, 0x20000],
      [(64 << 20) - 0x10000, 64 << 20],
    ]);
    expect(await sha256OfRanges(file, data ?? [])).toBe(sha256);
    await memory(file, { 0: 'first', 74565: 'secons', [(64 << 20) - 4]: 'last' });
    expect(await sha256OfRanges(file, data ?? [])).not.toBe(sha256);
    // Of other files all is read, and the places are not told.
    writeFileSync(file, 'x'.repeat(5 << 20));
    expect((await contentsOfFile(file)) satisfies Contents).not.toHaveProperty('data');
  });

  test('one bit in a file of holes is damage', async () => {
    const { folder } = await cacheEntry('one', {}, async (place) => {
      await memory(join(place, 'memory'), { 4194304: 'abc' });
      return {};
    });
    expect(await checkEntry(folder)).toEqual({});
    await memory(join(folder, 'memory'), { 4194304: 'abb' });
    expect(await checkEntry(folder)).toBe('memory has other contents');
    truncateSync(join(folder, 'memory'), 1 << 20);
    expect(await checkEntry(folder)).toBe('memory has 1048576 bytes instead of 67108864');
  });

  test('its name stands for every part, and for where one ends', () => {
    const keys = [['ab', 'c'], ['a', 'bc'], ['abc'], ['ab', 'c', '']].map(snapshotKey);
    expect(new Set(keys).size).toBe(4);
    expect(snapshotKey(['ab', Buffer.from('c')])).toBe(keys[0]);
  });

  test('a job has room or has not', () => {
    const rom = jobRom(Buffer.from('bytes'));
    expect(rom?.subarray(0, 16).toString('latin1')).toBe('nvmx-job 5\nbytes');
    expect(rom?.length).toBe(0xf000);
    expect(jobRom(Buffer.alloc(0xf000 - 15))?.length).toBe(0xf000);
    expect(jobRom(Buffer.alloc(0xf000 - 14))).toBeUndefined();
  });

  /** A run whose emulator left a snapshot. */
  async function keep(name: string, { isWhole = true } = {}): Promise<void> {
    const run = mkdtempSync(join(tmpdir(), 'nvmx-run-'));
    const keeper = await SnapshotKeeper.start(run, name, 'configuration');
    mkdirSync(join(run, isWhole ? 'snapshot' : 'snapshot.part'));
    writeFileSync(join(run, isWhole ? 'snapshot' : 'snapshot.part', 'cpu0'), name);
    keeper?.booted('said');
    if (isWhole) await expect.poll(() => readdirSync(run)).toContain('snapshot');
    await expect.poll(() => !isWhole || readdirSync(join(run, 'snapshot')).length === 0).toBe(true);
    await keeper?.end();
    rmSync(run, { recursive: true });
  }

  test('the newest six stay, by when they were used', async () => {
    const names = Array.from({ length: 8 }, (_, index) => `000000000000000${index}`);
    for (const [index, name] of names.slice(0, 6).entries()) {
      await keep(name);
      const at = new Date(2026, 0, 1 + index);
      utimesSync(join(cache, 'snapshot', name), at, at);
    }
    expect(await findSnapshot(names[0]!, {})).toMatchObject({ key: names[0], console: 'said' });
    for (const name of names.slice(6)) await keep(name);
    expect(readdirSync(join(cache, 'snapshot')).sort()).toEqual([names[0], ...names.slice(3)]);
  });

  test('half of one is none', async () => {
    await keep('0123456789abcdef', { isWhole: false });
    expect(await findSnapshot('0123456789abcdef', {})).toBeUndefined();
  });
});

const lab = describeLab();
if (!lab.possible) console.log(`# SKIP a machine continues from a snapshot: ${lab.why}`);

describe.skipIf(!lab.possible)('a machine continues from a snapshot', { timeout: 600_000 }, () => {
  // A kernel argument of its own: no other test's snapshot is it.
  const append = `nvmx.test=${process.pid}`;
  async function run(script: string, options: LabOptions = {}) {
    const lines: string[] = [];
    const said: string[] = [];
    const result = await runCommandInLab(['sh', '-c', script], {
      append,
      onLine: (line) => lines.push(line),
      onProgress: (text) => said.push(text),
      ...options,
    });
    return { ...result, lines, said };
  }
  const placeOf = (key: string) => join(cacheFolder(), 'snapshot', key);
  /** Which one a machine continued from. */
  const keyOf = ({ said }: { said: string[] }) =>
    /^waking Linux \S+ \(([0-9a-f]{16})\)/.exec(said.find((text) => text.startsWith('waking')) ?? '')?.[1] ??
    '';

  test('with a job of its own each time, until the snapshot is damaged', async () => {
    const probe = 'cat /proc/sys/kernel/random/boot_id; cat /in; echo "$WORD"; date +%s; ls / /job';
    const folder = mkdtempSync(join(tmpdir(), 'nvmx-lab-'));
    const file = join(folder, 'in');
    const job = (text: string): LabOptions => {
      writeFileSync(file, `${text}\n`);
      return { files: { '/in': file }, env: { WORD: `${text}  word` }, fetch: ['/in'] };
    };
    const cold = await run(`echo lost >&2; ${probe}`, job('one'));
    expect(cold).toMatchObject({ outcome: 'exited', exitStatus: 0, woken: false });

    // The clock of the machine that was written down has stopped meanwhile.
    await sleep(4_000);
    const began = Math.floor(Date.now() / 1000);
    const again = await run(`${probe}; exit 5`, job('two'));
    expect(again).toMatchObject({ outcome: 'exited', exitStatus: 5, woken: true });
    const made = keyOf(again);
    const memory = join(placeOf(made), 'memory.ram');
    const { size, blocks } = await stat(memory);
    expect(size).toBe(1 << 30);
    expect(blocks * 512).toBeLessThan(size / 2);
    // The same boot, another job.
    expect(again.lines[0]).toBe(cold.lines[0]);
    expect(again.lines.slice(1, 3)).toEqual(['two', 'two  word']);
    expect(again.lines.slice(4)).toEqual(cold.lines.slice(4));
    expect(Number(again.lines[3])).toBeGreaterThanOrEqual(began);
    expect(again.fetched.get('/in')?.toString()).toBe('two\n');
    expect(again.console).not.toContain('lost');

    // What does not fit where the job lies boots; so does what is asked to.
    writeFileSync(file, randomBytes(100_000));
    expect(await run('wc -c </in', { files: { '/in': file } })).toMatchObject({
      lines: ['100000'],
      woken: false,
    });
    expect(await run('echo', { cold: true })).toMatchObject({ outcome: 'exited', woken: false });
    rmSync(folder, { recursive: true });

    const handle = await open(memory, 'r+');
    const manifest = readFileSync(join(placeOf(made), 'manifest.json'), 'utf8');
    const [[at]] = JSON.parse(manifest).files['memory.ram'].data as [[number]];
    const { buffer } = await handle.read(Buffer.alloc(1), 0, 1, at);
    await handle.write(Buffer.from([buffer[0]! ^ 1]), 0, 1, at);
    await handle.close();
    const damaged = await run('echo well');
    expect(damaged).toMatchObject({ outcome: 'exited', lines: ['well'], woken: false });
    expect(damaged.said).toContain(
      `the snapshot ${made} is of no use (memory.ram has other contents); booting`,
    );
    rmSync(placeOf(made), { recursive: true, force: true });
  });

  test('one that does not continue is thrown away, and the machine boots', async () => {
    const other = { append: `${append} second` };
    await run('true', other);
    const made = keyOf(await run('true', other));
    const place = placeOf(made);
    // As if it had been written like that: an instruction pointer where there is no code.
    const files = readdirSync(place).filter((name) => name !== 'manifest.json');
    await replaceEntry(`snapshot/${made}`, {}, async (fresh) => {
      for (const name of files) renameSync(join(place, name), join(fresh, name));
      const cpu = readFileSync(join(fresh, 'cpu0'), 'latin1');
      const broken = cpu.replace(/^(\s*RIP = ).*$/m, '$10x10');
      expect(broken).not.toBe(cpu);
      writeFileSync(join(fresh, 'cpu0'), broken);
      return {};
    });
    const booted = await run('echo well', other);
    expect(booted).toMatchObject({ outcome: 'exited', lines: ['well'], woken: false });
    expect(booted.said.find((text) => text.startsWith(`the snapshot ${made} is of no use`))).toBeDefined();
    expect(existsSync(place)).toBe(false);
  });
});
