/* SPDX-License-Identifier: Apache-2.0 */
/* Start-up, exceptions and the command loop of one L1 vCPU. */
#include "l1.h"

#define CPU_OFFSET(field) __builtin_offsetof(struct nvmx_cpu, field)
_Static_assert(CPU_OFFSET(recover) == NVMX_CPU_RECOVER && NVMX_CPU_RECOVER == 0, "vmx.h, enter.S");
_Static_assert(CPU_OFFSET(frame_l2) == NVMX_CPU_FRAME_L2, "enter.S");
_Static_assert(CPU_OFFSET(frame_rsp) == NVMX_CPU_FRAME_RSP, "enter.S");
_Static_assert(CPU_OFFSET(stack_top) == NVMX_CPU_STACK_TOP, "enter.S");
_Static_assert(sizeof(struct nvmx_cpu) <= 4096, "one page per vCPU");
_Static_assert(sizeof(struct nvmx_l2) <= 4096, "one page per L2");
_Static_assert(sizeof(struct nvmx_command) == 64, "no padding");
_Static_assert(NVMX_STATUS_VMFAIL_INVALID == 2 && NVMX_STATUS_VMFAIL_VALID == 3 && NVMX_STATUS_FAULT == 4,
               "enter.S");
_Static_assert(NVMX_SELECTOR_CODE == 0x08, "vectors.S");
_Static_assert(IMAGE_BASE == NVMX_L1_BASE, "CMakeLists.txt");

#define MSR_GS_BASE 0xc0000101
#define MSR_X2APIC_EOI 0x80b
#define SPURIOUS_VECTOR 0xff
#define NMI_VECTOR 2

void restart(struct nvmx_cpu *cpu) __attribute__((noreturn));
void serve(struct nvmx_cpu *cpu) __attribute__((noreturn));
void l1_main(struct nvmx_cpu *cpu) __attribute__((noreturn));
void trap(struct trap_frame *frame);

void trap(struct trap_frame *frame) {
    struct nvmx_cpu *cpu = this_cpu();

    if (frame->vector == NMI_VECTOR || frame->vector >= 32) {
        cpu->irq_counts[frame->vector]++;
        if (cpu->x2apic && frame->vector >= 32 && frame->vector != SPURIOUS_VECTOR)
            wrmsr(MSR_X2APIC_EOI, 0);
        return;
    }

    record_fault(&cpu->fault, NVMX_LEVEL_L1, frame);
    if (cpu->recover) {
        frame->rip = cpu->recover;
        cpu->recover = 0;
        return;
    }
    out32(NVMX_PORT_L1_FAULT, (u32)frame->vector);
    restart(cpu);
}

/* The host reads the results of a batch, and writes the next one, while L1 stands at the OUT. */
void serve(struct nvmx_cpu *cpu) {
    struct nvmx_command *commands = (struct nvmx_command *)cpu->commands;

    for (;;) {
        u32 count, done;

        out32(NVMX_PORT_L1_DONE, cpu->batch_done);
        count = cpu->batch_count;
        if (count > NVMX_MAX_COMMANDS)
            count = NVMX_MAX_COMMANDS;
        cpu->batch_done = 0;
        for (done = 0; done < count;) {
            struct nvmx_command *command = &commands[done];

            command->status = execute(cpu, command);
            if (command->status == NVMX_STATUS_FAULT) {
                command->r[0] = cpu->fault.vector;
                command->r[1] = cpu->fault.error_code;
                command->r[2] = cpu->fault.rip;
            }
            cpu->batch_done = ++done;
            if (command->status != NVMX_STATUS_OK && !(command->flags & NVMX_COMMAND_KEEP_GOING))
                break;
        }
    }
}

static void load_tables(struct nvmx_cpu *cpu) {
    const u64 tss = (u64)cpu->tss;
    const struct table_register gdtr = {sizeof(cpu->gdt) - 1, (u64)cpu->gdt};
    const struct table_register idtr = {256 * 16 - 1, (u64)idt};

    *(u64 *)(cpu->tss + 36) = cpu->ist_top; /* IST1 */
    *(u16 *)(cpu->tss + 102) = sizeof(cpu->tss);
    cpu->gdt[0] = 0;
    cpu->gdt[NVMX_SELECTOR_CODE / 8] = 0x00af9b000000ffff; /* 64-bit code, accessed */
    cpu->gdt[NVMX_SELECTOR_DATA / 8] = 0x00cf93000000ffff; /* flat data, accessed */
    cpu->gdt[NVMX_SELECTOR_TSS / 8] =
        (sizeof(cpu->tss) - 1) | (tss & 0xffffff) << 16 | 0x89ull << 40 | (tss >> 24 & 0xff) << 56;
    cpu->gdt[NVMX_SELECTOR_TSS / 8 + 1] = tss >> 32;

    asm volatile("lgdt %0" ::"m"(gdtr));
    asm volatile("lidt %0" ::"m"(idtr));
    asm volatile("ltr %w0" ::"r"((u32)NVMX_SELECTOR_TSS));
}

void l1_main(struct nvmx_cpu *cpu) {
    cpu->self = (u64)cpu;
    wrmsr(MSR_GS_BASE, (u64)cpu);
    load_tables(cpu);
    cpu->version = NVMX_ABI_VERSION;
    cpu->magic = NVMX_ABI_MAGIC;
    restart(cpu);
}
