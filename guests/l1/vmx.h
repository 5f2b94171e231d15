/* SPDX-License-Identifier: Apache-2.0 */
/* VMX instructions, each with its VMsucceed / VMfailInvalid / VMfailValid outcome (SDM vol. 3, 31.2). */
#ifndef NVMX_GUESTS_VMX_H
#define NVMX_GUESTS_VMX_H

#include "../common/cpu.h"

/*
 * A guarded instruction names the place where L1 goes on if it faults; trap() in main.c honours it and clears
 * it. `status` starts as STATUS_FAULT and is overwritten only when the instruction completed.
 */
#define GUARD "movq $9f, %%gs:0\n\t"
#define UNGUARD                                                                                              \
    "9:\n\t"                                                                                                 \
    "movq $0, %%gs:0\n\t"

/* CF = VMfailInvalid, ZF = VMfailValid; the moves leave the flags alone. */
#define VMX_OUTCOME                                                                                          \
    "movl %[ok], %[status]\n\t"                                                                              \
    "cmovcl %[invalid], %[status]\n\t"                                                                       \
    "cmovzl %[valid], %[status]\n\t"

#define VMX_INSTRUCTION(text, ...)                                                                           \
    ({                                                                                                       \
        u32 status_ = NVMX_STATUS_FAULT;                                                                     \
        asm volatile(GUARD text "\n\t" VMX_OUTCOME UNGUARD                                                   \
                     : [status] "+&r"(status_)                                                               \
                     : [ok] "r"((u32)NVMX_STATUS_OK), [invalid] "r"((u32)NVMX_STATUS_VMFAIL_INVALID),        \
                       [valid] "r"((u32)NVMX_STATUS_VMFAIL_VALID), __VA_ARGS__                               \
                     : "cc", "memory");                                                                      \
        status_;                                                                                             \
    })

static inline u32 vmxon(u64 region) {
    return VMX_INSTRUCTION("vmxon %[m]", [m] "m"(region));
}
static inline u32 vmclear(u64 vmcs) {
    return VMX_INSTRUCTION("vmclear %[m]", [m] "m"(vmcs));
}
static inline u32 vmptrld(u64 vmcs) {
    return VMX_INSTRUCTION("vmptrld %[m]", [m] "m"(vmcs));
}
static inline u32 vmxoff(void) {
    return VMX_INSTRUCTION("vmxoff", "i"(0));
}
static inline u32 vmwrite(u64 field, u64 value) {
    return VMX_INSTRUCTION("vmwrite %[v], %[f]", [v] "r"(value), [f] "r"(field));
}
static inline u32 vmptrst(u64 *vmcs) {
    return VMX_INSTRUCTION("vmptrst (%[m])", [m] "r"(vmcs));
}
static inline u32 vmread(u64 field, u64 *value) {
    /* to memory, so that a failing VMREAD leaves *value alone */
    return VMX_INSTRUCTION("vmread %[f], (%[v])", [f] "r"(field), [v] "r"(value));
}

struct invalidation {
    u64 context; /* EPTP, or the VPID in bits 15:0 */
    u64 address;
};

static inline u32 invept(u64 type, const struct invalidation *what) {
    return VMX_INSTRUCTION("invept (%[d]), %[t]", [d] "r"(what), [t] "r"(type));
}
static inline u32 invvpid(u64 type, const struct invalidation *what) {
    return VMX_INSTRUCTION("invvpid (%[d]), %[t]", [d] "r"(what), [t] "r"(type));
}

/* For fields that exist whenever VMX does; 0 without a current VMCS. */
static inline u64 vmget(u64 field) {
    u64 value = 0;
    vmread(field, &value);
    return value;
}

/* Guarded RDMSR/WRMSR. */
static inline u32 rdmsr_guarded(u32 index, u64 *value) {
    u32 status = NVMX_STATUS_FAULT, low = 0, high = 0;
    asm volatile(GUARD "rdmsr\n\tmovl %[ok], %[status]\n\t" UNGUARD
                 : [status] "+&r"(status), "+&a"(low), "+&d"(high)
                 : "c"(index), [ok] "i"((u32)NVMX_STATUS_OK)
                 : "cc", "memory");
    *value = (u64)high << 32 | low;
    return status;
}

static inline u32 wrmsr_guarded(u32 index, u64 value) {
    u32 status = NVMX_STATUS_FAULT;
    asm volatile(GUARD "wrmsr\n\tmovl %[ok], %[status]\n\t" UNGUARD
                 : [status] "+&r"(status)
                 : "c"(index), "a"((u32)value), "d"((u32)(value >> 32)), [ok] "i"((u32)NVMX_STATUS_OK)
                 : "cc", "memory");
    return status;
}

enum vmcs_field {
    HOST_ES = 0x0c00,
    HOST_CS = 0x0c02,
    HOST_SS = 0x0c04,
    HOST_DS = 0x0c06,
    HOST_FS = 0x0c08,
    HOST_GS = 0x0c0a,
    HOST_TR = 0x0c0c,
    HOST_PAT = 0x2c00,
    HOST_EFER = 0x2c02,
    GUEST_PHYSICAL_ADDRESS = 0x2400,
    VM_INSTRUCTION_ERROR = 0x4400,
    VM_EXIT_REASON = 0x4402,
    VM_EXIT_INTR_INFO = 0x4404,
    VM_EXIT_INTR_ERROR_CODE = 0x4406,
    IDT_VECTORING_INFO = 0x4408,
    IDT_VECTORING_ERROR_CODE = 0x440a,
    VM_EXIT_INSTRUCTION_LENGTH = 0x440c,
    VM_EXIT_INSTRUCTION_INFO = 0x440e,
    GUEST_INTERRUPTIBILITY = 0x4824,
    GUEST_ACTIVITY_STATE = 0x4826,
    HOST_SYSENTER_CS = 0x4c00,
    EXIT_QUALIFICATION = 0x6400,
    GUEST_LINEAR_ADDRESS = 0x640a,
    GUEST_CR0 = 0x6800,
    GUEST_CR3 = 0x6802,
    GUEST_CR4 = 0x6804,
    GUEST_RSP = 0x681c,
    GUEST_RIP = 0x681e,
    GUEST_RFLAGS = 0x6820,
    HOST_CR0 = 0x6c00,
    HOST_CR3 = 0x6c02,
    HOST_CR4 = 0x6c04,
    HOST_FS_BASE = 0x6c06,
    HOST_GS_BASE = 0x6c08,
    HOST_TR_BASE = 0x6c0a,
    HOST_GDTR_BASE = 0x6c0c,
    HOST_IDTR_BASE = 0x6c0e,
    HOST_SYSENTER_ESP = 0x6c10,
    HOST_SYSENTER_EIP = 0x6c12,
    HOST_RSP = 0x6c14,
    HOST_RIP = 0x6c16,
};

/* enter.S: one VM entry; returns ENTER_EXITED or the STATUS_* of a failed VMLAUNCH/VMRESUME. */
#define ENTER_EXITED 0
u32 vmx_enter(u64 *regs, u32 launch);
void vmx_exit(void);

#endif
