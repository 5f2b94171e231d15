// SPDX-License-Identifier: Apache-2.0
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { describeLab } from '../../lib/lab/index.ts';
import { nvmx } from './nvmx.ts';

const lab = describeLab();
if (!lab.possible) console.log(`# SKIP nvmx run in the lab: ${lab.why}`);

const folder = mkdtempSync(join(tmpdir(), 'nvmx-test-run-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
mkdirSync(join(folder, 'parts'));
const put = (name: string, text: string) => writeFileSync(join(folder, name), text);
put('parts/one.ts', 'export const one: number = 1;\n');
put('parts/up.ts', "import { up } from '../up.ts';\nconsole.log(up);\n");
put('up.ts', 'export const up: number = 4;\n');
put('data.txt', 'hello');
put('broken.ts', 'const = ;\n');
put('notes.txt', 'no script');
put('status.mjs', 'process.stdout.write("half a line"); process.exit(Number(process.argv[2]));\n');
put('sleep.mjs', 'console.log("asleep"); setInterval(() => {}, 1000);\n');
put(
  'script.ts',
  `import { readFileSync } from 'node:fs';
import { Kvm } from 'nvmx';
import { VMCS_FIELDS } from 'nvmx/guest';
import { one } from './parts/one.ts';

const text: string = readFileSync(new URL('./data.txt', import.meta.url), 'utf8');
console.log(process.argv.slice(2).join(' '), one, typeof Kvm, VMCS_FIELDS.GUEST_RIP.toString(16), text);
console.error('to stderr');
if (process.argv[2] === 'throw') throw new Error('boom');
process.exitCode = 7;
`,
);
const script = (name: string) => join(folder, name);

describe('nvmx run on the host', () => {
  test('a TypeScript file finds nvmx, its own modules and files, its arguments; its status is ours', async () => {
    const { status, stdout, stderr } = await nvmx(
      ['run', script('script.ts'), '--machine', 'host', '--', 'a', '--help'],
      {},
    );
    expect({ status, stdout, stderr }).toEqual({
      status: 7,
      stdout: 'a --help 1 function 681e hello\n',
      stderr: 'to stderr\n',
    });
  });

  test('a module outside its folder needs --folder, and nothing is written beside it', async () => {
    const args = ['run', script('parts/up.ts'), '--machine', 'host'];
    const { status, stderr } = await nvmx(args, {});
    expect(status).toBe(2);
    expect(stderr).toContain(`imports ${script('up.ts')}, which is not in ${script('parts')}: name a folder`);
    expect(readdirSync(folder).filter((name) => name.endsWith('.js'))).toEqual([]);
    expect(await nvmx([...args, '--folder', folder], {})).toMatchObject({ status: 0, stdout: '4\n' });
  });

  test('an error names the line of the TypeScript file', async () => {
    const { status, stderr } = await nvmx(
      ['run', script('script.ts'), '--machine', 'host', '--', 'throw'],
      {},
    );
    expect(status).toBe(1);
    expect(stderr).toMatch(/Error: boom\n +at .*script\.ts:9:/);
  });

  test('JavaScript: stdout as it is, and the exit status', async () => {
    const { status, stdout } = await nvmx(['run', script('status.mjs'), '--machine', 'host', '--', '42'], {});
    expect([status, stdout]).toEqual([42, 'half a line']);
  });

  test('--timeout stops it, and nothing is left in the temporary folder', async () => {
    const before = readdirSync(tmpdir()).filter((name) => name.startsWith('nvmx-run-'));
    const args = ['run', script('sleep.mjs'), '--machine', 'host', '--timeout', '2'];
    const { status, stdout, stderr } = await nvmx(args, {});
    expect([status, stdout, stderr]).toEqual([137, 'asleep\n', 'nvmx: the script was stopped after 2 s\n']);
    expect(readdirSync(tmpdir()).filter((name) => name.startsWith('nvmx-run-'))).toEqual(before);
  });

  test.each([
    [['run'], /run takes the script/],
    [['run', 'nowhere.js'], /there is no script nowhere\.js/],
    [['run', script('notes.txt')], /neither JavaScript nor TypeScript/],
    [['run', script('status.mjs'), 'more'], /what is for the script follows "--": -- more/],
    [['run', script('status.mjs'), '--folder', script('parts')], /is not in the folder/],
    [['run', script('status.mjs'), '--machine', 'host', '--kernel', 'x'], /--kernel is for the lab machine/],
    [
      ['run', script('status.mjs'), '--machine', 'lab', '--cpus', '9'],
      /--cpus is "9"; it takes a whole number/,
    ],
    [['run', script('broken.ts'), '--machine', 'host'], /broken\.ts does not compile:\n.*broken\.ts\(1,7\)/],
  ])('usage: %j', async (args, message) => {
    const { status, stderr } = await nvmx(args, {});
    expect(status).toBe(2);
    expect(stderr).toMatch(message);
  });
});

describe.skipIf(!lab.possible)('nvmx run in the lab', { timeout: 600_000 }, () => {
  test('the same script: stdout, stderr and status apart', async () => {
    const { status, stdout, stderr } = await nvmx(
      ['run', script('script.ts'), '--machine', 'lab', '--', 'throw'],
      {},
    );
    expect([status, stdout]).toEqual([1, 'throw 1 function 681e hello\n']);
    expect(stderr).toContain('to stderr\nError: boom\n');
  });
});
