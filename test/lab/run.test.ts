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
    let interrupting: NodeJS.Timeout | undefined;
    let typed = false;
    output.on('data', (chunk: Buffer) => {
      said += chunk.toString();
      // Ctrl-C ends the sleep; what is typed before the prompt goes with it. It is pressed until it is heard: the
      // shell may not have started the sleep yet.
      if (said.includes('sleeping\r\n')) interrupting ??= setInterval(() => input.write('\x03'), 300);
      if (!typed && /\^C[\s\S]*# /.test(said)) {
        typed = true;
        clearInterval(interrupting);
        input.write('echo a$((1+1))b; exit 4\n');
      }
    });
    input.write('stty size; echo sleep"ing"; sleep 100000\n');
    const result = await runCommandInLab(['/bin/sh'], {
      terminal: { input, output, rows: 33, columns: 111 },
    });
    clearInterval(interrupting);
    expect(result, said).toMatchObject({ outcome: 'exited', exitStatus: 4 });
    expect(said).toContain('33 111\r\n');
    expect(said).toContain('a2b\r\n');
  });

  test('a deterministic machine repeats itself, whenever it starts', async () => {
    const bytes = async () => {
      const lines: string[] = [];
      // Random bytes come from RDRAND; the uptime counts every instruction so far, at a hundredth of a second.
      const command = ['sh', '-c', 'cat /proc/sys/kernel/random/uuid /proc/uptime /proc/interrupts; date'];
      const result = await runCommandInLab(command, {
        deterministic: true,
        onLine: (line) => lines.push(line),
      });
      expect(result.outcome).toBe('exited');
      expect(lines.length).toBeGreaterThan(10);
      return lines;
    };
    expect(await bytes()).toEqual(await bytes());
  });

  test('a CPU model that the emulator lacks is refused with those it has', async () => {
    const run = runCommandInLab(['true'], { engineCpu: 'pentium_9' });
    await expect(run).rejects.toMatchObject({ name: 'LabError', what: 'the emulator has no such CPU' });
    await expect(run).rejects.toThrow(/"pentium_9" is not among .*corei7_skylake_x/);
  });
});
