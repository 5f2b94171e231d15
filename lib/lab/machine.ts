// SPDX-License-Identifier: Apache-2.0
import { randomBytes } from 'node:crypto';
import { readFile, rm, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { engineCommand, LOG_FILE, type MachineParts, machineDescription } from './bochs.ts';
import { keepConsole, type Progress, temporaryFolder } from './cache.ts';
import { findDefect } from './console.ts';
import { checkCpuModel, DEFAULT_CPU, type Engine, prepareEngine } from './engine.ts';
import { explainEnding } from './engine_log.ts';
import { explainDisk, LabError } from './errors.ts';
import { initScript, PACKAGE_FOLDER } from './init_script.ts';
import { writeBootCd } from './iso.ts';
import { type LabKernel, prepareKernel } from './kernel.ts';
import { bootImages, KERNEL_BASE, SETUP_BASE } from './linux_image.ts';
import { packedArguments, packModules } from './pack.ts';
import { debianFile } from './packages.ts';
import { type Files, nodeArchive, PACKAGE_ROOT, packageFiles, writeJobArchive } from './payload.ts';
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
}

const KERNEL_ARGUMENTS = [
  // At the default of 9600 baud the machine waits out 0.1 s of its own time for each line.
  'console=ttyS0,115200',
  'quiet',
  'loglevel=3',
  // A dead kernel ends the run instead of hanging it.
  'panic=-1',
  // What runs after an oops tells nothing any more.
  'oops=panic',
  'rdinit=/init',
  // The emulated TSC is exact, and needs no calibration.
  'tsc=reliable',
  // A second of the kernel's is then one of the devices': a timer goes off when the kernel thinks it should.
  'tsc_early_khz=200000',
  'lpj=1000000',
  // These cost half of the boot in an emulator, and say nothing about KVM.
  'cryptomgr.notests',
  'mitigations=off',
  'nokaslr',
  'random.trust_cpu=on',
  // Names instead of numbers in the formats of trace events; self-tests of random numbers and key derivation.
  'initcall_blacklist=trace_eval_init,jent_mod_init,crypto_kdf108_init',
  // Large pages for the initramfs: half of the time to unpack Node, and fewer faults when it runs (Linux 6.14).
  'transparent_hugepage_tmpfs=always',
  'kvm_intel.nested=1',
  // One disk of 64 MiB to swap to, in memory as it is used.
  'brd.rd_nr=1',
  'brd.rd_size=65536',
];
/** Giving the initramfs back page by page costs more than its 110 MiB are worth, where there is enough. */
const ROOMY_ARGUMENT = 'retain_initrd';
const ROOMY_MIB = 1024;
const BIOS = '/usr/share/bochs/BIOS-bochs-latest';
const VIDEO_BIOS = '/usr/share/vgabios/vgabios.bin';
const NODE = '/usr/bin/node';
const FOREIGN_EFFORT = 4;
const MIB = 1 << 20;
/** 2026-01-01, in seconds: where the clock of a deterministic run starts. */
const FIXED_DATE = 1_767_225_600;

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
  const run = await attempt(command, options, engine, kernel);
  const again = run.ending.kind === 'engine-failed' && run.ending.before === 'boot';
  if (again) options.onProgress?.(`the emulator failed (${reasonOf(run)}); trying once more`);
  const { ending, console, bootMs, files } = again ? await attempt(command, options, engine, kernel) : run;
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
  };
}

function reasonOf({ ending }: Watched<Ending>): string {
  return 'why' in ending ? ending.why : ending.kind;
}

async function attempt(
  command: readonly string[],
  options: LabOptions,
  engine: Engine,
  kernel: LabKernel,
): Promise<Watched<Ending>> {
  const folder = await temporaryFolder('run');
  const { terminal } = options;
  const line = terminal && (await TerminalLine.open(terminal));
  try {
    const mark = `@nvmx-${options.deterministic ? '0'.repeat(24) : randomBytes(12).toString('hex')}`;
    const description = machineDescription(
      await prepareParts(folder, mark, command, options, engine, kernel, line?.port),
      engine,
    );
    await writeFile(join(folder, 'bochsrc'), description);
    const timeoutMs = options.timeoutMs ?? 600_000;
    const emulator = await engineCommand(engine, folder, Math.ceil(timeoutMs / 1000) + 10);
    options.onProgress?.(`booting Linux ${kernel.release} in ${engine.version}`);
    const watched = await watchMachine(emulator, folder, {
      mark,
      marksOnConsole: terminal !== undefined,
      timeoutMs,
      bootLimitMs: options.bootLimitMs ?? (engine.memoryImages ? 90_000 : 300_000),
      silenceMs: options.silenceMs ?? 180_000,
      heartbeatMs: options.heartbeatMs && options.heartbeatMs * effort(engine, options),
      signal: options.signal,
      onLine: options.onLine,
      onConsole: options.onConsole,
      onReady: () => options.onProgress?.('Linux is up; starting the program'),
    });
    const log = await readFile(join(folder, LOG_FILE), 'latin1').catch(() => '');
    return { ...watched, ending: explainEnding(watched.ending, log) };
  } catch (error) {
    throw explainDisk(error, folder);
  } finally {
    line?.close();
    await rm(folder, { recursive: true, force: true });
  }
}

