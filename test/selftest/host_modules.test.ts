// SPDX-License-Identifier: Apache-2.0
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { describeLab, runCommandInLab } from '../../lib/lab/index.ts';

const lab = describeLab();
if (!lab.possible) console.log(`# SKIP module parameters of a host: ${lab.why}`);

// The lab machine is the host here: its modules are real ones, and nobody else's VMs are on it.
test.skipIf(!lab.possible)(
  'the modules of a host are loaded anew and given back',
  { timeout: 600_000 },
  async () => {
    const lines: string[] = [];
    const run = await runCommandInLab(['sh', '/host/modules.sh'], {
      files: { '/host': fileURLToPath(new URL('host', import.meta.url)) },
      timeoutMs: 500_000,
      onLine: (line) => lines.push(line),
    });
    expect([run.outcome, run.exitStatus], run.console).toEqual(['exited', 0]);
    const seen = Object.fromEntries(
      lines
        .filter((line) => line.startsWith('@ '))
        .map((line) => [line.split(' ')[1], JSON.parse(line.replace(/^@ \S+ /, ''))]),
    );
    expect(seen).toEqual({
      before: { ept: 'Y', nested: 'Y' },
      during: { ept: 'N', nested: 'Y' },
      restored: true,
      unknown: 'the modules cannot be loaded anew: there is no parameter kvm_intel.nonsense',
      // An open /dev/kvm and a VM.
      inUse:
        'the modules cannot be loaded anew: kvm_intel is in use (2 users): stop the VMs of this host first',
      // A value that the module does not take: the modules are as they were.
      refused: [true, true],
      matrix: [
        0,
        [
          ['kvm_intel.ept=0', 'skip'],
          ['kvm_intel.ept=1', 'pass'],
        ],
        true,
      ],
      interrupted: [130, true],
    });
  },
);
