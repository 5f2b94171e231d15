// SPDX-License-Identifier: Apache-2.0
import { stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { type MachineParts, MOST_HOST_MIB, machineDescription, ROM_FILE } from './bochs.ts';
import { checkCpuModel, DEFAULT_CPU, type Engine } from './engine.ts';
import { buildKey } from './engine_source.ts';
import { initScript, JOB_ARCHIVE, PACKAGE_FOLDER } from './init_script.ts';
import { writeBootCd } from './iso.ts';
import { jobArchive, jobRom, type PackedProgram } from './job.ts';
import type { LabKernel } from './kernel.ts';
import { bootImages, KERNEL_BASE, SETUP_BASE } from './linux_image.ts';
import type { LabOptions } from './machine.ts';
import { packedArguments, packModules, waitingArguments } from './pack.ts';
import { debianFile } from './packages.ts';
import { contentsOf, nodeArchive, PACKAGE_ROOT, packageFiles, writeBase } from './payload.ts';
import { findSnapshot, refuseSnapshot, type Snapshot, SnapshotKeeper, snapshotKey } from './snapshot.ts';

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
/** Its place in the machine. */
export const NODE = '/usr/bin/node';
const MIB = 1 << 20;
/** 2026-01-01, in seconds: where the clock of a deterministic run starts. */
const FIXED_DATE = 1_767_225_600;

export interface BootRequest {
  readonly mark: string;
  readonly command: readonly string[];
  readonly options: LabOptions;
  readonly engine: Engine;
  readonly kernel: LabKernel;
  /** Of the terminal's line. */
  readonly port: number | undefined;
}

/** What the run's folder was prepared for: to continue from a snapshot, or to boot and perhaps leave one. */
export interface Boot {
  readonly snapshot?: Snapshot;
  readonly keeper?: SnapshotKeeper | undefined;
}

/** Writes into the run's folder what the emulator needs to run this job. */
export async function prepareBoot(folder: string, request: BootRequest): Promise<Boot> {
  const { mark, command, options, engine, kernel, port } = request;
  const { env = {}, fetch = [], terminal } = options;
  const program = programOf(command, options);
  const { rows = 24, columns = 80 } = terminal ?? {};
  const isKept = keepsSnapshot(options, engine);
  // In every snapshot, so that one serves all.
  const pack = program || isKept ? await packModules(PACKAGE_ROOT, PACKAGE_FOLDER, options) : undefined;
  const waiting = pack && program && isKept ? options.preload : undefined;
  const job = await jobArchive(
    folder,
    {
      mark,
      command:
        pack && program ? [NODE, ...packedArguments(PACKAGE_FOLDER, program.entry, program.args)] : command,
      env,
      fetch,
      terminal: terminal && { rows, columns },
      time: options.deterministic ? undefined : Math.floor(Date.now() / 1000),
      files: options.files ?? {},
      program,
      waiting: waiting !== undefined,
    },
    options,
  );
  const init = initScript(waiting && [NODE, ...waitingArguments(PACKAGE_FOLDER, waiting)]);
  const memoryMiB = options.memoryMiB ?? 1024;
  const commandLine = commandLineOf(options, engine, memoryMiB);
  const node = await nodeArchive();
  const contents = await contentsOf(await packageFiles(), options);
  const made = Object.fromEntries(
    Object.entries(pack ?? {}).map(([name, data]) => [join(PACKAGE_FOLDER, name), data]),
  );
  const parts = {
    bios: await debianFile(BIOS, 'bochsbios', options),
    videoBios: await debianFile(VIDEO_BIOS, 'vgabios', options),
    memoryMiB,
    startTime: options.deterministic ? FIXED_DATE : ('utc' as const),
    cpus: options.cpus ?? 1,
    cpuModel: await checkCpuModel(engine, options.engineCpu ?? DEFAULT_CPU, options),
    terminalPort: port,
  };
  const rom = isKept ? jobRom(job) : undefined;
  const config = machineDescription({ ...parts, boot: { kind: 'snapshot' } }, engine);
  const key =
    rom &&
    snapshotKey([
      buildKey(),
      config,
      commandLine,
      node.key,
      init,
      kernel.image.bytes,
      ...kernel.modules.flatMap(({ name, data }) => [name, data]),
      ...Object.entries({ ...contents, ...made }).flat(),
    ]);
  const snapshot = key && (await findSnapshot(key, options));
  if (rom && snapshot) {
    await writeFile(join(folder, ROM_FILE), rom);
    return { snapshot };
  }
  const base = join(folder, 'base.cpio');
  await writeBase(base, init, kernel.modules, { ...contents, ...made, [JOB_ARCHIVE]: job }, options);
  const archives = [await node.file(options), base];
  const boot = engine.memoryImages
    ? await memoryBoot(folder, kernel, archives, commandLine, memoryMiB)
    : ({
        kind: 'cd',
        image: await writeBootCd(folder, kernel.image.bytes, archives, commandLine, options),
      } as const);
  await writeFile(join(folder, 'bochsrc'), machineDescription({ ...parts, boot }, engine));
  if (key) return { keeper: await SnapshotKeeper.start(folder, key, config) };
  await refuseSnapshot(folder);
  return {};
}

/** A program of the package itself, which starts from a pack. */
function programOf(
  [node, entry = '', ...args]: readonly string[],
  options: LabOptions,
): PackedProgram | undefined {
  return node === NODE && entry.startsWith('dist/') ? { entry, args, text: options.program } : undefined;
}

/** Only our engine makes them, and not of a machine whose memory is partly in a file. */
function keepsSnapshot(
  { cold, deterministic, terminal, memoryMiB = 0 }: LabOptions,
  engine: Engine,
): boolean {
  return engine.kind === 'built' && !cold && !deterministic && !terminal && memoryMiB <= MOST_HOST_MIB;
}

function commandLineOf({ append = '' }: LabOptions, engine: Engine, memoryMiB: number): string {
  const roomy = Math.min(memoryMiB, memoryLimitMiB(append)) >= ROOMY_MIB;
  return [
    ...KERNEL_ARGUMENTS,
    ...(roomy ? [ROOMY_ARGUMENT] : []),
    ...(engine.apicv ? [] : ['kvm_intel.enable_apicv=0']),
    ...(append === '' ? [] : [append]),
  ].join(' ');
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
