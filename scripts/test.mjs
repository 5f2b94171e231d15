// SPDX-License-Identifier: Apache-2.0
// npm test [-- ARGUMENTS OF vitest run]: sets up what is missing, then the whole suite, a lab run included.
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { ROOT, sayer, script } from './run.mjs';
import { setup } from './setup.mjs';

await script(() => {
  setup(sayer());
  const vitest = spawnSync(join(ROOT, 'node_modules/.bin/vitest'), ['run', ...process.argv.slice(2)], {
    cwd: ROOT,
    stdio: 'inherit',
  });
  return vitest.status ?? 1;
});
