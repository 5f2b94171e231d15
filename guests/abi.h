/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host <-> L1 <-> L2 protocol: the one definition of every constant and record that crosses a level.
 *
 * Everything is a list (X-macro), so that the C types below, the table printed by abi_dump.c and
 * lib/guest/abi.ts cannot drift apart: test/guest/abi.test.ts compares names, values, offsets and sizes.
 *
 * Addresses in these records are guest-physical and equal L1's and L2's linear addresses: both levels run on
 * identity page tables, and L2's EPT is an identity map unless the host edits it.
 */
#ifndef NVMX_GUESTS_ABI_H
#define NVMX_GUESTS_ABI_H

#define NVMX_CONSTANTS(X)                                                                                    \
    X(ABI_MAGIC, 0x31786d766e756e31) /* L1 writes it into its CPU area when it is ready */                   \
    X(ABI_VERSION, 2)                                                                                        \
    X(L1_BASE, 0x100000)    /* load address of l1.elf */                                                     \
    X(L2_BASE, 0x200000)    /* load address of l2.elf, shared by all L2s */                                  \
    X(PORT_L1_DONE, 0xe00)  /* OUT by L1: ready, or a batch ended; data = commands executed */               \
    X(PORT_L1_FAULT, 0xe04) /* OUT by L1: an exception nothing recovers from; data = vector */               \
    X(PORT_L2_SYNC, 0xe08)  /* OUT by L2, not intercepted by L1; data = the sync value */                    \
    X(PORT_L2_FAULT, 0xe0c) /* OUT by L2: an exception in L2; data = vector */                               \
    X(SELECTOR_CODE, 0x08)                                                                                   \
    X(SELECTOR_DATA, 0x10)                                                                                   \
    X(SELECTOR_TSS, 0x18)                                                                                    \
    X(MAX_COMMANDS, 1024)                /* commands in a batch */                                           \
    X(EXIT_REASONS, 80)                  /* entries of the policy and count tables; others always return */  \
    X(CHECKSUM_SEED, 0xcbf29ce484222325) /* checksum = (checksum ^ value) * CHECKSUM_PRIME mod 2^64 */       \
    X(CHECKSUM_PRIME, 0x100000001b3)

/* What L1 does. Arguments in a[], results in r[]; see guests/l1/commands.c for each. */
#define NVMX_COMMANDS(X)                                                                                     \
    X(VMXON, 1) /* a0 region */                                                                              \
    X(VMXOFF, 2)                                                                                             \
    X(VMCLEAR, 3)        /* a0 VMCS, a1 L2 area whose launch state is reset, or 0 */                         \
    X(VMPTRLD, 4)        /* a0 VMCS */                                                                       \
    X(VMPTRST, 5)        /* r0 VMCS */                                                                       \
    X(VMREAD, 6)         /* a0 field encoding; r0 value */                                                   \
    X(VMWRITE, 7)        /* a0 field encoding, a1 value */                                                   \
    X(HOST_STATE, 8)     /* a0 L2 area, or 0: write the host-state area of its eVMCS, or of the current      \
                            VMCS, for this vCPU */                                                           \
    X(ENTER, 9)          /* a0 L2 area, a1 ENTER_*, a2 exits after which to return, 0 = no limit;            \
                            r0 exit reason, r1 entries done */                                               \
    X(INVEPT, 10)        /* a0 type, a1 EPTP */                                                              \
    X(INVVPID, 11)       /* a0 type, a1 VPID, a2 linear address */                                           \
    X(RDMSR, 12)         /* a0 index; r0 value */                                                            \
    X(WRMSR, 13)         /* a0 index, a1 value */                                                            \
    X(CPUID, 14)         /* a0 leaf, a1 subleaf; r0 EBX:EAX, r1 EDX:ECX */                                   \
    X(READ, 15)          /* a0 address, a1 bytes 1/2/4/8; r0 value */                                        \
    X(WRITE, 16)         /* a0 address, a1 bytes, a2 value */                                                \
    X(CALL, 17)          /* a0 address of a System V function, a1-a3 its arguments; r0 RAX. Not guarded */   \
    X(X2APIC_ENABLE, 18) /* x2APIC mode, software-enable the local APIC; r0 APIC id */                       \
    X(IPI, 19)           /* a0 ICR: destination in the high half */                                          \
    X(HALT, 20)          /* HLT with interrupts on, until an interrupt */                                    \
    X(SPIN, 21)          /* a0 address, a1 bytes, a2 value: PAUSE, interrupts on, until memory holds it */   \
    X(RDTSC, 22)         /* r0 TSC */

