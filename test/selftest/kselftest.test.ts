// SPDX-License-Identifier: Apache-2.0
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { describeLab } from '../../lib/lab/index.ts';
import { parseReport } from '../../lib/report/index.ts';
import { discover, namesOf } from '../../lib/selftest/kselftest/index.ts';
import { failedAssertion, parseTap, skipReason } from '../../lib/selftest/kselftest/output.ts';
import { nvmx } from '../cli/nvmx.ts';

const lab = describeLab();
if (!lab.possible) console.log(`# SKIP kernel selftests in the lab: ${lab.why}`);

const root = mkdtempSync(join(tmpdir(), 'nvmx-kselftest-'));
afterAll(() => rmSync(root, { recursive: true, force: true }));

/** A folder with these files; scripts may be executed. */
function folder(name: string, files: Record<string, string>): string {
  for (const [path, text] of Object.entries(files)) {
    const file = join(root, name, path);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, text, { mode: text.startsWith('#!') ? 0o755 : 0o644 });
  }
  return join(root, name);
}

const script = (...lines: string[]): string => `#!/bin/sh\n${lines.join('\n')}\n`;

describe('parseTap', () => {
  const short = (text: string): (string | undefined)[][] =>
    parseTap(text).subtests.map(({ name, verdict, reason }) => [name, verdict, reason]);

  test('results with and without directives', () => {
    const text = `TAP version 13
1..6
ok 1 first
# a remark: not ok 9
not ok 2 - the second one
ok 3 third # SKIP needs AVX
not ok 4 fourth # TODO later
ok 5
not ok 6 sixth # TIMEOUT 45 seconds
`;
    expect(short(text)).toEqual([
      ['first', 'pass', undefined],
      ['the-second-one', 'fail', 'not ok'],
      ['third', 'skip', 'needs AVX'],
      ['fourth', 'skip', 'expected to fail: later'],
      ['#5', 'pass', undefined],
      ['sixth', 'fail', 'TIMEOUT 45 seconds'],
    ]);
    expect(parseTap(text).broken).toBeUndefined();
  });

  test('KTAP groups name their members', () => {
    const text = `KTAP version 1
1..2
    KTAP version 1
    1..2
    ok 1 a
    not ok 2 b
not ok 1 group
ok 2 alone
`;
    expect(short(text)).toEqual([
      ['group/a', 'pass', undefined],
      ['group/b', 'fail', 'not ok'],
      ['alone', 'pass', undefined],
    ]);
  });

  test('a group that fails although its members pass, and names that come twice', () => {
    expect(short('  ok 1 a\n  ok 2 a\nnot ok 1 g\n')).toEqual([
      ['g/a', 'pass', undefined],
      ['g/a#2', 'pass', undefined],
      ['g', 'fail', 'not ok'],
    ]);
  });

  test('a plan that is not kept, and one of nothing', () => {
    expect(parseTap('1..3\nok 1 a\nok 2 b\n').broken).toBe('2 of 3 planned sub-tests were reported');
    expect(parseTap('1..1\nok 1 a\nBail out! no memory\n').broken).toBe('Bail out! no memory');
    expect(parseTap('1..0 # SKIP - no VMX\n')).toEqual({ subtests: [], skipped: 'no VMX' });
  });
});

test('why a program skipped itself, and what it asserted', () => {
  expect(skipReason('Random seed: 1\n1..0 # SKIP - Requirement not met: kvm_has_cap(9)\n')).toBe(
    'Requirement not met: kvm_has_cap(9)',
  );
  expect(skipReason('one\nno nested VMX here\n')).toBe('no nested VMX here');
  expect(skipReason('')).toBe('no reason given');
  const text = `==== Test Assertion Failure ====
  x86/some_test.c:45: r == 0
  pid=12 tid=12 errno=22 - Invalid argument
     1\t0x0000000000401a2b: main at some_test.c:99
  the ioctl failed
`;
  expect(failedAssertion(text)).toBe('x86/some_test.c:45: r == 0 the ioctl failed');
  expect(failedAssertion('all is well\n')).toBeUndefined();
});

describe('discover', () => {
  test('the list of an installed tree, names in the patterns old or new', () => {
    const path = folder('installed', {
      'kselftest-list.txt': 'kvm:nested_set_state_test\nkvm:missing\n',
      'kvm/nested_set_state_test': script('exit 0'),
      'kvm/not_listed': script('exit 0'),
    });
    expect(discover(path).programs.map((one) => one.id)).toEqual([
      'kvm/nested_set_state_test',
      'kvm/missing',
    ]);
    expect(namesOf('kvm/nested_set_state_test')).toContain('vmx_set_nested_state_test');
    expect(namesOf('x86/vmx_dirty_log_test')).toContain('nested_dirty_log_test');
  });

  test('.test files: words, quotes, and a program further up', () => {
    const path = folder('commands', {
      bin_test: script('exit 0'),
      'cases/some/quoted.test': `# a remark\n\nbin_test -a "b \\"c\\" d" 'e f' g\\ h\n`,
    });
    expect(discover(path).programs).toEqual([
      { id: 'cases/some/quoted', file: 'bin_test', args: ['-a', 'b "c" d', 'e f', 'g h'] },
    ]);
    expect(discover(join(path, 'cases/some/quoted.test')).programs).toHaveLength(1);
  });

  test('every program of a folder, and nothing else', () => {
    const path = folder('plain', {
      'x86/a_test.sh': script('exit 0'),
      'notes.txt': 'text',
      'not-executable.sh': 'echo',
      'lib.so': '#!/bin/sh\n',
    });
    expect(discover(path).programs).toEqual([{ id: 'x86/a_test', file: 'x86/a_test.sh', args: [] }]);
  });

  test.each([
    [{ 'kselftest-list.txt': 'no collection\n' }, '"no collection" is not COLLECTION:TEST'],
    [{ 'a.test': 'one\ntwo\n' }, 'holds 2 command lines instead of one'],
    [{ 'a.test': `one "two\n` }, 'a quote is not closed'],
    [{ readme: 'text' }, 'no program that may be executed'],
  ])('what cannot be understood is said: %#', (files, why) => {
    const path = folder(`bad-${why.length}`, files);
    expect(() => discover(path)).toThrow(why);
  });
});

