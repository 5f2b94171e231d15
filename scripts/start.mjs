// SPDX-License-Identifier: Apache-2.0
// npm start [-- ARGUMENTS OF nvmx test]: from a fresh clone to the selftests' verdicts; without arguments those of
// the series' two selftests.
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { ROOT, sayer, script } from './run.mjs';
import { setup } from './setup.mjs';

await script(async () => {
  setup(sayer());
  const given = process.argv.slice(2);
  const args = given.length > 0 ? given : ['apic-update', 'l2-switch'];
  const child = spawn(process.execPath, [join(ROOT, 'dist/cli/main.js'), 'test', ...args], {
    stdio: 'inherit',
  });
  // Ctrl-C reaches the child too: it cleans up and its exit status is ours.
  for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => child.kill(signal));
  return await new Promise((resolve) => child.on('exit', (status) => resolve(status ?? 1)));
});
