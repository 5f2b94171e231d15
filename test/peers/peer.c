// SPDX-License-Identifier: Apache-2.0
// Reads lines "WHAT COUNT", does WHAT COUNT times and answers with the microseconds each took: on average for exits,
// else in the median. The same work as scripts/bench-kvm.mjs does through nvmx; one machine of
// each kind lives as long as the process, so that many short rounds can take turns with nvmx's.
#include "peer.h"

#include <stdbool.h>

// MOV CX, 199; OUT 0x10, AL; LOOP to the OUT; OUT 0x11, AL; JMP to the MOV: 200 exits a turn.
static const uint8_t out_loop[] = {0xb9, 199, 0, 0xe6, 0x10, 0xe2, 0xfc, 0xe6, 0x11, 0xeb, 0xf5};

static double exits(struct machine machine, int count) {
    const double start = now_us();
    for (int i = 0; i < count; i++) {
        CALL(machine.vcpu, KVM_RUN, 0);
        if (machine.run->exit_reason != KVM_EXIT_IO)
            exit(2);
    }
    return now_us() - start;
}

static int compare(const void *a, const void *b) {
    const double difference = *(const double *)a - *(const double *)b;
    return (difference > 0) - (difference < 0);
}

// The median of a work's times, as often as it was done: what takes long is also what others interrupt.
#define MOST 256
static double steadied(double *times, int count) {
    qsort(times, (size_t)count, sizeof *times, compare);
    return times[count / 2] * count;
}

// In groups, which are too short for the machine to do something else in the middle of most.
#define GROUP 10
static double registers(struct machine machine, int count) {
    struct kvm_regs regs;
    double times[MOST];
    for (int group = 0; group < count / GROUP; group++) {
        const double start = now_us();
        for (int i = 0; i < GROUP; i++) {
            CALL(machine.vcpu, KVM_GET_REGS, &regs);
            CALL(machine.vcpu, KVM_SET_REGS, &regs);
        }
        times[group] = (now_us() - start) / GROUP;
    }
    return steadied(times, count / GROUP) * GROUP;
}

// KVM_SET_USER_MEMORY_REGION2, which Debian 12's headers do not have, where the kernel has it.
struct region {
    struct kvm_userspace_memory_region one;
    uint64_t more[16];
};
static unsigned long set_region = KVM_SET_USER_MEMORY_REGION;

static void prepare_slots(struct machine *machine) {
    const int user_memory2 = 231;
    if (ioctl(machine->vm, KVM_CHECK_EXTENSION, user_memory2) > 0)
        set_region = _IOW(KVMIO, 0x49, struct region);
}

static double slots(struct machine machine, int count) {
    double times[MOST];
    for (int i = 0; i < count; i++) {
        const double start = now_us();
        void *memory =
            mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        struct region region = {.one = {.slot = 1,
                                        .guest_phys_addr = 0x10000,
                                        .memory_size = 4096,
                                        .userspace_addr = (uintptr_t)memory}};
        CALL(machine.vm, set_region, &region);
        region.one.memory_size = 0;
        CALL(machine.vm, set_region, &region);
        munmap(memory, 4096);
        times[i] = now_us() - start;
    }
    return steadied(times, count);
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

struct cpuid {
    struct {
        uint32_t count, padding;
    } header;
    struct kvm_cpuid_entry2 entries[256];
};
static struct cpuid cpuid, now;
static struct msrs readable, msrs;

static void prepare_save(struct machine *machine) {
    cpuid.header.count = 256;
    CALL(machine->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    CALL(machine->vcpu, KVM_SET_CPUID2, &cpuid);
    find_msrs(machine, &readable);
}

static double save_restore(struct machine machine, int count) {
    static struct kvm_xsave xsave;
    struct kvm_mp_state mp;
    struct kvm_regs regs;
    struct kvm_sregs2 sregs;
    struct kvm_xcrs xcrs;
    struct kvm_debugregs debug;
    struct kvm_vcpu_events events;
    double times[MOST];
    for (int i = 0; i < count; i++) {
        const double start = now_us();
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
        times[i] = now_us() - start;
    }
    return steadied(times, count);
}

static void prepare_nothing(struct machine *machine) {
    (void)machine;
}

int main(void) {
    static struct {
        const char *name;
        void (*prepare)(struct machine *);
        double (*run)(struct machine, int);
        bool is_prepared;
        struct machine machine;
    } works[] = {{.name = "exits", .prepare = prepare_nothing, .run = exits},
                 {.name = "registers", .prepare = prepare_nothing, .run = registers},
                 {.name = "slots", .prepare = prepare_slots, .run = slots},
                 {.name = "save-restore", .prepare = prepare_save, .run = save_restore}};
    char name[32];
    int count;
    while (scanf("%31s %d", name, &count) == 2 && count > 0 && count <= MOST) {
        for (size_t i = 0; i < sizeof works / sizeof *works; i++) {
            if (strcmp(name, works[i].name) != 0)
                continue;
            if (!works[i].is_prepared) {
                works[i].machine = machine_with(out_loop, sizeof out_loop);
                works[i].prepare(&works[i].machine);
                works[i].is_prepared = true;
            }
            printf("%.4f\n", works[i].run(works[i].machine, count) / count);
            fflush(stdout);
        }
    }
    return 0;
}