/** What a machine's instruction takes of the host, one processor of our engine being 1. */
function effort(engine: Engine, { cpus = 1 }: LabOptions): number {
  return cpus * (engine.memoryImages ? 1 : FOREIGN_EFFORT);
}

async function prepareParts(
  folder: string,
  mark: string,
  command: readonly string[],
  options: LabOptions,
  engine: Engine,
  kernel: LabKernel,
  terminalPort: number | undefined,
): Promise<MachineParts> {
  const memoryMiB = options.memoryMiB ?? 1024;
  const roomy = Math.min(memoryMiB, memoryLimitMiB(options.append ?? '')) >= ROOMY_MIB;
  const commandLine = [
    ...KERNEL_ARGUMENTS,
    ...(roomy ? [ROOMY_ARGUMENT] : []),
    ...(engine.apicv ? [] : ['kvm_intel.enable_apicv=0']),
  ].join(' ');
  const full = options.append ? `${commandLine} ${options.append}` : commandLine;
  const { rows = 24, columns = 80 } = options.terminal ?? {};
  // The pack is another process's work: meanwhile Node's archive is checked.
  const [packed, node, ownFiles] = await Promise.all([
    packCommand(command, folder, options),
    nodeArchive(options),
    packageFiles(),
  ]);
  const init = initScript({
    mark,
    command: packed.command,
    env: { NVMX_IN_LAB: '1', NO_COLOR: '1', ...options.env },
    fetch: options.fetch ?? [],
    terminal: options.terminal && { rows, columns },
  });
  const files = { ...ownFiles, ...options.files };
  const job = join(folder, 'job.cpio');
  await writeJobArchive(job, { init, modules: kernel.modules, files, made: packed.made }, options);
  return {
    bios: await debianFile(BIOS, 'bochsbios', options),
    videoBios: await debianFile(VIDEO_BIOS, 'vgabios', options),
    memoryMiB,
    startTime: options.deterministic ? FIXED_DATE : 'utc',
    cpus: options.cpus ?? 1,
    cpuModel: await checkCpuModel(engine, options.engineCpu ?? DEFAULT_CPU, options),
    terminalPort,
    boot: engine.memoryImages
      ? await memoryBoot(folder, kernel, [node, job], full, memoryMiB)
      : { kind: 'cd', image: await writeBootCd(folder, kernel.image.bytes, [node, job], full, options) },
  };
}

/** A program of the package itself starts from a pack, where this Node can make one. */
async function packCommand(
  command: readonly string[],
  folder: string,
  options: LabOptions,
): Promise<{ command: readonly string[]; made: Readonly<Record<string, Buffer | string>> }> {
  const [node, entry = '', ...args] = command;
  if (node !== NODE || !entry.startsWith('dist/')) return { command, made: {} };
  const { program } = options;
  const made = await packModules(PACKAGE_ROOT, { entry, program }, PACKAGE_FOLDER, folder, options);
  if (!made)
    return { command, made: program === undefined ? {} : { [join(PACKAGE_FOLDER, entry)]: program } };
  return {
    command: [NODE, ...packedArguments(PACKAGE_FOLDER, entry, args)],
    made: Object.fromEntries(Object.entries(made).map(([name, data]) => [join(PACKAGE_FOLDER, name), data])),
  };
}

async function memoryBoot(
  folder: string,
  kernel: LabKernel,
  archives: readonly string[],
  commandLine: string,
  memoryMiB: number,
): Promise<MachineParts['boot']> {
  const sizes = await Promise.all(archives.map(async (file) => (await stat(file)).size));
  const total = sizes.reduce((sum, size) => sum + size, 0);
  const {
    low,
    kernel: proper,
    ramdisk,
    floppy,
  } = bootImages(kernel.image, commandLine, total, Math.min(memoryMiB, memoryLimitMiB(commandLine)) * MIB);
  await writeFile(join(folder, 'low.bin'), low);
  await writeFile(join(folder, 'kernel.bin'), proper);
  await writeFile(join(folder, 'floppy.img'), floppy);
  let address = ramdisk;
  const placed = archives.map((file, index) => {
    const at = { file, address };
    address += sizes[index] ?? 0;
    return at;
  });
  const images = [
    { file: 'low.bin', address: SETUP_BASE },
    { file: 'kernel.bin', address: KERNEL_BASE },
    ...placed,
  ];
  return { kind: 'memory', floppy: 'floppy.img', images };
}

/** What the last "mem=" leaves the kernel, which finds a ramdisk only below that. */
function memoryLimitMiB(commandLine: string): number {
  const last = [...commandLine.matchAll(/(?:^|\s)mem=(\d+)([MG])(?=\s|$)/gi)].at(-1);
  if (!last) return Number.POSITIVE_INFINITY;
  return Number(last[1]) * (last[2]!.toUpperCase() === 'G' ? 1024 : 1);
}
