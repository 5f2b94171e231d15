/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The nested round trip of nvmx bench with plain ioctls and nothing else: the smallest L1 there can be, whose L2
 * does nothing but VMCALL. L1 stands in this program, in a section of its own that is copied to where it is linked
 * (so the program must not be position-independent). The VMCS has the controls of nvmx's round-trip/anonymous/none.
 * Prints: round-trip, the count, and the TSC ticks of the quickest, the median and the average trip, from before
 * L1's VMRESUME to after L2's exit. Usage: bench_nested ROUNDS
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define GUEST __attribute__((section("guest"), used, noinline, target("general-regs-only")))
#define INLINE static inline __attribute__((always_inline, target("general-regs-only")))
extern uint8_t __start_guest[], __stop_guest[];

/* Guest-physical addresses, which are linear ones too. */
enum {
    PAGE_TABLES = 0x1000,
    EPT = 0x7000,
    VMXON_REGION = 0xd000,
    VMCS = 0xe000,
    TSS = 0xf000,
    WORK = 0x10000,
    L1_STACK = 0x20000,
    L2_STACK = 0x28000,
    TICKS = 0x30000,
    TICKS_END = 0x100000,
    MEMORY = 0x1000000,
};
enum { PORT = 0x10, CODE = 0x08, DATA = 0x10, TASK = 0x18 };
enum { VMCALL_EXIT = 18 };
#define CR0 0x80010033ull
#define CR4 0x2020ull
#define EFER 0x500ull
#define PAT 0x0007040600070406ull

/* SDM vol. 3, appendix B. */
enum field {
    VPID = 0x0000,
    GUEST_ES = 0x0800,
    GUEST_CS = 0x0802,
    GUEST_TR = 0x080e,
    HOST_ES = 0x0c00,
    HOST_CS = 0x0c02,
    HOST_SS = 0x0c04,
    HOST_DS = 0x0c06,
    HOST_TR = 0x0c0c,
    EPT_POINTER = 0x201a,
    LINK_POINTER = 0x2800,
    GUEST_PAT = 0x2804,
    GUEST_EFER = 0x2806,
    HOST_PAT = 0x2c00,
    HOST_EFER = 0x2c02,
    PIN_CONTROLS = 0x4000,
    PRIMARY_CONTROLS = 0x4002,
    EXIT_CONTROLS = 0x400c,
    ENTRY_CONTROLS = 0x4012,
    SECONDARY_CONTROLS = 0x401e,
    EXIT_REASON = 0x4402,
    EXIT_LENGTH = 0x440c,
    GUEST_ES_LIMIT = 0x4800,
    GUEST_TR_LIMIT = 0x480e,
    GUEST_ES_RIGHTS = 0x4814,
    GUEST_CS_RIGHTS = 0x4816,
    GUEST_LDTR_RIGHTS = 0x4820,
    GUEST_TR_RIGHTS = 0x4822,
    CR0_SHADOW = 0x6004,
    CR4_SHADOW = 0x6006,
    GUEST_CR0 = 0x6800,
    GUEST_CR3 = 0x6802,
    GUEST_CR4 = 0x6804,
    GUEST_DR7 = 0x681a,
    GUEST_RSP = 0x681c,
    GUEST_RIP = 0x681e,
    GUEST_RFLAGS = 0x6820,
    HOST_CR0 = 0x6c00,
    HOST_CR3 = 0x6c02,
    HOST_CR4 = 0x6c04,
    HOST_TR_BASE = 0x6c0a,
    HOST_RSP = 0x6c14,
    HOST_RIP = 0x6c16,
};

struct work {
    uint64_t rsp; /* first: enter() */
    uint64_t rounds, done;
    uint64_t failed; /* a field or an instruction: where L1 gave up, or 0 */
    uint64_t fields;
    struct {
        uint64_t field, value;
    } field[128];
};
_Static_assert(offsetof(struct work, rsp) == 0 && sizeof(struct work) <= 4096, "one page");

INLINE uint64_t guest_tsc(void) {
    uint32_t low, high;

    asm volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}

INLINE int vmwrite(uint64_t field, uint64_t value) {
    uint8_t failed;

    asm volatile("vmwrite %2, %1; setna %0" : "=qm"(failed) : "r"(field), "rm"(value) : "cc");
    return !failed;
}

INLINE uint64_t vmread(uint64_t field) {
    uint64_t value = 0;

    asm volatile("vmread %1, %0" : "=r"(value) : "r"(field) : "cc");
    return value;
}

