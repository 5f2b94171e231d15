/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NVMX_GUESTS_L2_H
#define NVMX_GUESTS_L2_H

#include "../common/cpu.h"

static inline void vmcall(u64 value) {
    asm volatile("vmcall" ::"a"(value) : "memory");
}

/* Feeds a value to the checksum. */
void fold(struct nvmx_control *control, u64 value);

/* Executes one operation; returns the index of the next. */
u32 perform(struct nvmx_control *control, struct nvmx_op *op);

/* ops.S: fills every GPR but RSP from the seed, VMCALLs, stores what the GPRs hold then, in encoding order.
 */
void vmcall_regs(u64 seed, u64 out[16]);

#endif
