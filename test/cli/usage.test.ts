// SPDX-License-Identifier: Apache-2.0
import { accessSync, constants, readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { nvmx } from './nvmx.ts';

const version = (JSON.parse(readFileSync('package.json', 'utf8')) as { version: string }).version;

describe('usage', () => {
  test('--version prints the version of the package', async () => {
    expect(await nvmx(['--version'])).toMatchObject({ status: 0, stdout: `${version}\n`, stderr: '' });
  });

  test('no command: the help on standard error, status 2', async () => {
    const { status, stdout, stderr } = await nvmx([]);
    expect([status, stdout]).toEqual([2, '']);
    expect(stderr).toContain('nvmx test [PATTERN...]');
  });

  test('names of a series that cannot be read: what and why, status 2', async () => {
    const { status, stderr } = await nvmx(['probe'], { env: { NVMX_SERIES: 'package.json' } });
    expect([status, stderr]).toEqual([2, expect.stringContaining('"title" is not a text')]);
    expect(stderr).not.toContain('    at ');
  });

  test('--help of a command: the help on standard output, status 0', async () => {
    const { status, stdout } = await nvmx(['test', '--help']);
    expect(status).toBe(0);
    expect(stdout).toContain('exit status');
  });

  test.each([
    [['tset'], 'there is no command "tset"; there are probe'],
    [['__proto__'], 'there is no command "__proto__"'],
    [['kernel'], '"nvmx kernel" is no command; there are kernel build, kernel list, kernel rm'],
    [['lab', 'toString'], '"nvmx lab toString" is no command; there are lab run, lab shell'],
    [['test', '--machine', 'moon'], '--machine is "moon"; it takes auto, host, lab'],
    [['test', '--reporter', 'xml'], '--reporter is "xml"; it takes spec, ktap, json, junit, github'],
    [['test', '--expect', 'best'], '--expect is "best"; it takes auto, stock, patched'],
    [['test', '--timeout', '0'], '--timeout is "0"; it takes a whole number from 1 to 86400'],
    [
      ['test', '--seed', '4294967296'],
      '--seed is "4294967296"; it takes a whole number from 0 to 4294967295',
    ],
    [['test', '--seed', '1e3'], '--seed is "1e3"'],
    [['test', '--frobnicate'], "Unknown option '--frobnicate'"],
    [['test', 'no/such/test'], 'no test matches "no/such/test"; --list prints their ids'],
    [['test', '--machine', 'host', '--kernel', 'x'], '--kernel is for the lab machine'],
    [['test', '--list', '--output'], "'--output <value>' argument missing"],
    [
      ['test', '--output', '/nonexistent/file', '--machine', 'host'],
      '--output /nonexistent/file cannot be written',
    ],
    [['test', '--set', 'l2-switch.c=99'], '--set: l2-switch.c: "99" is not a number or range within 1..24'],
    [['test', '--matrix', 'ept=1'], '--matrix: "ept=1" is not MODULE.PARAMETER=VALUE,VALUE'],
    [['test', '--shard', '3/2'], '--shard is "3/2"; it takes I/N'],
    [['test', '--repeat', '2', '--duration', '3'], '--repeat and --duration exclude each other'],
    [['merge'], 'nvmx merge takes the JSON reports'],
    [['merge', '/nonexistent.json'], '/nonexistent.json: ENOENT'],
    [['probe', '--machine', 'host', '--append', 'x'], '--append is for the lab machine'],
  ])('%j: status 2 and one line', async (args, message) => {
    const { status, stdout, stderr } = await nvmx(args);
    expect([status, stdout]).toEqual([2, '']);
    expect(stderr).toContain(message);
    expect(stderr.trimEnd().split('\n')).toHaveLength(1);
  });
});

describe('nvmx test --list', () => {
  test('ids and titles, tab-separated, in suite order', async () => {
    const { status, stdout } = await nvmx(['test', '--list']);
    expect(status).toBe(0);
    const lines = stdout.trimEnd().split('\n');
    expect(lines.every((line) => line.split('\t').length === 2)).toBe(true);
    const ids = lines.map((line) => line.split('\t')[0]!);
    expect(ids.slice(0, 4)).toEqual([
      'apic-update/madvise/deterministic',
      'apic-update/madvise/racing',
      'apic-update/memslot-move/deterministic',
      'apic-update/memslot-move/racing',
    ]);
    const upstream = Array.from({ length: 15 }, (_, i) => i + 2);
    const few = [2, 8, 9, 16];
    for (const [mode, sizes] of [
      ['sched', upstream],
      ['migrate', upstream],
      ['evmcs', few],
      ['sched-vcpus', few],
      ['migrate-vcpus', few],
    ] as const) {
      const cases = ids.filter((id) => id.startsWith(`l2-switch/${mode}/`));
      expect(cases).toEqual(sizes.map((c) => `l2-switch/${mode}/c=${c}`));
    }
    expect(new Set(ids).size).toBe(ids.length);
  });

  test('--set makes other tests, --shard takes a part of them', async () => {
    const { stdout } = await nvmx([
      'test',
      '--list',
      'l2-switch/sched',
      '--set',
      'l2-switch.c=1,24',
      '--set',
      'l2-switch.s=8',
    ]);
    expect(stdout.replace(/\t.*/g, '')).toBe('l2-switch/sched/c=1,s=8\nl2-switch/sched/c=24,s=8\n');
    const four = await nvmx(['test', '--list', 'l2-switch/*-vcpus/*', '--set', 'l2-switch.v=1,4']);
    expect(four.stdout.replace(/\t.*/g, '').split('\n').slice(0, 2)).toEqual([
      'l2-switch/sched-vcpus/c=2,v=4',
      'l2-switch/sched-vcpus/c=8,v=4',
    ]);
    const part = await nvmx([
      ...['test', '--list', 'l2-switch/sched', '--shard', '2/5'],
      ...['--set', 'l2-switch.c=2..16'],
    ]);
    expect(part.stdout.replace(/\t.*/g, '')).toBe(
      'l2-switch/sched/c=3\nl2-switch/sched/c=8\nl2-switch/sched/c=13\n',
    );
  });

  test('a pattern narrows it', async () => {
    const { stdout } = await nvmx(['test', '--list', 'apic-update/*/racing']);
    expect(stdout.trimEnd().split('\n')).toHaveLength(2);
  });
});

describe('this host', () => {
  test('probe --json: the whole probe as one document', async () => {
    const { status, stdout } = await nvmx(['probe', '--json']);
    expect(status).toBe(0);
    const probe = JSON.parse(stdout);
    expect(probe.machine).toBe('host');
    expect(Object.keys(probe)).toEqual(
      expect.arrayContaining(['kernel', 'cpu', 'kvm', 'nestedVmx', 'vmxControls', 'fingerprint']),
    );
    expect(probe.kernel.release).toBe(readFileSync('/proc/sys/kernel/osrelease', 'utf8').trim());
  });

  test('probe says in plain words what can run here', async () => {
    const { status, stdout } = await nvmx(['probe']);
    expect(status).toBe(0);
    expect(stdout).toMatch(/^ {2}nested VMX {3}(yes|no): .+/m);
    expect(stdout).toMatch(/^ {2}(yes|no ) {2}tests in the lab \(--machine lab\): .+/m);
  });

  test('tests that need VMX are skipped with the reason where there is none, status 4', async (ctx) => {
    const probe = JSON.parse((await nvmx(['probe', '--json'])).stdout);
    if (probe.kvm.device !== 'ok') return ctx.skip(probe.kvm.problem);
    if (probe.nestedVmx.usable) return ctx.skip('this host has nested VMX');
    const { status, stdout } = await nvmx(['test', 'apic-update', '--machine', 'host', '--seed', '1']);
    expect(status).toBe(4);
    expect(stdout.match(/skip: nested VMX: /g)).toHaveLength(4);
    expect(stdout.endsWith('seed 1\n0 passed, 0 failed, 4 skipped\n')).toBe(true);
  });

  test('no permission for /dev/kvm: one message with advice, status 3', async (ctx) => {
    if (process.getuid?.() !== 0) return ctx.skip('needs root to become another user');
    const wrap = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'];
    try {
      accessSync('/dev/kvm', constants.F_OK);
    } catch {
      return ctx.skip('/dev/kvm is not there');
    }
    const probe = await nvmx(['--version'], { wrap });
    if (probe.status !== 0) return ctx.skip('another user cannot read this copy of the project');
    const { status, stdout, stderr } = await nvmx(['test', '--machine', 'host'], { wrap });
    expect([status, stdout]).toEqual([3, '']);
    expect(stderr).toContain('/dev/kvm');
    expect(stderr).toContain('EACCES');
    expect(stderr).not.toContain('    at ');
  });
});
