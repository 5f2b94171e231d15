/* SPDX-License-Identifier: Apache-2.0 */
/* The commands of abi.h. VMX instructions and MSR accesses never take L1 down: their outcome is the status.
 */
#include "l1.h"

#define CR4_VMXE (1ull << 13)
#define CPUID_1_ECX_VMX (1u << 5)
#define MSR_APIC_BASE 0x1b
#define APIC_BASE_EXTD (1u << 10)
#define APIC_BASE_EN (1u << 11)
#define MSR_FEATURE_CONTROL 0x3a
#define FEATURE_CONTROL_LOCKED 1u
#define FEATURE_CONTROL_VMX 4u
#define MSR_VMX_CR0_FIXED0 0x486
#define MSR_VMX_CR0_FIXED1 0x487
#define MSR_VMX_CR4_FIXED0 0x488
#define MSR_VMX_CR4_FIXED1 0x489
#define MSR_X2APIC_ID 0x802
#define MSR_X2APIC_TPR 0x808
#define MSR_X2APIC_SVR 0x80f
#define MSR_X2APIC_ICR 0x830

/*
 * VMXON with what must come before it (SDM vol. 3, 24.7): the feature-control lock and the fixed bits of CR0
 * and CR4. On a CPU without VMX none of that can be done, and VMXON itself reports #UD.
 */
static u32 do_vmxon(u64 region) {
    u32 out[4];

    cpuid(1, 0, out);
    if (out[2] & CPUID_1_ECX_VMX) {
        u64 cr0, cr4, control = 0;

        if (rdmsr_guarded(MSR_FEATURE_CONTROL, &control) != NVMX_STATUS_OK)
            return NVMX_STATUS_FAULT;
        if (!(control & FEATURE_CONTROL_LOCKED)) {
            control |= FEATURE_CONTROL_LOCKED | FEATURE_CONTROL_VMX;
            if (wrmsr_guarded(MSR_FEATURE_CONTROL, control) != NVMX_STATUS_OK)
                return NVMX_STATUS_FAULT;
        }
        asm volatile("mov %%cr0, %0" : "=r"(cr0));
        asm volatile("mov %%cr4, %0" : "=r"(cr4));
        cr0 = (cr0 | rdmsr(MSR_VMX_CR0_FIXED0)) & rdmsr(MSR_VMX_CR0_FIXED1);
        cr4 = (cr4 | CR4_VMXE | rdmsr(MSR_VMX_CR4_FIXED0)) & rdmsr(MSR_VMX_CR4_FIXED1);
        asm volatile("mov %0, %%cr0" ::"r"(cr0) : "memory");
        asm volatile("mov %0, %%cr4" ::"r"(cr4) : "memory");
    }
    return vmxon(region);
}

static u32 do_vmclear(u64 vmcs, u64 l2) {
    u32 status = vmclear(vmcs);

    if (status == NVMX_STATUS_OK && l2)
        ((struct nvmx_l2 *)l2)->launched = 0;
    return status;
}

static u32 do_invept(struct nvmx_command *command) {
    const struct invalidation what = {command->a[1], 0};

    return invept(command->a[0], &what);
}

static u32 do_invvpid(struct nvmx_command *command) {
    const struct invalidation what = {command->a[1], command->a[2]};

    return invvpid(command->a[0], &what);
}

static u32 do_cpuid(struct nvmx_command *command) {
    u32 out[4];

    cpuid((u32)command->a[0], (u32)command->a[1], out);
    command->r[0] = (u64)out[1] << 32 | out[0];
    command->r[1] = (u64)out[3] << 32 | out[2];
    return NVMX_STATUS_OK;
}

static u32 do_call(struct nvmx_command *command) {
    u64 (*function)(u64, u64, u64) = (u64(*)(u64, u64, u64))command->a[0];

    command->r[0] = function(command->a[1], command->a[2], command->a[3]);
    return NVMX_STATUS_OK;
}

