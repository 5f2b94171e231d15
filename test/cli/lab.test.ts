// SPDX-License-Identifier: Apache-2.0
import { mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, afterEach, describe, expect, test } from 'vitest';
import { cacheFolder, describeLab } from '../../lib/lab/index.ts';
import { parseReport } from '../../lib/report/index.ts';
import { type nvmx, start } from './nvmx.ts';

const lab = describeLab();
if (!lab.possible) console.log(`# SKIP nvmx in the lab: ${lab.why}`);

const folder = mkdtempSync(join(tmpdir(), 'nvmx-cli-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Folders of runs that process `pid` made, and processes that work in them. */
function leftBehind(pid: number): string[] {
  const runs = join(cacheFolder(), 'tmp');
  const own = `${pid}-`;
  const processes = readdirSync('/proc').filter((name) => {
    try {
      return /^\d+$/.test(name) && readlinkSync(`/proc/${name}/cwd`).startsWith(join(runs, own));
    } catch {
      return false;
    }
  });
  return [...processes, ...readdirSync(runs).filter((name) => name.startsWith(own))];
}

let last: ReturnType<typeof start>;
function run(args: readonly string[], env: NodeJS.ProcessEnv = {}): ReturnType<typeof nvmx> {
  last = start(args, { env });
  return last.finished;
}

describe.skipIf(!lab.possible)('nvmx in the lab', { timeout: 600_000 }, () => {
  afterEach(() => {
    expect(leftBehind(last.child.pid!)).toEqual([]);
  });

  test("the series' selftests pass on the default kernel; the report holds machine, evidence and summary", async () => {
    const file = join(folder, 'report.json');
    const { status, stdout, stderr } = await run([
      ...['test', '--machine', 'lab', '--jobs', '2', '--seed', '7', '--reporter', 'json', '--output', file],
      ...['apic-update', 'l2-switch'],
    ]);
    expect(stderr).not.toContain('nvmx:');
    expect(status).toBe(0);
    expect(stdout.endsWith('seed 7\n50 passed, 0 failed, 0 skipped\n')).toBe(true);
    const report = parseReport(readFileSync(file, 'utf8'));
    expect(Object.keys(report)).toEqual(['schema', 'nvmx', 'machine', 'seed', 'results', 'summary']);
    expect(report.machine).toMatchObject({
      kind: 'lab',
      engine: expect.stringMatching(/bochs/i),
      parameters: { 'kvm_intel.nested': 'Y', 'kvm_intel.ept': 'Y', 'kvm_intel.vpid': 'Y' },
      fingerprint: { kind: 'stock', certain: true },
    });
    expect(report.summary).toMatchObject({ passed: 50, failed: 0, skipped: 0 });
    const byId = new Map(report.results.map((result) => [result.id, result]));
    // Literals on purpose: the suite's own tables are not trusted here.
    expect(byId.get('apic-update/madvise/deterministic')).toMatchObject({
      verdict: 'pass',
      reason: 'stock behaviour (unpatched)',
      expectation: 'stock',
      evidence: { apicAccessExits: 1, mmioExits: 0, nestedRun: 2, pageWords: [0, 2, 4, 8, 16, 32, 64, 128] },
    });
    expect(byId.get('apic-update/memslot-move/deterministic')).toMatchObject({
      expectation: 'any',
      evidence: { apicAccessExits: 1, mmioExits: 7, nestedRun: 2, pageWords: [0, 0, 0, 0, 0, 0, 0, 0] },
    });
    expect(byId.get('apic-update/madvise/racing')).toMatchObject({ seed: 7 });
    expect(byId.get('l2-switch/sched/c=16')?.evidence).toMatchObject({
      nestedRun: 64,
      vmcallExits: 64,
      vpids: 16,
    });
    expect(byId.get('l2-switch/evmcs/c=9')?.evidence).toMatchObject({
      nestedRun: 72,
      turns: 36,
      rightChecksums: 9,
    });
    expect(byId.get('l2-switch/hand-over/discard')?.evidence).toMatchObject({ nestedRun: 40, executed: 79 });
    expect(byId.get('l2-switch/migrate-vcpus/c=2')?.evidence).toMatchObject({
      nestedRun: 8,
      rightChecksums: 2,
    });
  });

  test('--cpus 2: a page goes beneath an L2 that runs meanwhile on the other CPU', async () => {
    const { status, stdout } = await run([
      ...['test', 'hazard/vapic-discard-under-spin', '--machine', 'lab', '--cpus', '2', '--jobs', '1'],
    ]);
    expect(status).toBe(0);
    expect(stdout).toContain('stops [sync 1, vmcall] · stale 10 · stuck 0 · executed 2');
    expect(stdout.endsWith('1 passed, 0 failed, 0 skipped\n')).toBe(true);
  });

  test('an oracle that does not hold: status 1, and what was expected and seen', async () => {
    const id = 'apic-update/madvise/deterministic';
    const { status, stdout } = await run(['test', id, '--machine', 'lab', '--expect', 'patched']);
    expect(status).toBe(1);
    expect(stdout).toContain(
      'fail: apicAccessExits: expected 8, seen 1; nestedRun: expected 9, seen 2; pageWords: expected ' +
        '[0, 0, 0, 0, 0, 0, 0, 0], seen [0, 2, 4, 8, 16, 32, 64, 128] (table "patched")',
    );
    expect(stdout).toContain(`again: nvmx test ${id} --expect patched`);
    expect(stdout.endsWith('0 passed, 1 failed, 0 skipped\n')).toBe(true);
  });

  test('a matrix boots a machine for each combination; without EPT the tests that need it are skipped', async () => {
    const file = join(folder, 'matrix.json');
    const id = 'apic-update/memslot-move/deterministic';
    const { status } = await run([
      ...['test', id, '--machine', 'lab', '--matrix', 'kvm_intel.ept=0,1', '--repeat', '2'],
      ...['--reporter', 'json', '--output', file, '--evidence', join(folder, 'evidence')],
    ]);
    expect(status).toBe(0);
    const report = parseReport(readFileSync(file, 'utf8'));
    expect(report.results.map(({ variant, iteration, verdict }) => [variant, iteration, verdict])).toEqual([
      ['kvm_intel.ept=0', 1, 'skip'],
      ['kvm_intel.ept=0', 2, 'skip'],
      ['kvm_intel.ept=1', 1, 'pass'],
      ['kvm_intel.ept=1', 2, 'pass'],
    ]);
    expect(report.results[0]?.reason).toContain('VMX control secondary.enable-ept is not offered');
    expect(report.variants?.map(({ machine }) => machine.parameters['kvm_intel.ept'])).toEqual(['N', 'Y']);
    const kept = join(folder, 'evidence', 'kvm_intel.ept=1', id, 'round-2', 'result.json');
    expect(JSON.parse(readFileSync(kept, 'utf8'))).toEqual(report.results[3]);
  });

  test('probe --machine lab shows kvm_intel, its controls and the fingerprint with evidence', async () => {
    // A series whose second patch renamed what every kernel has.
    const series = JSON.parse(readFileSync('lib/probe/series.json', 'utf8'));
    series.patches[1].traces = [{ kind: 'btf-member', struct: 'nested_vmx', member: 'vmxon' }];
    const file = join(folder, 'series.json');
    writeFileSync(file, JSON.stringify(series));
    const { status, stdout } = await run(['probe', '--machine', 'lab', '--json'], { NVMX_SERIES: file });
    expect(status).toBe(0);
    const probe = JSON.parse(stdout);
    expect(probe).toMatchObject({
      machine: 'lab',
      cpu: { vendor: 'GenuineIntel', vmx: true },
      kvm: { device: 'ok', backend: 'kvm_intel' },
      nestedVmx: { usable: true },
      vmxControls: { 'secondary.virtualize-apic-accesses': true, 'secondary.enable-vpid': true },
    });
    const table = probe.fingerprint.patches.find((patch: { patch: number }) => patch.patch === 8);
    expect(table).toMatchObject({
      state: 'absent',
      evidence: [
        'VM statistic nested_context_reuse: not there',
        'BTF kvm_vm_stat.nested_context_reuse: not there',
      ],
    });
    expect(probe.fingerprint.patches[1]).toMatchObject({
      patch: 2,
      state: 'present',
      evidence: ['BTF nested_vmx.vmxon: there'],
    });
    expect(
      probe.fingerprint.patches.slice(2, 6).map((patch: { evidence: string[] }) => patch.evidence),
    ).toEqual([
      ['BTF kvm_x86_nested_ops.is_nested_state_invalid: not there'],
      [
        'BTF nested_vmx.apic_access_page_cache: not there',
        'behaviour discarded-page-traps: not seen, an L2 ran',
      ],
      ['BTF nested_vmx.hv_clean_fields: not there'],
      ['BTF nested_vmx.hv_evmcs_cache: not there', 'behaviour unaligned-evmcs-refused: not seen, an L2 ran'],
    ]);
    expect(probe.fingerprint.kind).toBe('stock');
  });

  test('a kernel that is not a kernel: status 3 at once', async () => {
    const { status, stdout, stderr } = await run(['test', '--machine', 'lab', '--kernel', 'package.json']);
    expect([status, stdout]).toEqual([3, '']);
    expect(stderr).toMatch(/^nvmx: .*package\.json/);
    expect(stderr).not.toContain('    at ');
  });

  test('a kernel that panics at boot: status 3 with the console', async () => {
    const { status, stderr } = await run([
      ...['test', '--machine', 'lab', '--append', 'rdinit=/nowhere init=/nowhere root=/dev/nowhere'],
    ]);
    expect(status).toBe(3);
    expect(stderr).toContain('Kernel panic');
    expect(stderr).not.toContain('    at ');
  });

  test.each([
    ['SIGINT', 130],
    ['SIGTERM', 143],
  ] as const)('%s in the middle of a boot: status %i, nothing left', async (signal, expected) => {
    const finished = run(['test', '--machine', 'lab', '--cold']);
    while (!last.stderr().includes('booting') && last.child.exitCode === null) await sleep(20);
    await sleep(500);
    last.child.kill(signal);
    const { status, stderr } = await finished;
    expect(status).toBe(expected);
    expect(stderr).toContain('nvmx: stopped; nothing was left running');
  });

  test('an engine that cannot be used: status 3, and which', async () => {
    const { status, stderr } = await run(['test', '--machine', 'lab'], { NVMX_BOCHS: '/nonexistent/bochs' });
    expect(status).toBe(3);
    expect(stderr).toContain('NVMX_BOCHS');
    expect(stderr).toContain('/nonexistent/bochs');
  });
});
