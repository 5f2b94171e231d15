/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NVMX_GUESTS_L1_H
#define NVMX_GUESTS_L1_H

#include "vmx.h"

/* This vCPU's area. */
static inline struct nvmx_cpu *this_cpu(void) {
    struct nvmx_cpu *cpu;
    asm("mov %%gs:%c1, %0" : "=r"(cpu) : "i"(__builtin_offsetof(struct nvmx_cpu, self)));
    return cpu;
}

/* Executes one command; returns its STATUS_*. */
u32 execute(struct nvmx_cpu *cpu, struct nvmx_command *command);

/* Runs an L2 until its policy or a limit says stop. */
u32 enter(struct nvmx_command *command);

/* A field of the L2's VMCS; l2 may be null for whatever VMCS is current. */
u64 vmcs_get(const struct nvmx_l2 *l2, u64 field);

/* Writes the host-state area of the L2's VMCS; l2 may be null for whatever VMCS is current. */
u32 write_host_state(struct nvmx_cpu *cpu, const struct nvmx_l2 *l2);

#endif
