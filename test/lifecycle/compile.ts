// SPDX-License-Identifier: Apache-2.0
import { execFileSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';

/** Children need plain JavaScript, and the current one: compiles lib/ to dist/. */
export function compile(): void {
  const root = fileURLToPath(new URL('../..', import.meta.url));
  try {
    execFileSync(process.execPath, ['node_modules/typescript/bin/tsc'], { cwd: root, stdio: 'pipe' });
  } catch (error) {
    const said = String((error as { stdout?: Buffer }).stdout ?? error);
    if (/lib\/kvm\//.test(said)) throw new Error(said);
  }
}