/* Returns whether L2 was entered and has exited: an L2 that uses no register needs none saved. */
int enter(int launch);
void l2(void);
void l2_exit(void);
asm(".pushsection guest, \"ax\"\n"
    ".globl enter, l2, l2_exit\n"
    "enter:\n"
    "  push %rbx\n  push %rbp\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, 0x10000\n" /* WORK, rsp */
    "  test %edi, %edi\n"
    "  jz 1f\n"
    "  vmlaunch\n"
    "  jmp 2f\n"
    "1:  vmresume\n"
    "2:  xor %eax, %eax\n"
    "  jmp 3f\n"
    "l2_exit:\n"
    "  mov 0x10000, %rsp\n"
    "  mov $1, %eax\n"
    "3:  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbp\n  pop %rbx\n"
    "  ret\n"
    "l2:  vmcall\n"
    "  jmp l2\n"
    ".popsection\n");

GUEST static void stop(struct work *work, uint64_t failed) {
    work->failed = failed;
    for (;;)
        asm volatile("outb %%al, $0x10" ::: "memory"); /* PORT */
}

GUEST void l1(struct work *work) {
    const uint64_t region = VMXON_REGION, vmcs = VMCS;
    uint8_t failed;

    asm volatile("vmxon %1; setna %0" : "=qm"(failed) : "m"(region) : "cc", "memory");
    if (failed)
        stop(work, 1);
    asm volatile("vmclear %1; setna %0" : "=qm"(failed) : "m"(vmcs) : "cc", "memory");
    if (failed)
        stop(work, 2);
    asm volatile("vmptrld %1; setna %0" : "=qm"(failed) : "m"(vmcs) : "cc", "memory");
    if (failed)
        stop(work, 3);
    for (uint64_t i = 0; i < work->fields; i++)
        if (!vmwrite(work->field[i].field, work->field[i].value))
            stop(work, work->field[i].field);
    for (uint64_t round = 0; round < work->rounds; round++) {
        const uint64_t start = guest_tsc();
        const int entered = enter(round == 0);
        const uint64_t end = guest_tsc();

        if (!entered || vmread(EXIT_REASON) != VMCALL_EXIT)
            stop(work, EXIT_REASON);
        vmwrite(GUEST_RIP, vmread(GUEST_RIP) + vmread(EXIT_LENGTH));
        ((uint32_t *)TICKS)[round] = (uint32_t)(end - start);
        work->done++;
    }
    stop(work, 0);
}

static int vcpu;
static uint8_t *memory;
static struct work *work;

static void die(const char *what) {
    fprintf(stderr, "bench_nested: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int checked(int result, const char *what) {
    if (result < 0)
        die(what);
    return result;
}

static void set(uint64_t field, uint64_t value) {
    work->field[work->fields].field = field;
    work->field[work->fields++].value = value;
}

static uint64_t msr(uint32_t index) {
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } list = {.head.nmsrs = 1, .entry.index = index};

    if (checked(ioctl(vcpu, KVM_GET_MSRS, &list), "KVM_GET_MSRS") != 1) {
        fprintf(stderr, "bench_nested: KVM offers no VMX (MSR 0x%x)\n", index);
        exit(1);
    }
    return list.entry.data;
}

static void set_msr(uint32_t index, uint64_t value) {
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } list = {.head.nmsrs = 1, .entry = {.index = index, .data = value}};

    if (checked(ioctl(vcpu, KVM_SET_MSRS, &list), "KVM_SET_MSRS") != 1)
        die("an MSR");
}

/* What must be 1, and what is wanted. */
static void set_controls(uint64_t field, uint32_t capability, uint32_t wanted) {
    const uint64_t allowed = msr(capability);

    if (wanted & ~(allowed >> 32)) {
        fprintf(stderr, "bench_nested: KVM does not offer the controls 0x%x\n", wanted);
        exit(1);
    }
    set(field, (uint32_t)allowed | wanted);
}

/* Four levels, 4 GiB to themselves in pages of 2 MiB. */
static void identity(uint64_t top, uint64_t table_bits, uint64_t page_bits) {
    uint64_t *const tables = (uint64_t *)(memory + top);

    tables[0] = (top + 0x1000) | table_bits;
    for (uint64_t i = 0; i < 4; i++)
        tables[512 + i] = (top + 0x2000 + i * 0x1000) | table_bits;
    for (uint64_t i = 0; i < 4 * 512; i++)
        tables[1024 + i] = i << 21 | page_bits | 0x80;
}