const outcomes = {
  'pass.sh': script('echo fine'),
  'fail.sh': script('echo the last words', 'exit 1'),
  'skip.sh': script('echo "1..0 # SKIP - no such CPU"', 'exit 4'),
  'assert.sh': script(
    'echo "==== Test Assertion Failure ====" >&2',
    'echo "  a.c:7: x == y" >&2',
    'exit 254',
  ),
  'killed.sh': script('kill -SEGV $$'),
  'parts.sh': script('echo 1..2', 'echo ok 1 one', 'echo not ok 2 two', 'exit 0'),
  'late.sh': script('sleep 60 & sleep 60'),
};

const expected = [
  ['assert', 'fail', expect.stringContaining('seen exit 254: assertion failed: a.c:7: x == y (')],
  ['fail', 'fail', expect.stringContaining('outcome: expected exit 0, seen exit 1 (')],
  ['killed', 'fail', expect.stringContaining('seen killed by SIGSEGV (')],
  ['late', 'timeout', 'no result within 1000 ms'],
  ['parts/one', 'pass', undefined],
  ['parts/two', 'fail', 'not ok'],
  ['parts', 'fail', expect.stringContaining('failed: expected [], seen [two]')],
  ['pass', 'pass', undefined],
  ['skip', 'skip', 'no such CPU'],
];

test('nvmx kselftest on this host: every way to end, in the report and the exit status', async () => {
  const path = folder('outcomes', outcomes);
  const output = join(root, 'host.json');
  const { status, stdout } = await nvmx([
    ...['kselftest', path, '--machine', 'host', '--timeout', '1', '--reporter', 'json', '--output', output],
  ]);
  const { results } = parseReport(readFileSync(output, 'utf8'));
  expect(results.map(({ id, verdict, reason }) => [id, verdict, reason])).toEqual(expected);
  expect(results.find(({ id }) => id === 'fail')).toMatchObject({
    evidence: { output: ['the last words'] },
    reproduce: `nvmx kselftest ${path} fail`,
  });
  expect([status, stdout.trimEnd().split('\n').at(-1)]).toEqual([1, '2 passed, 6 failed, 1 skipped']);
  // Nothing that the one which ran too long had started is left.
  expect(execFileSync('ps', ['-eo', 'args'], { encoding: 'utf8' })).not.toContain('late.sh');
});

test('nvmx kselftest: patterns, the list, and bad input', async () => {
  const path = folder('outcomes', outcomes);
  expect((await nvmx(['kselftest', path, 'p*', '--list'])).stdout).toBe('parts\tparts.sh\npass\tpass.sh\n');
  const bad = await nvmx(['kselftest', path, 'nothing']);
  expect([bad.status, bad.stderr]).toEqual([
    2,
    expect.stringContaining('matches "nothing"; --list prints them'),
  ]);
  expect((await nvmx(['kselftest', join(root, 'nowhere')])).stderr).toContain('nowhere is not there');
  expect((await nvmx(['kselftest'])).status).toBe(2);
});

test.skipIf(!lab.possible)('nvmx kselftest in the lab', { timeout: 600_000 }, async () => {
  const path = folder('in-lab', { ...outcomes, 'prog.c': PROGRAM });
  execFileSync('gcc', ['-o', join(path, 'prog'), join(path, 'prog.c'), '-lm']);
  const output = join(root, 'lab.json');
  const { status } = await nvmx([
    ...['kselftest', path, '--machine', 'lab', '--timeout', '1', '--reporter', 'json', '--output', output],
  ]);
  const { machine, results } = parseReport(readFileSync(output, 'utf8'));
  expect(machine.parameters['kvm_intel.nested']).toBe('Y');
  expect(results.map(({ id, verdict, reason }) => [id, verdict, reason])).toEqual([
    ...expected.slice(0, 8),
    // Its shared library came along, and it saw the KVM of the lab.
    ['prog/kvm', 'pass', undefined],
    ['prog', 'pass', undefined],
    expected[8],
  ]);
  expect(status).toBe(1);
});

const PROGRAM = `
#include <fcntl.h>
#include <linux/kvm.h>
#include <math.h>
#include <stdio.h>
#include <sys/ioctl.h>
int main(int argc, char **argv) {
    int kvm = open("/dev/kvm", O_RDWR);
    int state = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE);
    printf("TAP version 13\\n1..1\\n%s 1 kvm\\n", state > 0 && sqrt(argc) == 1 ? "ok" : "not ok");
    return 0;
}
`;
