// SPDX-License-Identifier: Apache-2.0
import { randomBytes } from 'node:crypto';
import { readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { engineCommand, LOG_FILE } from './bochs.ts';
import { NODE, prepareBoot } from './boot.ts';
import { keepConsole, type Progress, temporaryFolder } from './cache.ts';
import { findDefect } from './console.ts';
import { type Engine, prepareEngine } from './engine.ts';
import { explainEnding } from './engine_log.ts';
import { explainDisk, LabError } from './errors.ts';
import { type LabKernel, prepareKernel } from './kernel.ts';
import type { Files } from './payload.ts';
import { dropSnapshot, type Snapshot, type SnapshotKeeper } from './snapshot.ts';
import { TerminalLine } from './terminal.ts';
import { type Ending, type Watched, watchMachine } from './watch.ts';

export interface LabOptions extends Progress {
  /**
   * Default: Debian's cloud image for the release this machine runs. Else the path of a bzImage with KVM built in,
   * the folder of an unpacked Debian kernel package, or `debian:` and the beginning of a version, for another image
   * than the cloud image with `-` and its flavour (`debian:6.12-amd64`).
   */
  readonly kernel?: string;
  /** More kernel arguments, after the lab's own: the later of two wins. Module parameters too. */
  readonly append?: string;
  /** Default 1024. */
  readonly memoryMiB?: number;
  /** Default 1. */
  readonly cpus?: number;
  /** A CPU model of the emulator; default corei7_skylake_x. */
  readonly engineCpu?: string;
  /** Wall time for the whole run, default 10 minutes. */
  readonly timeoutMs?: number;
  /** CPU time of the emulator until the program starts, default 90 s (distribution's emulator: 300 s). */
  readonly bootLimitMs?: number;
  /** CPU time of the emulator without a byte from the machine once the program runs, default 180 s. */
  readonly silenceMs?: number;
  /**
   * A program that prints a line at least so often, from its first on, is dead with its machine when none comes. CPU
   * time of our emulator with one processor; the limit is longer where more is to be done for a line.
   */
  readonly heartbeatMs?: number;
  /**
   * Nothing of the outside gets in: the clock starts at a fixed date, and init's mark, which is otherwise random so
   * that no program can imitate it, is fixed too. Two runs then execute the same instructions.
   */
  readonly deterministic?: boolean;
  /** Files or folders for the machine: outside path by absolute path inside. */
  readonly files?: Files;
  /** Files inside to bring out when the program has ended; what is there is in `LabResult.fetched`. */
  readonly fetch?: readonly string[];
  /** The program's terminal. Then there are no lines: its stdin, stdout and stderr are this. */
  readonly terminal?: LabTerminal;
  /** Text of the ES module that `argv` names, when that is no file: it may import what is beside its place. */
  readonly program?: string;
  /** Modules of the package that a program of its own needs: a snapshot has them loaded. */
  readonly preload?: readonly string[];
  /** Boots, though the cache may hold a snapshot of the booted machine; and leaves none. */
  readonly cold?: boolean;
  /** Environment of the program. */
  readonly env?: Readonly<Record<string, string>>;
  /** Told once, before the machine starts. */
  readonly onEngine?: (engine: Engine) => void;
  /** One line of the program's stdout, as it comes. Its stderr goes to the console. */
  readonly onLine?: (line: string) => void;
  readonly onConsole?: (chunk: string) => void;
}

/** Bytes both ways between somebody and a program in the machine. */
export interface LabTerminal {
  readonly input: Readable;
  readonly output: Writable;
  readonly rows?: number;
  readonly columns?: number;
}

export type LabOutcome =
  | 'exited'
  | 'panic'
  | 'powered-off'
  | 'hang'
  | 'timeout'
  | 'engine-failed'
  | 'aborted';

export interface LabResult {
  readonly outcome: LabOutcome;
  /** Why, when it is not `exited`. */
  readonly reason?: string;
  /** Of the program, when it exited. */
  readonly exitStatus?: number;
  /** Files brought out, by their place inside; those that were not there are missing. */
  readonly fetched: ReadonlyMap<string, Buffer>;
  /**
   * The first line on the console that tells of a defect in the kernel (BUG, Oops, a fault), whether or not the
   * machine lived on.
   */
  readonly kernelDefect?: string;
  /** The whole kernel console. */
  readonly console: string;
  /** Where that text is kept; the newest 30 stay. */
  readonly consoleFile: string;
  readonly engine: Engine;
  readonly kernel: { readonly release: string; readonly source: string };
  readonly wallMs: number;
  /** From the emulator's start to the program's. */
  readonly bootMs?: number;
  /** It did not boot, but continued from a snapshot. */
  readonly woken: boolean;
}

const FOREIGN_EFFORT = 4;
/** CPU time in which a snapshot gives a sign of life, or never will. */
const WAKE_LIMIT_MS = 10_000;

/**
 * Boots the emulated Intel machine, runs Node there with `argv` in the package's folder, and waits for its end.
 * The machine's death is a result, not an error.
 *
 * @param argv script and arguments, such as ['dist/cli/main.js', 'probe']
 * @throws LabError when the machine could not be used at all
 */
export async function runInLab(argv: readonly string[], options: LabOptions = {}): Promise<LabResult> {
  return await runCommandInLab([NODE, ...argv], options);
}

/**
 * The same for any program: one of busybox, or one that `files` brings along; its shared libraries come with it.
 *
 * @throws LabError when the machine could not be used at all
 */
export async function runCommandInLab(
  command: readonly string[],
  options: LabOptions = {},
): Promise<LabResult> {
  const began = performance.now();
  const kernel = await prepareKernel(options.kernel, options);
  const engine = await prepareEngine(options);
  options.onEngine?.(engine);
  const { ending, console, bootMs, files, snapshot } = await attemptTwice({
    command,
    options,
    engine,
    kernel,
  });
  if (ending.kind === 'no-kvm') {
    const file = keepConsole(console);
    throw new LabError(
      'this kernel offers no KVM in the machine',
      `Linux ${kernel.release} (${kernel.source}) booted, but there is no /dev/kvm; console: ${file}`,
      'build it with CONFIG_KVM=y and CONFIG_KVM_INTEL=y, or give a kernel tree with its modules' +
        (options.engineCpu ? `; or the CPU model ${options.engineCpu} lacks what KVM needs` : ''),
    );
  }
  const fetched = new Map((options.fetch ?? []).map((path, index) => [path, files.get(index)]));
  const defect = findDefect(console);
  const reason = 'why' in ending ? ending.why : undefined;
  return {
    outcome: ending.kind,
    ...(reason === undefined ? {} : { reason }),
    ...(ending.kind === 'exited' ? { exitStatus: ending.status } : {}),
    fetched: new Map([...fetched].filter((entry): entry is [string, Buffer] => entry[1] !== undefined)),
    ...(defect === undefined ? {} : { kernelDefect: defect }),
    console,
    consoleFile: keepConsole(console),
    engine,
    kernel: { release: kernel.release, source: kernel.source },
    wallMs: performance.now() - began,
    ...(bootMs === undefined ? {} : { bootMs }),
    woken: snapshot !== undefined,
  };
}

function reasonOf({ ending }: Watched<Ending>): string {
  return 'why' in ending ? ending.why : ending.kind;
}

interface Attempt {
  readonly command: readonly string[];
  readonly options: LabOptions;
  readonly engine: Engine;
  readonly kernel: LabKernel;
}

interface Run extends Watched<Ending> {
  /** That it continued from. */
  readonly snapshot: Snapshot | undefined;
}

/** A snapshot that does not continue, and an emulator that fails before the kernel speaks, get another try. */
async function attemptTwice(request: Attempt): Promise<Run> {
  const run = await attempt(request);
  const { ending, bootMs, snapshot } = run;
  const { options } = request;
  if (snapshot && bootMs === undefined && ending.kind !== 'aborted' && ending.kind !== 'timeout') {
    await dropSnapshot(snapshot, reasonOf(run), options);
  } else if (ending.kind === 'engine-failed' && ending.before === 'boot') {
    options.onProgress?.(`the emulator failed (${reasonOf(run)}); trying once more`);
  } else return run;
  return await attempt({ ...request, options: { ...options, cold: true } });
}

async function attempt(request: Attempt): Promise<Run> {
  const { options, engine, kernel } = request;
  const folder = await temporaryFolder('run');
  const { terminal } = options;
  const line = terminal && (await TerminalLine.open(terminal));
  let keeper: SnapshotKeeper | undefined;
  try {
    const mark = `@nvmx-${options.deterministic ? '0'.repeat(24) : randomBytes(12).toString('hex')}`;
    const boot = await prepareBoot(folder, { ...request, mark, port: line?.port });
    const { snapshot } = boot;
    keeper = boot.keeper;
    const timeoutMs = options.timeoutMs ?? 600_000;
    const limit = Math.ceil(timeoutMs / 1000) + 10;
    const emulator = await engineCommand(engine, folder, limit, snapshot?.folder);
    const how = snapshot
      ? `waking Linux ${kernel.release} (${snapshot.key})`
      : `booting Linux ${kernel.release}`;
    options.onProgress?.(`${how} in ${engine.version}`);
    if (snapshot) options.onConsole?.(snapshot.console);
    const bootLimitMs = options.bootLimitMs ?? (engine.memoryImages ? 90_000 : 300_000);
    const watched = await watchMachine(emulator, folder, {
      mark,
      marksOnConsole: terminal !== undefined,
      timeoutMs,
      bootLimitMs: snapshot ? WAKE_LIMIT_MS : bootLimitMs,
      silenceMs: options.silenceMs ?? 180_000,
      heartbeatMs: options.heartbeatMs && options.heartbeatMs * effort(engine, options),
      signal: options.signal,
      onLine: options.onLine,
      onConsole: options.onConsole,
      onReady: (console) => {
        keeper?.booted(console);
        options.onProgress?.('Linux is up; starting the program');
      },
    });
    const log = await readFile(join(folder, LOG_FILE), 'latin1').catch(() => '');
    return {
      ...watched,
      console: (snapshot?.console ?? '') + watched.console,
      ending: explainEnding(watched.ending, log),
      snapshot,
    };
  } catch (error) {
    throw explainDisk(error, folder);
  } finally {
    line?.close();
    await keeper?.end();
    await rm(folder, { recursive: true, force: true });
  }
}

/** What a machine's instruction takes of the host, one processor of our engine being 1. */
function effort(engine: Engine, { cpus = 1 }: LabOptions): number {
  return cpus * (engine.memoryImages ? 1 : FOREIGN_EFFORT);
}
