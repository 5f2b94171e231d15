/* SPDX-License-Identifier: Apache-2.0 */
/* The host-state area, and running an L2. */
#include "l1.h"

#define MSR_EFER 0xc0000080
#define MSR_FS_BASE 0xc0000100
#define MSR_PAT 0x277

/*
 * A field of an L2's VMCS: of the current VMCS by VMREAD and VMWRITE, or of its enlightened VMCS in memory.
 * The map says where: offset in bits 15:0, the clean-fields bits of the field's group in 31:16, 0 for no such
 * field.
 */
#define EVMCS_CLEAN_FIELDS 824

static u32 evmcs_entry(u64 field) {
    const u32 *map = (const u32 *)this_cpu()->evmcs_map;

    return map[(field >> 13 & 3) << 8 | (field >> 10 & 3) << 6 | (field >> 1 & 0x3f)];
}

static u32 evmcs_bytes(u64 field) {
    static const u8 bytes[4] = {2, 8, 4, 8};

    return bytes[field >> 13 & 3];
}

u64 vmcs_get(const struct nvmx_l2 *l2, u64 field) {
    u32 entry;

    if (!l2 || !l2->evmcs)
        return vmget(field);
    entry = evmcs_entry(field);
    return entry ? load(l2->evmcs + (entry & 0xffff), evmcs_bytes(field)) : 0;
}

static u32 set(const struct nvmx_l2 *l2, u64 field, u64 value) {
    u32 entry;

    if (!l2 || !l2->evmcs)
        return vmwrite(field, value);
    entry = evmcs_entry(field);
    if (!entry)
        return NVMX_STATUS_BAD_COMMAND;
    store(l2->evmcs + (entry & 0xffff), evmcs_bytes(field), value);
    *(volatile u32 *)(l2->evmcs + EVMCS_CLEAN_FIELDS) &= ~(entry >> 16);
    return NVMX_STATUS_OK;
}

/* Repeated after a VMCS moved to another L1 vCPU: TR, GDTR, GS.base and RSP are this vCPU's own. */
u32 write_host_state(struct nvmx_cpu *cpu, const struct nvmx_l2 *l2) {
    u64 cr0, cr3, cr4;

    asm volatile("mov %%cr0, %0" : "=r"(cr0));
    asm volatile("mov %%cr3, %0" : "=r"(cr3));
    asm volatile("mov %%cr4, %0" : "=r"(cr4));

    const struct {
        u64 field, value;
    } state[] = {
        {HOST_ES, NVMX_SELECTOR_DATA},
        {HOST_CS, NVMX_SELECTOR_CODE},
        {HOST_SS, NVMX_SELECTOR_DATA},
        {HOST_DS, NVMX_SELECTOR_DATA},
        {HOST_FS, 0},
        {HOST_GS, 0},
        {HOST_TR, NVMX_SELECTOR_TSS},
        {HOST_PAT, rdmsr(MSR_PAT)},
        {HOST_EFER, rdmsr(MSR_EFER)},
        {HOST_CR0, cr0},
        {HOST_CR3, cr3},
        {HOST_CR4, cr4},
        {HOST_FS_BASE, rdmsr(MSR_FS_BASE)},
        {HOST_GS_BASE, (u64)cpu},
        {HOST_TR_BASE, (u64)cpu->tss},
        {HOST_GDTR_BASE, (u64)cpu->gdt},
        {HOST_IDTR_BASE, (u64)idt},
        {HOST_SYSENTER_CS, 0},
        {HOST_SYSENTER_ESP, 0},
        {HOST_SYSENTER_EIP, 0},
        {HOST_RSP, (u64)&cpu->frame_l2},
        {HOST_RIP, (u64)vmx_exit},
    };

    for (u32 i = 0; i < sizeof(state) / sizeof(state[0]); i++) {
        u32 status = set(l2, state[i].field, state[i].value);

        if (status != NVMX_STATUS_OK)
            return status;
    }
    return NVMX_STATUS_OK;
}