static u32 do_x2apic_enable(struct nvmx_cpu *cpu, struct nvmx_command *command) {
    u64 base = 0;

    if (rdmsr_guarded(MSR_APIC_BASE, &base) != NVMX_STATUS_OK ||
        wrmsr_guarded(MSR_APIC_BASE, base | APIC_BASE_EN | APIC_BASE_EXTD) != NVMX_STATUS_OK ||
        wrmsr_guarded(MSR_X2APIC_SVR, 0x1ff) != NVMX_STATUS_OK ||
        wrmsr_guarded(MSR_X2APIC_TPR, 0) != NVMX_STATUS_OK)
        return NVMX_STATUS_FAULT;
    cpu->x2apic = 1;
    return rdmsr_guarded(MSR_X2APIC_ID, &command->r[0]);
}

static u32 do_spin(const struct nvmx_command *command) {
    asm volatile("sti");
    while (load(command->a[0], (u32)command->a[1]) != command->a[2])
        asm volatile("pause");
    asm volatile("cli");
    return NVMX_STATUS_OK;
}

static int is_size(u64 bytes) {
    return bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8;
}

u32 execute(struct nvmx_cpu *cpu, struct nvmx_command *command) {
    u64 *const a = command->a;
    u64 *const r = command->r;
    u32 status = NVMX_STATUS_OK;

    r[0] = r[1] = r[2] = 0;
    switch (command->op) {
    case NVMX_VMXON: status = do_vmxon(a[0]); break;
    case NVMX_VMXOFF: status = vmxoff(); break;
    case NVMX_VMCLEAR: status = do_vmclear(a[0], a[1]); break;
    case NVMX_VMPTRLD: status = vmptrld(a[0]); break;
    case NVMX_VMPTRST: status = vmptrst(&r[0]); break;
    case NVMX_VMREAD: status = vmread(a[0], &r[0]); break;
    case NVMX_VMWRITE: status = vmwrite(a[0], a[1]); break;
    case NVMX_HOST_STATE: status = write_host_state(cpu, (const struct nvmx_l2 *)a[0]); break;
    case NVMX_ENTER: status = enter(command); break;
    case NVMX_INVEPT: status = do_invept(command); break;
    case NVMX_INVVPID: status = do_invvpid(command); break;
    case NVMX_RDMSR: return rdmsr_guarded((u32)a[0], &r[0]);
    case NVMX_WRMSR: return wrmsr_guarded((u32)a[0], a[1]);
    case NVMX_CPUID: return do_cpuid(command);
    case NVMX_READ:
        if (!is_size(a[1]))
            return NVMX_STATUS_BAD_COMMAND;
        r[0] = load(a[0], (u32)a[1]);
        break;
    case NVMX_WRITE:
        if (!is_size(a[1]))
            return NVMX_STATUS_BAD_COMMAND;
        store(a[0], (u32)a[1], a[2]);
        break;
    case NVMX_CALL: return do_call(command);
    case NVMX_X2APIC_ENABLE: return do_x2apic_enable(cpu, command);
    case NVMX_IPI: return wrmsr_guarded(MSR_X2APIC_ICR, a[0]);
    case NVMX_HALT:
        /* STI takes effect after the next instruction: no interrupt is lost before the HLT */
        asm volatile("sti\n\thlt\n\tcli" ::: "memory");
        break;
    case NVMX_SPIN: return is_size(a[1]) ? do_spin(command) : NVMX_STATUS_BAD_COMMAND;
    case NVMX_RDTSC: r[0] = rdtsc(); break;
    default: return NVMX_STATUS_BAD_COMMAND;
    }
    if (status == NVMX_STATUS_VMFAIL_VALID) {
        const struct nvmx_l2 *l2 = command->op == NVMX_ENTER ? (const struct nvmx_l2 *)a[0] : 0;

        r[0] = vmcs_get(l2, VM_INSTRUCTION_ERROR);
    }
    return status;
}
