// SPDX-License-Identifier: Apache-2.0
// peer WHAT COUNT: does WHAT COUNT times and prints the microseconds each took on average. The same work as
// scripts/bench-kvm.mjs does through nvmx.
#include "peer.h"

// OUT 0x10, AL in a loop without end.
static const uint8_t out_loop[] = {0xe6, 0x10, 0xeb, 0xfc};

static double exits(int count) {
    struct machine machine = machine_with(out_loop, sizeof out_loop);
    const double start = now_us();
    for (int i = 0; i < count; i++) {
        CALL(machine.vcpu, KVM_RUN, 0);
        if (machine.run->exit_reason != KVM_EXIT_IO)
            exit(2);
    }
    return now_us() - start;
}

static double registers(int count) {
    struct machine machine = machine_with(out_loop, sizeof out_loop);
    struct kvm_regs regs;
    const double start = now_us();
    for (int i = 0; i < count; i++) {
        CALL(machine.vcpu, KVM_GET_REGS, &regs);
        CALL(machine.vcpu, KVM_SET_REGS, &regs);
    }
    return now_us() - start;
}

static double slots(int count) {
    struct machine machine = machine_with(out_loop, sizeof out_loop);
    const double start = now_us();
    for (int i = 0; i < count; i++) {
        void *memory =
            mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        struct kvm_userspace_memory_region region = {
            .slot = 1, .guest_phys_addr = 0x10000, .memory_size = 4096, .userspace_addr = (uintptr_t)memory};
        CALL(machine.vm, KVM_SET_USER_MEMORY_REGION, &region);
        region.memory_size = 0;
        CALL(machine.vm, KVM_SET_USER_MEMORY_REGION, &region);
        munmap(memory, 4096);
    }
    return now_us() - start;
}

struct msrs {
    struct {
        uint32_t count, padding;
    } header;
    struct kvm_msr_entry entries[512];
};

// Which MSRs of the list this vCPU can read and write; 0x3a first, 0x6e0 and the Hyper-V counter left out.
static void find_msrs(struct machine *machine, struct msrs *readable) {
    struct {
        uint32_t count;
        uint32_t indices[2048];
    } list = {.count = 2048};
    CALL(machine->kvm, KVM_GET_MSR_INDEX_LIST, &list);
    readable->header.count = 0;
    for (uint32_t i = 0; i <= list.count; i++) {
        const uint32_t index = i == 0 ? 0x3a : list.indices[i - 1];
        struct msrs one = {.header.count = 1, .entries[0].index = index};
        if ((i > 0 && index == 0x3a) || index == 0x6e0 || index == 0x40000020)
            continue;
        if (ioctl(machine->vcpu, KVM_GET_MSRS, &one) == 1 && ioctl(machine->vcpu, KVM_SET_MSRS, &one) == 1 &&
            readable->header.count < 255)
            readable->entries[readable->header.count++].index = index;
    }
}

static double save_restore(int count) {
    struct machine machine = machine_with(out_loop, sizeof out_loop);
    struct cpuid {
        struct {
            uint32_t count, padding;
        } header;
        struct kvm_cpuid_entry2 entries[256];
    };
    static struct cpuid cpuid, now;
    cpuid.header.count = 256;
    CALL(machine.kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    CALL(machine.vcpu, KVM_SET_CPUID2, &cpuid);
    static struct msrs readable, msrs;
    find_msrs(&machine, &readable);
    static struct kvm_xsave xsave;
    struct kvm_mp_state mp;
    struct kvm_regs regs;
    struct kvm_sregs2 sregs;
    struct kvm_xcrs xcrs;
    struct kvm_debugregs debug;
    struct kvm_vcpu_events events;
    const double start = now_us();
    for (int i = 0; i < count; i++) {
        CALL(machine.vcpu, KVM_GET_MP_STATE, &mp);
        cpuid.header.count = 256;
        CALL(machine.vcpu, KVM_GET_CPUID2, &cpuid);
        const long khz = CALL(machine.vcpu, KVM_GET_TSC_KHZ, 0);
        CALL(machine.vcpu, KVM_GET_REGS, &regs);
        CALL(machine.vcpu, KVM_GET_SREGS2, &sregs);
        memcpy(&msrs, &readable, sizeof msrs);
        CALL(machine.vcpu, KVM_GET_MSRS, &msrs);
        CALL(machine.vcpu, KVM_GET_XCRS, &xcrs);
        CALL(machine.vcpu, KVM_GET_XSAVE, &xsave);
        CALL(machine.vcpu, KVM_GET_DEBUGREGS, &debug);
        CALL(machine.vcpu, KVM_GET_VCPU_EVENTS, &events);

        now.header.count = 256;
        CALL(machine.vcpu, KVM_GET_CPUID2, &now);
        if (memcmp(&now, &cpuid, sizeof now.header + now.header.count * sizeof *now.entries) != 0)
            CALL(machine.vcpu, KVM_SET_CPUID2, &cpuid);
        if (CALL(machine.vcpu, KVM_GET_TSC_KHZ, 0) != khz)
            CALL(machine.vcpu, KVM_SET_TSC_KHZ, khz);
        CALL(machine.vcpu, KVM_SET_SREGS2, &sregs);
        CALL(machine.vcpu, KVM_SET_MSRS, &msrs);
        CALL(machine.vcpu, KVM_SET_XCRS, &xcrs);
        CALL(machine.vcpu, KVM_SET_XSAVE, &xsave);
        CALL(machine.vcpu, KVM_SET_DEBUGREGS, &debug);
        CALL(machine.vcpu, KVM_SET_REGS, &regs);
        CALL(machine.vcpu, KVM_SET_VCPU_EVENTS, &events);
        CALL(machine.vcpu, KVM_SET_MP_STATE, &mp);
    }
    return now_us() - start;
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        double (*run)(int);
    } works[] = {
        {"exits", exits}, {"registers", registers}, {"slots", slots}, {"save-restore", save_restore}};
    const int count = argc == 3 ? atoi(argv[2]) : 0;
    for (size_t i = 0; count > 0 && i < sizeof works / sizeof *works; i++) {
        if (strcmp(argv[1], works[i].name) == 0) {
            printf("%.4f\n", works[i].run(count) / count);
            return 0;
        }
    }
    fprintf(stderr, "usage: peer exits|registers|slots|save-restore COUNT\n");
    return 2;
}