#define NVMX_COMMAND_STATES(X)                                                                               \
    X(STATUS_PENDING, 0)                                                                                     \
    X(STATUS_OK, 1)                                                                                          \
    X(STATUS_VMFAIL_INVALID, 2)                                                                              \
    X(STATUS_VMFAIL_VALID, 3) /* r0 VM-instruction error number */                                           \
    X(STATUS_FAULT, 4)        /* recovered exception: r0 vector, r1 error code, r2 RIP */                    \
    X(STATUS_BAD_COMMAND, 5)  /* unknown operation or argument */

#define NVMX_COMMAND_FLAGS(X)                                                                                \
    X(COMMAND_KEEP_GOING, 1) /* a failure of this command does not end the batch                             \
                              */

#define NVMX_ENTER_MODES(X)                                                                                  \
    X(ENTER_AUTO, 0) /* by the launch state kept in the L2 area */                                           \
    X(ENTER_LAUNCH, 1)                                                                                       \
    X(ENTER_RESUME, 2)

#define NVMX_POLICIES(X)                                                                                     \
    X(POLICY_RETURN, 0)  /* end the ENTER command */                                                         \
    X(POLICY_SKIP, 1)    /* GUEST_RIP += instruction length, VMRESUME */                                     \
    X(POLICY_RESUME, 2)  /* VMRESUME */                                                                      \
    X(POLICY_ADVANCE, 3) /* GUEST_RIP += instruction length, end the ENTER command */

/* What L2 does. Size in bytes where it says so; "fold" feeds the checksum. */
#define NVMX_L2_OPS(X)                                                                                       \
    X(OP_END, 0)          /* VMCALL for ever */                                                              \
    X(OP_READ, 1)         /* size, a address: fold */                                                        \
    X(OP_WRITE, 2)        /* size, a address, b value */                                                     \
    X(OP_RDMSR, 3)        /* a index: fold */                                                                \
    X(OP_WRMSR, 4)        /* a index, b value */                                                             \
    X(OP_IN, 5)           /* size 1/2/4, a port: fold */                                                     \
    X(OP_OUT, 6)          /* size 1/2/4, a port, b value */                                                  \
    X(OP_CPUID, 7)        /* a leaf, b subleaf: fold EAX, EBX, ECX, EDX */                                   \
    X(OP_READ_CR8, 8)     /* fold */                                                                         \
    X(OP_WRITE_CR8, 9)    /* a value */                                                                      \
    X(OP_VMCALL, 10)      /* a value in RAX */                                                               \
    X(OP_VMCALL_REGS, 11) /* a seed: fill the GPRs, VMCALL, fold what came back */                           \
    X(OP_HLT, 12)                                                                                            \
    X(OP_SPIN, 13)     /* size, a address, b value: PAUSE until memory holds it */                           \
    X(OP_DELAY, 14)    /* a TSC ticks */                                                                     \
    X(OP_PAUSE, 15)    /* a PAUSE instructions */                                                            \
    X(OP_LOOP, 16)     /* a operation index, b times: jump back b times, then go on; c is the counter */     \
    X(OP_FOLD, 17)     /* a value: fold */                                                                   \
    X(OP_CHECKSUM, 18) /* a address, b count of 8-byte words: fold each */                                   \
    X(OP_SYNC, 19)     /* a value: OUT to PORT_L2_SYNC */                                                    \
    X(OP_CALL, 20)     /* a address of a System V function, b and c its arguments: fold RAX */               \
    X(OP_CLI, 21)                                                                                            \
    X(OP_STI, 22)

#define NVMX_LEVELS(X)                                                                                       \
    X(LEVEL_L1, 1)                                                                                           \
    X(LEVEL_L2, 2)

/* An exception; count tells a new one from an old one. */
#define NVMX_FAULT_FIELDS(F)                                                                                 \
    F(fault, u64, count, )                                                                                   \
    F(fault, u32, level, )                                                                                   \
    F(fault, u32, vector, )                                                                                  \
    F(fault, u64, error_code, )                                                                              \
    F(fault, u64, rip, )                                                                                     \
    F(fault, u64, rsp, )                                                                                     \
    F(fault, u64, rflags, )                                                                                  \
    F(fault, u64, cr2, )

