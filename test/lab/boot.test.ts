// SPDX-License-Identifier: Apache-2.0
import { readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { cacheFolder, describeLab, runCommandInLab, runInLab } from '../../lib/lab/index.ts';

const lab = describeLab();
if (!lab.possible) console.log(`# SKIP the lab machine boots: ${lab.why}`);

/** The first of them may build the emulator. */
const LIMIT_MS = 600_000;

/** Processes that work in a folder of a run of ours, and folders of such runs. */
function leftBehind(): string[] {
  const folder = join(cacheFolder(), 'tmp');
  const own = `${process.pid}-`;
  const processes = readdirSync('/proc').filter((name) => {
    try {
      return /^\d+$/.test(name) && readlinkSync(`/proc/${name}/cwd`).startsWith(join(folder, own));
    } catch {
      return false;
    }
  });
  return [...processes, ...readdirSync(folder).filter((name) => name.startsWith(own))];
}

describe.skipIf(!lab.possible)('the lab machine boots', { timeout: LIMIT_MS }, () => {
  afterEach(() => {
    expect(leftBehind()).toEqual([]);
  });

  test('a program has KVM with nesting, its lines arrive whole, and its status is told', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'nvmx-lab-'));
    writeFileSync(
      join(folder, 'job.js'),
      `const { readFileSync, openSync } = require('node:fs');
      const parameter = (name) => readFileSync('/sys/module/kvm_intel/parameters/' + name, 'latin1').trim();
      openSync('/dev/kvm', 'r+');
      console.log(JSON.stringify([process.version, process.argv[2], process.env.WORD, parameter('nested'),
        parameter('enable_apicv'), parameter('ple_gap')]));
      console.log('');
      console.error('said on stderr');
      for (let line = 0; line < 200; line++) console.log(line + ' ' + 'x'.repeat(90));
      process.stdout.write('no end');
      process.exitCode = 7;`,
    );
    const lines: string[] = [];
    const engines: string[] = [];
    const result = await runInLab(['/job/job.js', `it's "a" $word`], {
      files: { '/job': folder },
      env: { WORD: 'a  b' },
      append: 'kvm_intel.ple_gap=100',
      onLine: (line) => lines.push(line),
      onEngine: (engine) => engines.push(engine.version),
    });
    await rm(folder, { recursive: true });
    expect(result).toMatchObject({ outcome: 'exited', exitStatus: 7 });
    const apicv = result.engine.apicv ? 'Y' : 'N';
    expect(JSON.parse(lines[0] ?? '')).toEqual([
      process.version,
      `it's "a" $word`,
      'a  b',
      'Y',
      apicv,
      '100',
    ]);
    expect(lines.slice(1)).toEqual([
      '',
      ...Array.from({ length: 200 }, (_, line) => `${line} ${'x'.repeat(90)}`),
      'no end',
    ]);
    expect(result.console).toContain('said on stderr');
    expect(readFileSync(result.consoleFile, 'utf8')).toBe(result.console);
    expect(result.kernel.release).toMatch(/^\d+\.\d+/);
    expect(engines).toEqual([result.engine.version]);
  });

  test('a kernel that insists on signed modules gets the signatures', async () => {
    const lines: string[] = [];
    const append = 'module.sig_enforce=1';
    const tainted = ['cat', '/proc/sys/kernel/tainted', '/sys/module/kvm_intel/initstate'];
    const result = await runCommandInLab(tainted, { append, onLine: (line) => lines.push(line) });
    expect(result.outcome).toBe('exited');
    expect(lines).toEqual(['0', 'live']);
  });

  test('a kernel that dies under a program is a panic, with its text', async () => {
    const lines: string[] = [];
    const crash = `console.log('before'); require('fs').writeFileSync('/proc/sysrq-trigger', 'c')`;
    const result = await runInLab(['-e', crash], { onLine: (line) => lines.push(line) });
    expect(result.outcome).toBe('panic');
    expect(result.reason).toContain('Kernel panic - not syncing: sysrq triggered crash');
    expect(result.console).toContain('sysrq_handle_crash');
    expect(result.exitStatus).toBeUndefined();
    expect(lines).toEqual(['before']);
  });

  test('a kernel that dies without a word is told from one that was turned off', async () => {
    // Linux without another way to reset does it by a triple fault.
    const reset = `require('fs').writeFileSync('/proc/sysrq-trigger', 'b')`;
    const dead = await runInLab(['-e', reset], { append: 'reboot=t' });
    expect(dead).toMatchObject({ outcome: 'panic' });
    expect(dead.reason).toBe('triple fault: the kernel could not take an exception');
    const off = await runInLab(['-e', `require('child_process').execSync('poweroff -f; sleep 9')`]);
    expect(off).toMatchObject({ outcome: 'powered-off' });
    expect(off.exitStatus).toBeUndefined();
  });

  test('a machine that does not come up in time hangs', async () => {
    const result = await runInLab(['-e', '0'], { bootLimitMs: 2_000, cold: true });
    expect(result).toMatchObject({ outcome: 'hang', reason: 'it did not finish booting in 2 s' });
  });

  test('a run that takes too long is ended', async () => {
    const result = await runInLab(['-e', '0'], { timeoutMs: 2_000, cold: true });
    expect(result).toMatchObject({ outcome: 'timeout', reason: 'it ran longer than 2 s' });
  });

  test('a stopped run leaves no process and no folder', async () => {
    const stop = new AbortController();
    const result = await runInLab(['-e', '0'], {
      signal: stop.signal,
      cold: true,
      onProgress: (text) => {
        if (text.startsWith('booting')) setTimeout(() => stop.abort(), 500);
      },
    });
    expect(result.outcome).toBe('aborted');
  });
});