static void fill_vmcs(void) {
    set_controls(PIN_CONTROLS, 0x48d, 0);
    set_controls(PRIMARY_CONTROLS, 0x48e, 1u << 31);
    set_controls(SECONDARY_CONTROLS, 0x48b, 1u << 1 | 1u << 5);
    set_controls(EXIT_CONTROLS, 0x48f, 1u << 9 | 0xfu << 18);
    set_controls(ENTRY_CONTROLS, 0x490, 1u << 9 | 3u << 14);
    set(VPID, 1);
    set(EPT_POINTER, EPT | 0x1e);
    set(LINK_POINTER, ~0ull);
    for (uint64_t i = 0; i < 6; i++) {
        set(GUEST_ES + 2 * i, GUEST_ES + 2 * i == GUEST_CS ? CODE : DATA);
        set(GUEST_ES_LIMIT + 2 * i, 0xffffffff);
        set(GUEST_ES_RIGHTS + 2 * i, GUEST_ES_RIGHTS + 2 * i == GUEST_CS_RIGHTS ? 0xa09b : 0xc093);
    }
    set(GUEST_LDTR_RIGHTS, 0x10000);
    set(GUEST_TR, TASK);
    set(GUEST_TR_LIMIT, 0x67);
    set(GUEST_TR_RIGHTS, 0x8b);
    set(GUEST_PAT, PAT);
    set(GUEST_EFER, EFER);
    set(CR0_SHADOW, CR0);
    set(CR4_SHADOW, CR4);
    set(GUEST_CR0, CR0);
    set(GUEST_CR3, PAGE_TABLES);
    set(GUEST_CR4, CR4);
    set(GUEST_DR7, 0x400);
    set(GUEST_RSP, L2_STACK);
    set(GUEST_RIP, (uintptr_t)l2);
    set(GUEST_RFLAGS, 0x202);
    set(HOST_ES, DATA);
    set(HOST_CS, CODE);
    set(HOST_SS, DATA);
    set(HOST_DS, DATA);
    set(HOST_TR, TASK);
    set(HOST_TR_BASE, TSS);
    set(HOST_PAT, PAT);
    set(HOST_EFER, EFER);
    set(HOST_CR0, CR0);
    set(HOST_CR3, PAGE_TABLES);
    set(HOST_CR4, CR4);
    set(HOST_RSP, L1_STACK);
    set(HOST_RIP, (uintptr_t)l2_exit);
}

static void long_mode(void) {
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = (uintptr_t)l1, .rsp = L1_STACK - 8, .rdi = WORK, .rflags = 2};
    const struct kvm_segment data = {
        .limit = 0xffffffff, .selector = DATA, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};

    checked(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = sregs.cs = data;
    sregs.cs.selector = CODE;
    sregs.cs.type = 11;
    sregs.cs.db = 0;
    sregs.cs.l = 1;
    sregs.tr = (struct kvm_segment){.base = TSS, .limit = 0x67, .selector = TASK, .type = 11, .present = 1};
    sregs.cr0 = CR0;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    checked(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    checked(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static struct kvm_run *set_up(uint64_t rounds) {
    const int kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    const int vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    const size_t size = (size_t)checked(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_cpuid2 *const cpuid = calloc(1, sizeof(*cpuid) + 256 * sizeof(cpuid->entries[0]));
    struct kvm_run *run;

    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || !cpuid)
        die("memory");
    checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION,
                  &(struct kvm_userspace_memory_region){.memory_size = MEMORY,
                                                        .userspace_addr = (uintptr_t)memory}),
            "KVM_SET_USER_MEMORY_REGION");
    checked(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    vcpu = checked(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        die("mmap of kvm_run");
    cpuid->nent = 256;
    checked(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
    checked(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
    free(cpuid);

    memcpy(memory + (uintptr_t)__start_guest, __start_guest, (size_t)(__stop_guest - __start_guest));
    work = (struct work *)(memory + WORK);
    work->rounds = rounds;
    *(uint32_t *)(memory + VMXON_REGION) = *(uint32_t *)(memory + VMCS) = (uint32_t)msr(0x480) & 0x7fffffff;
    identity(PAGE_TABLES, 0x23, 0x63);
    identity(EPT, 0x7, 0x37);
    set_msr(0x3a, 5); /* IA32_FEATURE_CONTROL: locked, VMX */
    long_mode();
    fill_vmcs();
    return run;
}

static int ascending(const void *a, const void *b) {
    const uint32_t one = *(const uint32_t *)a, two = *(const uint32_t *)b;

    return one < two ? -1 : one > two;
}

int main(int argc, char **argv) {
    const size_t rounds = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;
    const size_t warm_up = (rounds + 9) / 10;
    uint32_t *ticks;
    struct kvm_run *run;
    double sum = 0;

    if (rounds == 0 || rounds + warm_up > (TICKS_END - TICKS) / 4) {
        fprintf(stderr, "usage: bench_nested ROUNDS\n");
        return 2;
    }
    run = set_up(rounds + warm_up);
    checked(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
    if (run->exit_reason != KVM_EXIT_IO || run->io.port != PORT || work->failed ||
        work->done != rounds + warm_up) {
        fprintf(stderr, "bench_nested: KVM exit %u, L1 stopped at 0x%llx after %llu rounds\n",
                run->exit_reason, (unsigned long long)work->failed, (unsigned long long)work->done);
        return 1;
    }
    ticks = (uint32_t *)(memory + TICKS) + warm_up;
    for (size_t i = 0; i < rounds; i++)
        sum += ticks[i];
    qsort(ticks, rounds, sizeof(*ticks), ascending);
    printf("round-trip %zu %u %u %.0f\n", rounds, ticks[0], ticks[(rounds - 1) / 2], sum / (double)rounds);
    return 0;
}
