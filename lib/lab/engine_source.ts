// SPDX-License-Identifier: Apache-2.0
import { createHash } from 'node:crypto';

/** One correction of the emulator's source: `find` must occur in the file exactly once. */
export interface SourceEdit {
  readonly file: string;
  readonly why: string;
  readonly find: string;
  readonly replace: string;
}

/**
 * A byte written into this page, where a ROM could be, asks the emulator for a snapshot, which it leaves in a folder
 * of the run's. No port: Debian's cloud kernels let nobody but the kernel near those.
 */
export const SNAPSHOT_PAGE = 0xdf000;
export const SNAPSHOT_FOLDER = 'snapshot';
/** Its name until it is whole; where that exists already none is made. */
export const SNAPSHOT_PART = 'snapshot.part';

export const SOURCE_EDITS: readonly SourceEdit[] = [
  {
    file: 'cpu/init.cc',
    why: 'RDRAND must not depend on the second in which the emulator started: runs repeat exactly',
    find: 'srand(time(NULL));',
    replace: 'srand(1);',
  },
  {
    file: 'cpu/vmx.cc',
    why: 'a posted-interrupt descriptor is 64-byte aligned (SDM 27.2.1.1), not page aligned; KVM puts it anywhere',
    find: 'if (! IsValidPageAlignedPhyAddr(vm->pid_addr)) {',
    replace: 'if (! IsValidPhyAddr(vm->pid_addr) || (vm->pid_addr & 0x3f) != 0) {',
  },
  {
    file: 'memory/misc_mem.cc',
    why: 'a memory image longer than one block must be read block by block: blocks need not be neighbours',
    find: 'ret = read(fd, (bx_ptr_t) BX_MEM_THIS get_vector(offset), size);',
    replace: `unsigned long room = BX_MEM_THIS block_size - (offset & (BX_MEM_THIS block_size - 1));
    ret = read(fd, (bx_ptr_t) BX_MEM_THIS get_vector(offset), size < room ? size : room);`,
  },
  {
    file: 'cpu/vmx.cc',
    why: 'with external-interrupt exiting the IF of an entered guest blocks no interrupt (SDM 26.2)',
    find: 'BX_CPU_THIS_PTR in_vmx_guest = true;',
    replace: `BX_CPU_THIS_PTR in_vmx_guest = true;
  handleInterruptMaskChange();`,
  },
  {
    file: 'cpu/event.cc',
    why: 'a virtual interrupt that the guest has masked stays pending when a physical one arrives (SDM 30.2.2)',
    find: 'if (is_pending(BX_EVENT_PENDING_VMX_VIRTUAL_INTR)) {',
    replace: 'if (is_unmasked_event_pending(BX_EVENT_PENDING_VMX_VIRTUAL_INTR)) {',
  },
  {
    file: 'cpu/icache.h',
    why: 'decoded instructions are found by the low bits of their address: two that are 64 KiB apart drive each other out',
    find: '#define BxICacheEntries (64  * 1024)',
    replace: '#define BxICacheEntries (1024 * 1024)',
  },
  {
    file: 'cpu/icache.h',
    why: 'when the pool of decoded instructions is full all of them go',
    find: '#define BxICacheMemPool (576 * 1024)',
    replace: '#define BxICacheMemPool (2048 * 1024)',
  },
  {
    file: 'cpu/event.cc',
    why: 'nothing can wake a halted single CPU before the next timer event: go there in one step',
    find: 'BX_TICKN(10); // when in HLT run time faster for single CPU',
    replace: 'BX_TICKN(bx_pc_system.getNumCpuTicksLeftNextEvent());',
  },
  {
    file: 'cpu/vapic.cc',
    why: 'a VM exit while a virtual interrupt is delivered reports its vector (SDM 28.2.4)',
    find: `  clear_event(BX_EVENT_PENDING_VMX_VIRTUAL_INTR);

  BX_CPU_THIS_PTR EXT = 1; /* external event */
`,
    replace: `  clear_event(BX_EVENT_PENDING_VMX_VIRTUAL_INTR);

  vm->idt_vector_info = vector | (BX_EXTERNAL_INTERRUPT << 8);
  vm->idt_vector_error_code = 0;

  BX_CPU_THIS_PTR EXT = 1; /* external event */
`,
  },
  {
    file: 'main.cc',
    why: 'at a byte to its page the emulator writes down the state of the machine',
    find: `void bx_init_hardware()
{`,
    replace: `#include <sys/stat.h>
static int snapshot_timer;

// After the instruction, and after every other timer of the same tick: nothing is half done.
static bool ask_snapshot(bx_phy_address, unsigned, void *, void *)
{
  bx_pc_system.activate_timer(snapshot_timer, 1, 0);
  return true;
}

static bool read_nothing(bx_phy_address, unsigned length, void *data, void *)
{
  memset(data, 0xff, length);
  return true;
}

// Memory has its full length only when all of it could be written.
static void save_snapshot(void *)
{
  struct stat memory;
  if (mkdir("${SNAPSHOT_PART}", 0700) == 0 && SIM->save_state("${SNAPSHOT_PART}") &&
      stat("${SNAPSHOT_PART}/memory.ram", &memory) == 0 && Bit64u(memory.st_size) == BX_MEM(0)->get_memory_len())
    rename("${SNAPSHOT_PART}", "${SNAPSHOT_FOLDER}");
}

void bx_init_hardware()
{`,
  },
  {
    file: 'main.cc',
    why: 'the same: the last timer of all',
    find: '  DEV_init_devices();\n',
    replace: `  DEV_init_devices();
  snapshot_timer = bx_pc_system.register_timer(&snapshot_timer, save_snapshot, 1, 0, 0, "snapshot");
  DEV_register_memory_handlers(&snapshot_timer, read_nothing, ask_snapshot, ${SNAPSHOT_PAGE}, ${SNAPSHOT_PAGE + 0xfff});
`,
  },
  {
    file: 'gui/siminterface.cc',
    why: 'memory is read from where it was written down, not from a copy',
    find: `                    if (*fpp == NULL) {
                      *fpp = tmpfile64();
                    } else {
                      fseeko64(*fpp, 0, SEEK_SET);
                    }
                    if (*fpp != NULL) {
                      char *buffer = new char[4096];
                      while (!feof(fp2)) {`,
    replace: `                    *fpp = fopen64(devdata, "rb");
                    if (0) {
                      char *buffer = new char[4096];
                      while (!feof(fp2)) {`,
  },
  {
    file: 'memory/misc_mem.cc',
    why: 'of memory only pages that hold something are written down',
    find: `      if (1 != fwrite (BX_MEM(0)->blocks[idx], BX_MEM_THIS block_size, 1, fp))
        BX_PANIC(("FATAL ERROR: Could not write at 0x" FMT_PHY_ADDRX " in overflow file!", address));
    }
  }`,
    replace: `      for (Bit32u at = 0; at < BX_MEM_THIS block_size; at += 4096) {
        const Bit8u *page = BX_MEM(0)->blocks[idx] + at;
        if (page[0] == 0 && memcmp(page, page + 1, 4095) == 0) continue;
        if (pwrite(fileno(fp), page, 4096, address + at) != 4096) return;
      }
    }
  }
  if (ftruncate(fileno(fp), BX_MEM(0)->len) != 0) BX_ERROR(("memory could not be written down"));`,
  },
  {
    file: 'memory/misc_mem.cc',
    why: 'and read when the machine looks there',
    find: '      BX_MEM(0)->read_block(blk_index);\n',
    replace: `      if (mmap(BX_MEM(0)->blocks[blk_index], BX_MEM_THIS block_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
               fileno(BX_MEM(0)->overflow_file), Bit64u(blk_index) * BX_MEM_THIS block_size) == MAP_FAILED)
        BX_PANIC(("memory could not be mapped"));
`,
  },
  {
    file: 'memory/misc_mem.cc',
    why: 'the same',
    find: `BX_MEM_C::BX_MEM_C() : BX_MEMORY_STUB_C()
`,
    replace: `#include <sys/mman.h>

BX_MEM_C::BX_MEM_C() : BX_MEMORY_STUB_C()
`,
  },
];