static void record_exit(struct nvmx_l2 *l2, u32 reason) {
    struct nvmx_exit *const exit = &l2->exit;

    exit->reason = reason;
    exit->intr_info = (u32)vmcs_get(l2, VM_EXIT_INTR_INFO);
    exit->intr_error_code = (u32)vmcs_get(l2, VM_EXIT_INTR_ERROR_CODE);
    exit->idt_vectoring_info = (u32)vmcs_get(l2, IDT_VECTORING_INFO);
    exit->idt_vectoring_error_code = (u32)vmcs_get(l2, IDT_VECTORING_ERROR_CODE);
    exit->instruction_length = (u32)vmcs_get(l2, VM_EXIT_INSTRUCTION_LENGTH);
    exit->instruction_info = (u32)vmcs_get(l2, VM_EXIT_INSTRUCTION_INFO);
    exit->activity_state = (u32)vmcs_get(l2, GUEST_ACTIVITY_STATE);
    exit->interruptibility = (u32)vmcs_get(l2, GUEST_INTERRUPTIBILITY);
    exit->qualification = vmcs_get(l2, EXIT_QUALIFICATION);
    exit->guest_linear_address = vmcs_get(l2, GUEST_LINEAR_ADDRESS);
    exit->guest_physical_address = vmcs_get(l2, GUEST_PHYSICAL_ADDRESS);
    exit->rip = vmcs_get(l2, GUEST_RIP);
    exit->rsp = vmcs_get(l2, GUEST_RSP);
    exit->rflags = vmcs_get(l2, GUEST_RFLAGS);
    exit->cr0 = vmcs_get(l2, GUEST_CR0);
    exit->cr3 = vmcs_get(l2, GUEST_CR3);
    exit->cr4 = vmcs_get(l2, GUEST_CR4);
}

static void record_time(struct nvmx_l2 *l2, u64 ticks) {
    if (!l2->entries || ticks < l2->tsc_min)
        l2->tsc_min = ticks;
    if (ticks > l2->tsc_max)
        l2->tsc_max = ticks;
    l2->tsc_total += ticks;
    if (l2->samples) {
        if (l2->samples_count < l2->samples_room)
            ((u32 *)l2->samples)[l2->samples_count] = ticks >> 32 ? 0xffffffff : (u32)ticks;
        l2->samples_count++;
    }
}

/* Exactly one VM entry per counted exit: the host compares KVM's nested_run with l2->entries. */
u32 enter(struct nvmx_command *command) {
    struct nvmx_l2 *const l2 = (struct nvmx_l2 *)command->a[0];
    const u64 limit = command->a[2];
    u32 launch = command->a[1] == NVMX_ENTER_LAUNCH || (command->a[1] == NVMX_ENTER_AUTO && !l2->launched);

    for (;;) {
        u64 start = rdtsc();
        u32 failed = vmx_enter(l2->regs, launch);
        u64 end = rdtsc();
        u32 reason, basic, policy, done;

        if (failed != ENTER_EXITED)
            return failed;
        reason = (u32)vmcs_get(l2, VM_EXIT_REASON);
        basic = reason & 0xffff;
        if (reason >> 31) {
            /* VM-entry failure: no entry happened and the launch state is what it was */
            policy = NVMX_POLICY_RETURN;
        } else {
            record_time(l2, end - start);
            l2->entries++;
            command->r[1]++;
            l2->launched = 1;
            launch = 0;
            policy = basic < NVMX_EXIT_REASONS ? l2->policy[basic] : NVMX_POLICY_RETURN;
        }
        if (basic < NVMX_EXIT_REASONS)
            l2->counts[basic]++;
        else
            l2->other_exits++;

        done = policy == NVMX_POLICY_RETURN || policy == NVMX_POLICY_ADVANCE ||
               (limit && command->r[1] >= limit);
        if (done) {
            record_exit(l2, reason);
            command->r[0] = reason;
        }
        if (policy == NVMX_POLICY_SKIP || policy == NVMX_POLICY_ADVANCE)
            set(l2, GUEST_RIP, vmcs_get(l2, GUEST_RIP) + vmcs_get(l2, VM_EXIT_INSTRUCTION_LENGTH));
        if (done)
            return NVMX_STATUS_OK;
    }
}
