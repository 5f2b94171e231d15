// SPDX-License-Identifier: Apache-2.0
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

/**
 * Children need plain JavaScript, and the current one. The build leaves alone what is current: other test files, and
 * their children, read dist/ at the same time. A copy without scripts/ was built before it was made.
 */
export function compile(): void {
  const root = fileURLToPath(new URL('../..', import.meta.url));
  if (existsSync(`${root}/scripts/build.mjs`)) {
    execFileSync(process.execPath, ['scripts/build.mjs'], { cwd: root, stdio: 'pipe' });
  }
}
