/* SPDX-License-Identifier: Apache-2.0 */
/* The operations of abi.h. */
#include "l2.h"

static u64 do_in(const struct nvmx_op *op) {
    u16 port = (u16)op->a;

    return op->size == 1 ? in8(port) : op->size == 2 ? in16(port) : in32(port);
}

static void do_out(const struct nvmx_op *op) {
    u16 port = (u16)op->a;

    if (op->size == 1)
        out8(port, (u8)op->b);
    else if (op->size == 2)
        out16(port, (u16)op->b);
    else
        out32(port, (u32)op->b);
}

static void do_cpuid(struct nvmx_control *control, const struct nvmx_op *op) {
    u32 out[4];

    cpuid((u32)op->a, (u32)op->b, out);
    for (u32 i = 0; i < 4; i++)
        fold(control, out[i]);
}

static void do_vmcall_regs(struct nvmx_control *control, const struct nvmx_op *op) {
    u64 out[16];

    vmcall_regs(op->a, out);
    for (u32 i = 0; i < 16; i++)
        if (i != 4)
            fold(control, out[i]);
}

static void do_delay(u64 ticks) {
    u64 start = rdtsc();

    while (rdtsc() - start < ticks)
        asm volatile("pause");
}

u32 perform(struct nvmx_control *control, struct nvmx_op *op) {
    const u32 next = control->pc + 1;
    u64 value;

    switch (op->code) {
    case NVMX_OP_READ: fold(control, load(op->a, op->size)); break;
    case NVMX_OP_WRITE: store(op->a, op->size, op->b); break;
    case NVMX_OP_RDMSR: fold(control, rdmsr((u32)op->a)); break;
    case NVMX_OP_WRMSR: wrmsr((u32)op->a, op->b); break;
    case NVMX_OP_IN: fold(control, do_in(op)); break;
    case NVMX_OP_OUT: do_out(op); break;
    case NVMX_OP_CPUID: do_cpuid(control, op); break;
    case NVMX_OP_READ_CR8:
        asm volatile("mov %%cr8, %0" : "=r"(value));
        fold(control, value);
        break;
    case NVMX_OP_WRITE_CR8: asm volatile("mov %0, %%cr8" ::"r"(op->a) : "memory"); break;
    case NVMX_OP_VMCALL: vmcall(op->a); break;
    case NVMX_OP_VMCALL_REGS: do_vmcall_regs(control, op); break;
    case NVMX_OP_HLT: asm volatile("hlt" ::: "memory"); break;
    case NVMX_OP_SPIN:
        while (load(op->a, op->size) != op->b)
            asm volatile("pause");
        break;
    case NVMX_OP_DELAY: do_delay(op->a); break;
    case NVMX_OP_PAUSE:
        for (u64 i = 0; i < op->a; i++)
            asm volatile("pause");
        break;
    case NVMX_OP_LOOP:
        if (op->c < op->b) {
            op->c++;
            return (u32)op->a;
        }
        op->c = 0; /* ready for an enclosing loop */
        break;
    case NVMX_OP_FOLD: fold(control, op->a); break;
    case NVMX_OP_CHECKSUM:
        for (u64 i = 0; i < op->b; i++)
            fold(control, load(op->a + 8 * i, 8));
        break;
    case NVMX_OP_SYNC: out32(NVMX_PORT_L2_SYNC, (u32)op->a); break;
    case NVMX_OP_CALL: fold(control, ((u64(*)(u64, u64))op->a)(op->b, op->c)); break;
    case NVMX_OP_CLI: asm volatile("cli" ::: "memory"); break;
    case NVMX_OP_STI: asm volatile("sti" ::: "memory"); break;
    default:
        /* reported with its RIP like any other exception of L2 */
        asm volatile("ud2");
    }
    return next;
}
