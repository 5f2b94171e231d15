// SPDX-License-Identifier: Apache-2.0
// Debian packages that must be installed: for the addon, the guests and the lab's emulator. What else the lab
// machine is made of is fetched into the cache by lib/lab itself.
import { spawnSync } from 'node:child_process';

export const PACKAGES = ['cmake', 'g++', 'make', 'python3', 'xz-utils'];

/** Names of `packages` that dpkg does not have installed. */
export function missingPackages(packages) {
  // biome-ignore lint/suspicious/noTemplateCurlyInString: dpkg-query's own format
  const query = spawnSync('dpkg-query', ['-W', '-f', '${Package} ${db:Status-Status}\n', ...packages], {
    encoding: 'utf8',
  });
  if (query.error) {
    throw new Error(
      'dpkg-query is not here: this set-up is for Debian; install by hand what README.md lists',
    );
  }
  const installed = new Set(
    query.stdout
      .split('\n')
      .filter((line) => line.endsWith(' installed'))
      .map((line) => line.split(' ', 1)[0]),
  );
  return packages.filter((name) => !installed.has(name));
}

/**
 * Installs what is missing when this is root; else throws with the exact line to run.
 */
export function ensurePackages(packages, say) {
  const missing = missingPackages(packages);
  if (missing.length === 0) return;
  const line = `apt-get install -y --no-install-recommends ${missing.join(' ')}`;
  if (process.getuid() !== 0) {
    throw new Error(`Debian packages are missing and this is not root. Run: sudo ${line}`);
  }
  say(`installing Debian packages: ${missing.join(' ')}`);
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' };
  const apt = (...args) => {
    const done = spawnSync('apt-get', args, { env, encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
    return { ok: done.status === 0, text: `${done.stdout}${done.stderr}` };
  };
  // Old lists name versions the mirror no longer has, so they are brought up to date first.
  const update = apt('update');
  const install = apt('install', '-y', '--no-install-recommends', ...missing);
  if (!install.ok) {
    const tail = `${update.ok ? '' : update.text}${install.text}`.trim().split('\n').slice(-8).join('\n');
    throw new Error(`"${line}" failed:\n${tail}`);
  }
}
