// SPDX-License-Identifier: Apache-2.0
import { existsSync, readFileSync, statSync } from 'node:fs';
import { mkdir, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { acquireLock, cacheFolder, makeCacheFolder, type Progress } from './cache.ts';
import { LabError } from './errors.ts';
import { CommandMissingError, type Finished, type RunOptions, run } from './process.ts';

/** One archive of the machine's own apt configuration. */
export interface AptTarget {
  readonly uri: string;
  readonly suite: string;
  readonly origin: string;
}

export interface DebianMirror {
  /** The release this machine runs, such as bookworm. */
  readonly codename: string;
  readonly main: string;
  readonly security: string | undefined;
}

const KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg';
const OWN_KERNEL = 'or name a kernel of your own with --kernel, and an engine with NVMX_BOCHS';
const REFRESH_AFTER_MS = 24 * 3600_000;

/** Reads `URI|SUITE|ORIGIN` lines, the format asked of `apt-get indextargets`. */
export function parseTargets(text: string): AptTarget[] {
  return text
    .split('\n')
    .map((line) => line.trim().split('|'))
    .filter((fields) => fields.length === 3 && fields[0] && fields[1])
    .map(([uri, suite, origin]) => ({
      uri: uri!,
      suite: suite!,
      origin: origin!.startsWith('$(') ? '' : origin!,
    }));
}

/** The archive this machine installs Debian itself from: other archives may use the same suite names. */
export function findMirror(targets: readonly AptTarget[], codename: string): DebianMirror | undefined {
  const ofDebian = (suite: string): string | undefined => {
    const named = targets.filter((target) => target.suite === suite);
    const best =
      named.find((target) => target.origin === 'Debian') ??
      named.find((target) => target.origin === '' && /\/debian(-security)?\/?$/.test(target.uri));
    return best?.uri;
  };
  const main = ofDebian(codename);
  return main === undefined ? undefined : { codename, main, security: ofDebian(`${codename}-security`) };
}

/** The lines of `apt-config dump` that a download needs: proxies, certificates, retries; no hooks, no folders. */
export function networkSettings(dump: string): string[] {
  return dump
    .split('\n')
    .filter((line) => /^Acquire::(https?|ftp|socks|tor|Retries|ForceIPv[46])\b.*;$/.test(line));
}

/**
 * Stanzas of a sources file. A suite that is not of the running release may lag behind on this machine's mirror
 * and is still signed: what it has is what can be had. For the running release an old list stays an error.
 */
export function aptSources(
  { codename, main, security }: DebianMirror,
  kind: 'deb' | 'deb-src',
  suites: readonly string[],
): string[] {
  const isRunning = (suite: string): boolean => suite === codename || suite.startsWith(`${codename}-`);
  const stanza = (uri: string, names: readonly string[], options: string): string[] =>
    names.length === 0
      ? []
      : [
          `Types: ${kind}\nURIs: ${uri}\nSuites: ${names.join(' ')}\nComponents: main\n` +
            `Signed-By: ${KEYRING}\n${options}`,
        ];
  const plain = suites.filter((suite) => !suite.startsWith('security:'));
  const secure = suites.filter((suite) => suite.startsWith('security:')).map((suite) => suite.slice(9));
  const archives = [[main, plain] as const, ...(security ? [[security, secure] as const] : [])];
  return archives.flatMap(([uri, names]) => [
    ...stanza(uri, names.filter(isRunning), ''),
    ...stanza(
      uri,
      names.filter((name) => !isRunning(name)),
      'Check-Valid-Until: no\n',
    ),
  ]);
}

/**
 * A private apt: own lists, own sources, own cache, all inside the cache folder, so that nothing of the machine's
 * apt is touched and no root is needed. Only the mirror and the network settings come from the machine's apt.
 */
export class Apt {
  readonly #folder: string;
  readonly #progress: Progress;
  readonly mirror: DebianMirror;

  private constructor(folder: string, mirror: DebianMirror, progress: Progress) {
    this.#folder = folder;
    this.mirror = mirror;
    this.#progress = progress;
  }

  /**
   * @param name folder for this choice of suites
   * @param suites from the codename this machine runs; `security:` prefix for the security archive
   */
  static async open(
    name: string,
    kind: 'deb' | 'deb-src',
    suites: (codename: string) => string[],
    progress: Progress,
  ): Promise<Apt> {
    const mirror = await machineMirror(progress);
    const folder = join(makeCacheFolder(), 'apt', name);
    const apt = new Apt(folder, mirror, progress);
    await mkdir(folder, { recursive: true });
    const lock = await acquireLock(join(cacheFolder(), 'apt', `${name}.lock`), 'a package list', progress);
    try {
      await apt.#configure(kind, suites(mirror.codename));
      if (!apt.#fresh()) await apt.#update();
    } finally {
      lock.release();
    }
    return apt;
  }

  async #configure(kind: 'deb' | 'deb-src', suites: readonly string[]): Promise<void> {
    for (const part of ['lists/partial', 'cache/archives/partial', 'parts']) {
      await mkdir(join(this.#folder, part), { recursive: true });
    }
    const sources = aptSources(this.mirror, kind, suites);
    const dump = await command('apt-config', ['dump'], this.#progress);
    const own = {
      'Dir::State': this.#folder,
      'Dir::State::Lists': join(this.#folder, 'lists'),
      'Dir::State::status': join(this.#folder, 'status'),
      'Dir::Cache': join(this.#folder, 'cache'),
      'Dir::Etc::sourcelist': join(this.#folder, 'debian.sources'),
      'Dir::Etc::sourceparts': '-',
      'Dir::Etc::parts': join(this.#folder, 'parts'),
      'Dir::Etc::main': join(this.#folder, 'none'),
      'Acquire::Languages': 'none',
      // Lists of four suites are half a gigabyte otherwise.
      'Acquire::GzipIndexes': 'true',
      // The archive is read as this user: apt's own download user may not enter a home folder.
      'APT::Sandbox::User': 'root',
      'APT::Architecture': 'amd64',
    };
    const lines = [
      ...networkSettings(dump.stdout),
      ...Object.entries(own).map(([key, value]) => `${key} "${value}";`),
    ];
    await writeFile(join(this.#folder, 'status'), '');
    await writeFile(join(this.#folder, 'debian.sources'), sources.join('\n'));
    await writeFile(join(this.#folder, 'apt.conf'), `${lines.join('\n')}\n`);
  }

  get #stamp(): string {
    return join(this.#folder, 'updated');
  }

  #fresh(): boolean {
    const sources = readFileSync(join(this.#folder, 'debian.sources'), 'utf8');
    if (!existsSync(this.#stamp) || readFileSync(this.#stamp, 'utf8') !== sources) return false;
    return Date.now() - statSync(this.#stamp).mtimeMs < REFRESH_AFTER_MS;
  }

  async #update(): Promise<void> {
    this.#progress.onProgress?.('reading the Debian package lists');
    const done = await this.run('apt-get', ['update', '--error-on=any']);
    if (done.status !== 0) {
      // An old list serves as long as the archive still holds what it names.
      if (existsSync(this.#stamp)) return;
      throw new LabError(
        'the Debian package lists could not be read',
        lastWords(done),
        `check the network and this machine's apt configuration; ${OWN_KERNEL}`,
      );
    }
    await writeFile(this.#stamp, readFileSync(join(this.#folder, 'debian.sources'), 'utf8'));
  }

  run(tool: string, args: readonly string[], options: RunOptions = {}): Promise<Finished> {
    return command(tool, args, this.#progress, {
      ...options,
      env: { ...options.env, APT_CONFIG: join(this.#folder, 'apt.conf') },
    });
  }

  /** Downloads packages (`name` or `name=version`), checked by apt against the signed lists, and unpacks them. */
  async unpack(packages: readonly string[], folder: string): Promise<void> {
    const debs = join(folder, '.debs');
    await mkdir(debs, { recursive: true });
    this.#progress.onProgress?.(`downloading ${packages.join(', ')}`);
    let done = await this.run('apt-get', ['download', ...packages], { cwd: debs });
    if (done.status !== 0 && !/No space left/.test(done.stderr)) {
      // The list may be older than the archive: read it again, once.
      await this.#update();
      done = await this.run('apt-get', ['download', ...packages], { cwd: debs });
    }
    if (done.status !== 0) {
      if (/No space left/.test(done.stderr)) throw new Error('No space left on device');
      throw new LabError(
        `the download of ${packages.join(', ')} failed`,
        lastWords(done),
        `run it again when the network is there; ${OWN_KERNEL}`,
      );
    }
    const unpack = await command(
      'sh',
      ['-c', 'for d in "$1"/*.deb; do dpkg-deb -x "$d" "$2" || exit 1; done', 'sh', debs, folder],
      this.#progress,
    );
    if (unpack.status !== 0)
      throw new Error(`dpkg-deb could not unpack ${packages.join(', ')}: ${lastWords(unpack)}`);
    await rm(debs, { recursive: true });
  }
}

async function machineMirror(progress: Progress): Promise<DebianMirror> {
  const release = readRelease();
  if (release['ID'] !== 'debian' || !release['VERSION_CODENAME']) {
    throw new LabError(
      'the lab cannot fetch its parts here',
      `they come from Debian's archive, and this system is ${release['PRETTY_NAME'] ?? 'not Debian'}`,
      OWN_KERNEL.replace('or name', 'name'),
    );
  }
  if (!existsSync(KEYRING)) {
    throw new LabError(
      'Debian packages cannot be checked',
      `${KEYRING} is missing`,
      'apt-get install debian-archive-keyring',
    );
  }
  const format = '$(REPO_URI)|$(RELEASE)|$(ORIGIN)';
  const done = await command(
    'apt-get',
    ['indextargets', '--format', format, 'Created-By: Packages'],
    progress,
  );
  const mirror = findMirror(parseTargets(done.stdout), release['VERSION_CODENAME']);
  if (mirror) return mirror;
  throw new LabError(
    'no Debian mirror is known',
    `this machine's apt has no source for ${release['VERSION_CODENAME']}`,
    `give apt one; ${OWN_KERNEL}`,
  );
}

function readRelease(): Record<string, string> {
  try {
    const lines = readFileSync('/etc/os-release', 'utf8').split('\n');
    return Object.fromEntries(
      lines.flatMap((line) => {
        const found = /^(\w+)="?(.*?)"?$/.exec(line);
        return found ? [[found[1]!, found[2]!]] : [];
      }),
    );
  } catch {
    return {};
  }
}

async function command(
  tool: string,
  args: readonly string[],
  { signal }: Progress,
  options: RunOptions = {},
): Promise<Finished> {
  try {
    return await run(tool, args, { ...options, signal });
  } catch (error) {
    if (!(error instanceof CommandMissingError)) throw error;
    throw new LabError(
      'the lab cannot fetch its parts here',
      error.message,
      OWN_KERNEL.replace('or name', 'name'),
    );
  }
}

/** The end of what a failed command said. */
export function lastWords({ status, stdout, stderr }: Finished, lines = 4): string {
  const text = (stderr.trim() || stdout.trim()).split('\n').slice(-lines).join('\n');
  return text || `status ${status}`;
}
