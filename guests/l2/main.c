/* SPDX-License-Identifier: Apache-2.0 */
/* The L2 interpreter: executes the operation list its control page names. Shared, read-only, by all L2s. */
#include "l2.h"

_Static_assert(sizeof(struct nvmx_control) <= 4096, "one page per L2");
_Static_assert(sizeof(struct nvmx_op) == 32, "no padding");
_Static_assert(IMAGE_BASE == NVMX_L2_BASE, "CMakeLists.txt");

/* L1 points GUEST_GDTR_BASE here; L2 never loads TR, so the TSS entry is absent. */
const u64 gdt[3] = {
    [NVMX_SELECTOR_CODE / 8] = 0x00af9b000000ffff,
    [NVMX_SELECTOR_DATA / 8] = 0x00cf93000000ffff,
};

static struct nvmx_control *this_control(void) {
    struct nvmx_control *control;

    asm("mov %%gs:%c1, %0" : "=r"(control) : "i"(__builtin_offsetof(struct nvmx_control, self)));
    return control;
}

#define MSR_X2APIC_EOI 0x80b
#define APIC_EOI 0xb0

static void end_of_interrupt(u64 how) {
    if (how == 1)
        wrmsr(MSR_X2APIC_EOI, 0);
    else if (how)
        store(how + APIC_EOI, 4, 0);
}

void trap(struct trap_frame *frame) {
    struct nvmx_control *control = this_control();

    if (frame->vector == 2 || frame->vector >= 32) {
        control->irq_counts[frame->vector]++;
        if (frame->vector >= 32)
            end_of_interrupt(control->eoi);
        return;
    }
    record_fault(&control->fault, NVMX_LEVEL_L2, frame);
    for (;;) {
        out32(NVMX_PORT_L2_FAULT, (u32)frame->vector);
        vmcall(~0ull);
    }
}

void fold(struct nvmx_control *control, u64 value) {
    control->checksum = (control->checksum ^ value) * NVMX_CHECKSUM_PRIME;
    control->last = value;
    control->folds++;
}

/*
 * An EPT violation while an interrupt is delivered is reported in the IDT-vectoring information. Bochs 3.0
 * leaves an old vector there when the interrupt is a virtual one, and KVM then delivers that instead: so L2's
 * EPT should already map what delivery reads.
 */
static void touch_interrupt_path(void) {
    load((u64)&idt[0], 8);
    load((u64)&idt[511], 8);
    load((u64)vectors, 1);
}

void l2_main(struct nvmx_control *control) {
    struct nvmx_op *const ops = (struct nvmx_op *)control->ops;

    touch_interrupt_path();
    for (;;) {
        struct nvmx_op *op = &ops[control->pc];
        u32 next;

        if (op->code == NVMX_OP_END) {
            control->done = 1;
            vmcall(0);
            continue;
        }
        next = perform(control, op);
        control->executed++;
        control->pc = next;
    }
}
