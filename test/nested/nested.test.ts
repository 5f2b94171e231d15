// SPDX-License-Identifier: Apache-2.0
// Runs the nested tests where nested VMX is: on this host if it has it, else once in the lab, and on the kernel that
// NVMX_TEST_KERNEL names (as --kernel) always in the lab. Every test of theirs becomes one here. They run while this file
// is collected, because only then are their names known.
import { execFileSync, spawn } from 'node:child_process';
import { cpSync, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';
import { Kvm } from '../../lib/kvm/index.ts';
import { LabError, runInLab } from '../../lib/lab/index.ts';
import { MARK, type NestedResult } from './reporter.ts';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const STAGED = join(ROOT, 'out/nested');
const INSIDE = '/nested';
const LIMIT_MS = 600_000;
const KERNEL = process.env['NVMX_TEST_KERNEL'];
const CPUID_VMX = 1 << 5;

interface Run {
  readonly where: string;
  /** Why it did not run at all. */
  readonly unavailable?: string;
  /** What was wrong with the run as a whole. */
  readonly failure?: string;
}

/** Compiles the tests with lib/ into a folder that has the layout of the package. */
function stage(): void {
  const tsc = join(ROOT, 'node_modules/.bin/tsc');
  execFileSync(tsc, ['-p', join(ROOT, 'test/nested/tsconfig.json')], { stdio: 'pipe' });
  for (const part of ['build/Release/nvmx.node', 'out/cmake/guests', 'package.json']) {
    mkdirSync(join(STAGED, part, '..'), { recursive: true });
    cpSync(join(ROOT, part), join(STAGED, part), { recursive: true });
  }
}

function argv(root: string): string[] {
  return [`--test-reporter=${root}/test/nested/reporter.js`, `${root}/test/nested/main.js`];
}

function hostHasNestedVmx(): boolean {
  try {
    using kvm = Kvm.open();
    const leaf = kvm.supportedCpuid().find((entry) => entry.function === 1);
    return kvm.checkExtension('KVM_CAP_NESTED_STATE') > 0 && ((leaf?.ecx ?? 0) & CPUID_VMX) !== 0;
  } catch {
    return false;
  }
}

async function runOnHost(onLine: (line: string) => void): Promise<Run> {
  const child = spawn(process.execPath, argv(STAGED), {
    stdio: ['ignore', 'pipe', 'inherit'],
    timeout: LIMIT_MS,
  });
  createInterface({ input: child.stdout }).on('line', onLine);
  const status = await new Promise<number | null>((resolve) => child.on('close', resolve));
  return status === 0 || status === 1
    ? { where: 'this host' }
    : { where: 'this host', failure: `the tests' process ended with status ${status}` };
}

async function runInMachine(onLine: (line: string) => void): Promise<Run> {
  try {
    const lab = await runInLab(argv(INSIDE), {
      files: { [INSIDE]: STAGED },
      ...(KERNEL ? { kernel: KERNEL } : {}),
      onLine,
      timeoutMs: LIMIT_MS,
      onProgress: (text) => process.stderr.write(`nested tests: ${text}\n`),
    });
    const where = `the lab, Linux ${lab.kernel.release}`;
    if (lab.outcome === 'exited' && (lab.exitStatus === 0 || lab.exitStatus === 1)) return { where };
    const tail = lab.console.trimEnd().split('\n').slice(-30).join('\n');
    return { where, failure: `${lab.outcome} (status ${lab.exitStatus}, ${lab.reason}); console:\n${tail}` };
  } catch (error) {
    if (!(error instanceof LabError)) throw error;
    // Whoever names a kernel wants the run, not a skip
    return { where: 'the lab', [KERNEL ? 'failure' : 'unavailable']: error.message };
  }
}

const results: NestedResult[] = [];
const stray: string[] = [];
function collect(line: string): void {
  if (line.startsWith(MARK)) results.push(JSON.parse(line.slice(MARK.length)) as NestedResult);
  else stray.push(line);
}

stage();
const run = await (!KERNEL && hostHasNestedVmx() ? runOnHost(collect) : runInMachine(collect));

describe(`nested VMX in ${run.where}`, () => {
  test('the run came to its end', (context) => {
    if (run.unavailable) return context.skip(run.unavailable);
    expect(run.failure).toBeUndefined();
    expect(results.length, stray.join('\n')).toBeGreaterThan(0);
    return undefined;
  });

  for (const { name, verdict, detail } of results) {
    test(name, (context) => {
      if (verdict === 'skip') return context.skip(detail ?? 'no reason given');
      if (verdict === 'fail') throw new Error(detail);
      return undefined;
    });
  }
});