export const CONFIGURE_OPTIONS: readonly string[] = [
  '--enable-cpu-level=6',
  '--enable-x86-64',
  '--enable-vmx=2',
  '--enable-svm',
  '--enable-avx',
  '--enable-evex',
  '--enable-all-optimizations',
  '--enable-pci',
  '--enable-smp',
  '--disable-debugger',
  '--disable-plugins',
  '--disable-docbook',
  '--with-nogui',
];
export const COMPILER_FLAGS = '-O3';

/** @throws Error when the text to replace is not there exactly once: then the source is not the one we know */
export function applyEdit(source: string, edit: SourceEdit): string {
  const count = source.split(edit.find).length - 1;
  if (count !== 1) {
    throw new Error(`${edit.file}: the text to correct occurs ${count} times instead of once (${edit.find})`);
  }
  return source.replace(edit.find, () => edit.replace);
}

/** Stands for everything a build is made from. */
export function buildKey(): string {
  const parts = JSON.stringify([SOURCE_EDITS, CONFIGURE_OPTIONS, COMPILER_FLAGS]);
  return createHash('sha256').update(parts).digest('hex').slice(0, 12);
}

export interface SourceFile {
  readonly version: string;
  readonly name: string;
  readonly size: number;
  readonly sha256: string;
}

/** Finds the upstream tarball of a given upstream version in the output of `apt-cache showsrc`. */
export function findTarball(showsrc: string, upstream: string): SourceFile | undefined {
  for (const record of showsrc.split(/\n(?=Package: )/)) {
    const version = /^Version: (.+)$/m.exec(record)?.[1];
    if (!version?.startsWith(`${upstream}-`)) continue;
    const sums = /^Checksums-Sha256:\s*\n((?: .+\n?)+)/m.exec(record)?.[1] ?? '';
    const line = sums.split('\n').map((text) => text.trim().split(/\s+/));
    const found = line.find((fields) => /\.orig\.tar\.\w+$/.test(fields[2] ?? ''));
    if (found) return { version, name: found[2]!, size: Number(found[1]), sha256: found[0]! };
  }
  return undefined;
}
