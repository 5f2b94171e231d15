// SPDX-License-Identifier: Apache-2.0
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { PassThrough } from 'node:stream';
import { describe, expect, test } from 'vitest';
import { describeLab, runCommandInLab } from '../../lib/lab/index.ts';

const lab = describeLab();
if (!lab.possible) console.log(`# SKIP programs run in the lab machine: ${lab.why}`);

describe.skipIf(!lab.possible)('programs run in the lab machine', { timeout: 600_000 }, () => {
  test('with two processors, files in and out, and the status of the program', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'nvmx-lab-'));
    const bytes = Buffer.from(
      Array.from({ length: 20_000 }, (_, index) => (index * 7 + (index >> 8)) & 0xff),
    );
    writeFileSync(join(folder, 'in'), bytes);
    // A program with shared libraries that Node does not need.
    const program = ['/usr/bin/xz', '/bin/xz'].find((path) => existsSync(path)) ?? '';
    const lines: string[] = [];
    const script =
      'sleep 1000 & nproc; /usr/bin/xz -c /job/in | /usr/bin/xz -dc >/tmp/out; echo lost >&2; ls /tmp; exit 9';
    const result = await runCommandInLab(['sh', '-c', script], {
      cpus: 2,
      memoryMiB: 768,
      engineCpu: 'corei7_haswell_4770',
      files: { '/job': folder, '/usr/bin/xz': program },
      fetch: ['/tmp/out', '/tmp/none'],
      append: 'kvm_intel.enable_apicv=0',
      onLine: (line) => lines.push(line),
    });
    rmSync(folder, { recursive: true });
    expect(result).toMatchObject({ outcome: 'exited', exitStatus: 9 });
    expect(lines).toEqual(['2', 'out']);
    expect(result.console).toContain('lost');
    expect([...result.fetched.keys()]).toEqual(['/tmp/out']);
    expect(result.fetched.get('/tmp/out')?.equals(bytes)).toBe(true);
    expect(result.kernelDefect).toBeUndefined();
  });

  test('a shell has a terminal with its size, and keys work', async () => {
    const input = new PassThrough();
    const output = new PassThrough();
    let said = '';
    let interrupted = false;
    let typed = false;
    output.on('data', (chunk: Buffer) => {
      said += chunk.toString();
      // Ctrl-C ends the sleep; what is typed before the prompt goes with it.
      if (!interrupted && said.includes('sleeping\r\n')) {
        interrupted = true;
        input.write('\x03');
      }
      if (!typed && /\^C[\s\S]*# /.test(said)) {
        typed = true;
        input.write('echo a$((1+1))b; exit 4\n');
      }
    });
    input.write('stty size; echo sleep"ing"; sleep 100000\n');
    const result = await runCommandInLab(['/bin/sh'], {
      terminal: { input, output, rows: 33, columns: 111 },
    });
    expect(result).toMatchObject({ outcome: 'exited', exitStatus: 4 });
    expect(said).toContain('33 111\r\n');
    expect(said).toContain('a2b\r\n');
  });

  test('a CPU model that the emulator lacks is refused with those it has', async () => {
    const run = runCommandInLab(['true'], { engineCpu: 'pentium_9' });
    await expect(run).rejects.toMatchObject({ name: 'LabError', what: 'the emulator has no such CPU' });
    await expect(run).rejects.toThrow(/"pentium_9" is not among .*corei7_skylake_x/);
  });
});