#define NVMX_COMMAND_FIELDS(F)                                                                               \
    F(command, u16, op, )                                                                                    \
    F(command, u16, flags, )                                                                                 \
    F(command, u32, status, )                                                                                \
    F(command, u64, a, [4])                                                                                  \
    F(command, u64, r, [3])

/* One page per L1 vCPU; L1 keeps its address in GS.base. "host:" fields are set before the first run. */
#define NVMX_CPU_FIELDS(F)                                                                                   \
    F(cpu, u64, recover, )       /* L1 only: where a guarded instruction continues after an exception */     \
    F(cpu, u64, frame_scratch, ) /* L1 only; frame_*: HOST_RSP points at frame_l2, see enter.S */            \
    F(cpu, u64, frame_l2, )                                                                                  \
    F(cpu, u64, frame_rsp, )                                                                                 \
    F(cpu, u64, stack_top, ) /* host: */                                                                     \
    F(cpu, u64, self, )      /* L1 only */                                                                   \
    F(cpu, u64, magic, )                                                                                     \
    F(cpu, u32, version, )                                                                                   \
    F(cpu, u32, index, )       /* host: */                                                                   \
    F(cpu, u64, commands, )    /* host: address of MAX_COMMANDS command records */                           \
    F(cpu, u32, batch_count, ) /* host: commands to execute */                                               \
    F(cpu, u32, batch_done, )  /* commands executed */                                                       \
    F(cpu, u64, ist_top, )     /* host: stack for #DF and NMI */                                             \
    F(cpu, u32, x2apic, )                                                                                    \
    F(cpu, u32, reserved, )                                                                                  \
    F(cpu, struct nvmx_fault, fault, )                                                                       \
    F(cpu, u64, gdt, [8])                                                                                    \
    F(cpu, u8, tss, [104])                                                                                   \
    F(cpu, u32, irq_counts, [256]) /* interrupts and NMIs taken, by vector */                                \
    F(cpu, u64, evmcs_map, )       /* host: where the fields of an eVMCS are, see vmcs.c; or 0 */

/* What a VM exit left, read from the current VMCS when ENTER returns. */
#define NVMX_EXIT_FIELDS(F)                                                                                  \
    F(exit, u32, reason, ) /* all 32 bits */                                                                 \
    F(exit, u32, intr_info, )                                                                                \
    F(exit, u32, intr_error_code, )                                                                          \
    F(exit, u32, idt_vectoring_info, )                                                                       \
    F(exit, u32, idt_vectoring_error_code, )                                                                 \
    F(exit, u32, instruction_length, )                                                                       \
    F(exit, u32, instruction_info, )                                                                         \
    F(exit, u32, activity_state, )                                                                           \
    F(exit, u32, interruptibility, )                                                                         \
    F(exit, u32, reserved, )                                                                                 \
    F(exit, u64, qualification, )                                                                            \
    F(exit, u64, guest_linear_address, )                                                                     \
    F(exit, u64, guest_physical_address, )                                                                   \
    F(exit, u64, rip, )                                                                                      \
    F(exit, u64, rsp, )                                                                                      \
    F(exit, u64, rflags, )                                                                                   \
    F(exit, u64, cr0, )                                                                                      \
    F(exit, u64, cr3, )                                                                                      \
    F(exit, u64, cr4, )

/* One page per L2, used by L1: registers in instruction-encoding order (RSP's slot is unused). */
#define NVMX_L2_FIELDS(F)                                                                                    \
    F(l2, u64, regs, [16])                                                                                   \
    F(l2, u32, launched, )                                                                                   \
    F(l2, u32, reserved, )                                                                                   \
    F(l2, u64, entries, )     /* VM entries that succeeded, since the L2 was made */                         \
    F(l2, u64, other_exits, ) /* exits whose basic reason is >= EXIT_REASONS */                              \
    F(l2, u64, tsc_min, )     /* TSC from just before an entry to just after its exit */                     \
    F(l2, u64, tsc_max, )                                                                                    \
    F(l2, u64, tsc_total, )                                                                                  \
    F(l2, struct nvmx_exit, exit, )                                                                          \
    F(l2, u8, policy, [80])                                                                                  \
    F(l2, u64, counts, [80])    /* exits by basic reason, since the L2 was made */                           \
    F(l2, u64, samples, )       /* host: address of u32 ticks, one for each entry as in tsc_*; 0 for none */ \
    F(l2, u64, samples_room, )  /* host: how many fit */                                                     \
    F(l2, u64, samples_count, ) /* taken so far, beyond the room too */                                      \
    F(l2, u64, evmcs, )         /* host: address of its enlightened VMCS, or 0 */

