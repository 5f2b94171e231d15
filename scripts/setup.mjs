// SPDX-License-Identifier: Apache-2.0
// Everything between a fresh clone and a package that runs: Debian packages, npm packages, the build.
// npm start and npm test begin with it; it does only what is not done yet.
import { existsSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { build } from './build.mjs';
import { ensurePackages, PACKAGES } from './packages.mjs';
import { ROOT, run, sayer, script } from './run.mjs';

export function setup(say) {
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major < 20 || (major === 20 && minor < 19)) {
    throw new Error(`Node ${process.versions.node} is too old: 20.19 or newer is needed`);
  }
  ensurePackages(PACKAGES, say);
  if (!npmPackagesCurrent()) {
    say('installing npm packages (npm ci)');
    run('npm', ['ci', '--no-fund', '--no-audit'], 'npm ci');
  }
  build(say);
}

/** npm notes what it installed; a lock file changed since then asks for another npm ci. */
function npmPackagesCurrent() {
  const note = join(ROOT, 'node_modules/.package-lock.json');
  const lock = join(ROOT, 'package-lock.json');
  if (!existsSync(note)) return false;
  if (statSync(note).mtimeMs >= statSync(lock).mtimeMs) return true;
  const packages = (path) => JSON.parse(readFileSync(path, 'utf8')).packages;
  const wanted = packages(lock);
  const installed = packages(note);
  return Object.entries(wanted).every(
    ([path, { version, optional }]) => path === '' || optional || installed[path]?.version === version,
  );
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) await script(() => setup(sayer()));
