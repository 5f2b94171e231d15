// SPDX-License-Identifier: Apache-2.0
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Engine } from './engine.ts';
import { JOB_ROM, quote } from './init_script.ts';

export interface MachineParts {
  readonly bios: string;
  readonly videoBios: string;
  readonly memoryMiB: number;
  readonly cpus: number;
  /** Bochs's name of a CPU model. */
  readonly cpuModel: string;
  /** Port on this machine that com2 connects to; without it com2 goes into a file. */
  readonly terminalPort?: number | undefined;
  /** Seconds since 1970, or `utc` for the time outside. */
  readonly startTime: number | 'utc';
  /**
   * Files to place in memory with a floppy that starts them, a CD that boots by itself, or a snapshot: then a job in
   * a ROM.
   */
  readonly boot:
    | {
        readonly kind: 'memory';
        readonly floppy: string;
        readonly images: readonly { file: string; address: number }[];
      }
    | { readonly kind: 'cd'; readonly image: string }
    | { readonly kind: 'snapshot' };
}

/** The emulator takes no more of the host; a machine that touches more has the rest in a file. */
export const MOST_HOST_MIB = 2048;

/** Names of what the machine leaves in its folder. */
export const CONSOLE_FILE = 'console';
export const OUTPUT_FILE = 'output';
export const LOG_FILE = 'bochs.log';
/** Name of the job's ROM in its folder. */
export const ROM_FILE = 'job.rom';

/** The description of the machine, in Bochs's language. Paths are relative to the run's folder where they can be. */
export function machineDescription(parts: MachineParts, engine: Engine): string {
  const lines = [
    ...bootLines(parts.boot),
    // Memory is taken from the host in blocks as the machine touches it.
    `memory: guest=${parts.memoryMiB}, host=${Math.min(parts.memoryMiB, MOST_HOST_MIB)}${engine.memoryImages ? ', block_size=2048' : ''}`,
    `romimage: file=${parts.bios}, options=fastboot`,
    `vgaromimage: file=${parts.videoBios}`,
    `cpu: model=${parts.cpuModel}, count=${parts.cpus}, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1`,
    // Time is a function of executed instructions, and an idle CPU skips ahead: runs repeat exactly.
    `clock: sync=none, time0=${parts.startTime}`,
    'vga: realtime=0',
    'pci: enabled=1, chipset=i440fx',
    `display_library: ${engine.needsTerminal ? 'term' : 'nogui'}`,
    `com1: enabled=1, mode=file, dev=${CONSOLE_FILE}`,
    parts.terminalPort === undefined
      ? `com2: enabled=1, mode=file, dev=${OUTPUT_FILE}`
      : `com2: enabled=1, mode=socket-client, dev=127.0.0.1:${parts.terminalPort}`,
    'panic: action=fatal',
    // Logging more than that has been seen to deadlock the emulator.
    'error: action=ignore',
    'info: action=ignore',
    'debug: action=ignore',
    `log: ${LOG_FILE}`,
  ];
  return `${lines.join('\n')}\n`;
}

function bootLines(boot: MachineParts['boot']): string[] {
  switch (boot.kind) {
    case 'snapshot':
      return [
        // Before anything of theirs: without it they are there unless the machine continues from a state.
        'plugin_ctrl: unmapped=1, biosdev=1, speaker=1, extfpuirq=1, parallel=1, serial=1',
        `optromimage1: file=${ROM_FILE}, address=${JOB_ROM.address}`,
      ];
    case 'cd':
      return [
        'ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14',
        `ata0-master: type=cdrom, path=${boot.image}, status=inserted`,
        'boot: cdrom',
      ];
    case 'memory':
      return [
        `floppya: 1_44=${boot.floppy}, status=inserted`,
        'boot: floppy',
        ...boot.images.map(
          ({ file, address }, index) => `optramimage${index + 1}: file=${file}, address=${address}`,
        ),
      ];
  }
}

/**
 * The command that runs the emulator in the run's folder. However this process ends, the emulator ends too: the
 * kernel kills it with its parent, and `timeout` ends it at the latest after `limitSeconds`.
 *
 * @param snapshot folder of a state to continue from, instead of booting
 */
export async function engineCommand(
  engine: Engine,
  folder: string,
  limitSeconds: number,
  snapshot?: string,
): Promise<string[]> {
  const guard = ['setpriv', '--pdeathsig', 'TERM', 'timeout', '-k', '2', String(limitSeconds)];
  const withParent = ['setpriv', '--pdeathsig', 'KILL'];
  if (snapshot) return [...guard, ...withParent, engine.path, '-q', '-r', snapshot];
  if (!engine.needsTerminal) return [...guard, ...withParent, engine.path, '-q', '-f', 'bochsrc'];
  // The packaged emulator stops in its debugger first; "c" lets it go on.
  await writeFile(join(folder, 'commands'), 'c\n');
  const command = [...withParent, engine.path, '-q', '-f', 'bochsrc', '-rc', 'commands'].map(quote).join(' ');
  return [...guard, ...withParent, 'script', '-qfc', command, '/dev/null'];
}
