// SPDX-License-Identifier: Apache-2.0
import { LabError } from './errors.ts';

// Offsets in the kernel's setup header: Linux documentation, arch/x86/boot.rst.
const SETUP_SECTORS = 0x1f1;
const VIDEO_MODE = 0x1fa;
const MAGIC = 0x202;
const VERSION_TEXT = 0x20e;
const LOADER_TYPE = 0x210;
const LOAD_FLAGS = 0x211;
const RAMDISK_ADDRESS = 0x218;
const RAMDISK_SIZE = 0x21c;
const HEAP_END = 0x224;
const COMMAND_LINE = 0x228;
const RAMDISK_MAX = 0x22c;
const COMMAND_LINE_MAX = 0x238;

const CAN_USE_HEAP = 0x80;
const SECTOR = 512;
const MIB = 1 << 20;

/** Where the real-mode part lies, and, from it, the command line, a used-up mark and the end of its heap. */
export const SETUP_BASE = 0x90000;
export const KERNEL_BASE = 0x100000;
const COMMAND_LINE_OFFSET = 0xe000;
const MARK_OFFSET = 0xeff0;
const LOW_SIZE = 0xf000;
/** The BIOS keeps its ACPI tables in the last pages of memory. */
const TOP_RESERVE = 16 * MIB;

export interface LinuxImage {
  /** As `uname -r` will say. */
  readonly release: string;
  readonly bytes: Buffer;
}

/** @throws LabError when the file is not an x86 Linux kernel image */
export function readLinuxImage(bytes: Buffer, path: string): LinuxImage {
  const advice =
    'give a bzImage (arch/x86/boot/bzImage, or vmlinuz of a package), not vmlinux and not a package file';
  if (bytes.length < 0x8000 || bytes.toString('latin1', MAGIC, MAGIC + 4) !== 'HdrS') {
    throw new LabError('this is not a Linux kernel', `${path} has no bzImage header`, advice);
  }
  if (bytes.readUInt16LE(0x206) < 0x20a) {
    throw new LabError(
      'this kernel is too old for the lab',
      `${path} has a boot protocol before 2.10`,
      advice,
    );
  }
  const text = bytes.readUInt16LE(VERSION_TEXT) + SECTOR;
  const end = bytes.indexOf(0, text);
  const release = bytes.toString('latin1', text, end).split(' ')[0];
  return { release: release || 'unknown', bytes };
}

export interface BootImages {
  /** Real-mode setup code, command line and mark, for SETUP_BASE. */
  readonly low: Buffer;
  /** The kernel proper, for KERNEL_BASE. */
  readonly kernel: Buffer;
  /** Physical address for the initramfs. */
  readonly ramdisk: number;
  /** A floppy whose boot sector jumps into the setup code. */
  readonly floppy: Buffer;
}

/**
 * Lays a kernel out in memory as a boot loader would leave it (the 16-bit boot protocol). The emulator puts the
 * parts in place by itself: reading a large initramfs through the BIOS takes far longer than booting.
 */
export function bootImages(
  image: LinuxImage,
  commandLine: string,
  ramdiskSize: number,
  memoryBytes: number,
): BootImages {
  const { bytes } = image;
  const setupSize = ((bytes[SETUP_SECTORS] || 4) + 1) * SECTOR;
  const limit = Math.min(bytes.readUInt32LE(COMMAND_LINE_MAX), MARK_OFFSET - COMMAND_LINE_OFFSET - 1);
  if (Buffer.byteLength(commandLine) > limit) {
    throw new LabError(
      'the kernel arguments are too long',
      `this kernel takes ${limit} bytes`,
      'shorten --append',
    );
  }
  const top = Math.min(memoryBytes - TOP_RESERVE, bytes.readUInt32LE(RAMDISK_MAX));
  const ramdisk = Math.floor((top - ramdiskSize) / 4096) * 4096;
  if (ramdisk < 256 * MIB) {
    const needed = Math.ceil((256 * MIB + ramdiskSize + TOP_RESERVE) / MIB);
    throw new LabError(
      'the machine has too little memory',
      `this run needs ${needed} MiB`,
      'give it more memory',
    );
  }
  const low = Buffer.alloc(LOW_SIZE);
  bytes.copy(low, 0, 0, setupSize);
  low.writeUInt16LE(0xffff, VIDEO_MODE);
  low[LOADER_TYPE] = 0xff;
  low[LOAD_FLAGS] = (low[LOAD_FLAGS] ?? 0) | CAN_USE_HEAP;
  low.writeUInt32LE(ramdisk, RAMDISK_ADDRESS);
  low.writeUInt32LE(ramdiskSize, RAMDISK_SIZE);
  low.writeUInt16LE(COMMAND_LINE_OFFSET - 0x200, HEAP_END);
  low.writeUInt32LE(SETUP_BASE + COMMAND_LINE_OFFSET, COMMAND_LINE);
  low.write(`${commandLine}\0`, COMMAND_LINE_OFFSET);
  low[MARK_OFFSET] = 1;
  return { low, kernel: bytes.subarray(setupSize), ramdisk, floppy: bootFloppy() };
}

/**
 * Enters the kernel's setup code, once: after a reset of the machine the images in memory are used up, so the
 * second time it powers the emulator off instead (Bochs ends when "Shutdown" is written to port 0x8900).
 */
function bootFloppy(): Buffer {
  const segment = SETUP_BASE >> 4;
  const word = (value: number): number[] => [value & 0xff, value >> 8];
  const code = [
    0xfa, // cli
    0xb8,
    ...word(segment), // mov ax, segment
    0x8e,
    0xd8, // mov ds, ax
    0x8e,
    0xc0, // mov es, ax
    0x8e,
    0xe0, // mov fs, ax
    0x8e,
    0xe8, // mov gs, ax
    0x8e,
    0xd0, // mov ss, ax
    0xbc,
    ...word(COMMAND_LINE_OFFSET), // mov sp, top of the heap
    0xfe,
    0x0e,
    ...word(MARK_OFFSET), // dec byte [mark]
    0x75,
    0x05, // jnz off
    0xea,
    0x00,
    0x00,
    ...word(segment + 0x20), // jmp segment+0x20:0
    // off: send the text at cs:0 + 0x7c00 + 0x40
    0x31,
    0xc0, // xor ax, ax
    0x8e,
    0xd8, // mov ds, ax
    0xbe,
    ...word(0x7c00 + 0x40), // mov si, text
    0xba,
    ...word(0x8900), // mov dx, port
    0xb9,
    ...word(8), // mov cx, 8
    0xfc, // cld
    0xac, // next: lodsb
    0xee, // out dx, al
    0xe2,
    0xfc, // loop next
    0xf4, // hlt
    0xeb,
    0xfd, // jmp to the hlt
  ];
  const floppy = Buffer.alloc(1_474_560);
  floppy.set(code, 0);
  floppy.write('Shutdown', 0x40, 'latin1');
  floppy.writeUInt16LE(0xaa55, 510);
  return floppy;
}