#define NVMX_OP_FIELDS(F)                                                                                    \
    F(op, u32, code, )                                                                                       \
    F(op, u32, size, )                                                                                       \
    F(op, u64, a, )                                                                                          \
    F(op, u64, b, )                                                                                          \
    F(op, u64, c, )

/* One page per L2, used by L2: proof of execution; L2 keeps its address in GS.base. */
#define NVMX_CONTROL_FIELDS(F)                                                                               \
    F(control, u64, self, )     /* host: its own address */                                                  \
    F(control, u64, ops, )      /* host: address of the operation list */                                    \
    F(control, u32, pc, )       /* index of the operation being executed */                                  \
    F(control, u32, done, )     /* 1 at OP_END */                                                            \
    F(control, u64, executed, ) /* operations completed */                                                   \
    F(control, u64, folds, )    /* values folded into the checksum */                                        \
    F(control, u64, checksum, )                                                                              \
    F(control, u64, last, ) /* the value folded last */                                                      \
    F(control, struct nvmx_fault, fault, )                                                                   \
    F(control, u32, irq_counts, [256])                                                                       \
    F(control, u64, eoi, ) /* host: after an interrupt 0 nothing, 1 WRMSR of the x2APIC's EOI register,      \
                              else the address of an APIC page whose EOI register is written */

/* What a loop of guests/l2/bench.c works on; all of it set by the host. */
#define NVMX_BENCH_FIELDS(F)                                                                                 \
    F(bench, u64, samples, ) /* timed loops: address of u32 ticks, one for each turn */                      \
    F(bench, u64, turns, )   /* timed loops: how many */                                                     \
    F(bench, u64, operand, ) /* timed loops: MSR index or port */                                            \
    F(bench, u64, start, )   /* touching loops: address of the first page */                                 \
    F(bench, u64, pages, )   /* how many there are; after the last comes the first again */                  \
    F(bench, u64, share, )   /* how many of them one call touches */                                         \
    F(bench, u64, next, )    /* the page touched next */                                                     \
    F(bench, u64, touched, ) /* since the host set it to 0 */                                                \
    F(bench, u64, round, )   /* write and check: calls so far */                                             \
    F(bench, u64, wrong, )   /* write and check: words that were not what the host had written */

#define NVMX_RECORDS(R)                                                                                      \
    R(fault, NVMX_FAULT_FIELDS)                                                                              \
    R(command, NVMX_COMMAND_FIELDS)                                                                          \
    R(cpu, NVMX_CPU_FIELDS)                                                                                  \
    R(exit, NVMX_EXIT_FIELDS)                                                                                \
    R(l2, NVMX_L2_FIELDS)                                                                                    \
    R(op, NVMX_OP_FIELDS)                                                                                    \
    R(control, NVMX_CONTROL_FIELDS)                                                                          \
    R(bench, NVMX_BENCH_FIELDS)

#define NVMX_ALL_CONSTANTS(X)                                                                                \
    NVMX_CONSTANTS(X)                                                                                        \
    NVMX_COMMANDS(X)                                                                                         \
    NVMX_COMMAND_STATES(X)                                                                                   \
    NVMX_COMMAND_FLAGS(X)                                                                                    \
    NVMX_ENTER_MODES(X)                                                                                      \
    NVMX_POLICIES(X)                                                                                         \
    NVMX_L2_OPS(X)                                                                                           \
    NVMX_LEVELS(X)

/* Assembly cannot use offsetof: these are checked against the records in guests/l1/main.c. */
#define NVMX_CPU_RECOVER 0
#define NVMX_CPU_FRAME_L2 16
#define NVMX_CPU_FRAME_RSP 24
#define NVMX_CPU_STACK_TOP 32

#ifndef __ASSEMBLER__

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define NVMX_X(name, value) NVMX_##name = value,
enum nvmx_constant { NVMX_ALL_CONSTANTS(NVMX_X) };
#undef NVMX_X

#define NVMX_F(record, type, name, array) type name array;
#define NVMX_R(record, fields)                                                                               \
    struct nvmx_##record {                                                                                   \
        fields(NVMX_F)                                                                                       \
    };
NVMX_RECORDS(NVMX_R)
#undef NVMX_R
#undef NVMX_F

#endif
#endif
