/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The work of nvmx bench's measured loops with plain ioctls and nothing else, to see what our layers add: a
 * guest in real mode touches 128 pages and writes a port, then the host discards the pages at once (map),
 * page by page (unmap), or moves the slot away and back (move). One line per kind of work: name, rounds, and
 * the TSC ticks of the quickest, the median and the average round. Usage: bench_memslots ROUNDS
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <x86intrin.h>

#define PAGE 4096ul
#define GPA 0x10000ul
#define SIZE 0x80000ul
#define AWAY 0x100000ul
#define PORT 0x10

/* mov ax, 0x1000; next: mov ds, ax; mov [0], al; add ax, 0x100; cmp ax, 0x9000; jne next; out PORT, al; again
 */
static const uint8_t code[] = {0xb8, 0x00, 0x10, 0x8e, 0xd8, 0xa2, 0x00, 0x00, 0x05, 0x00,
                               0x01, 0x3d, 0x00, 0x90, 0x75, 0xf3, 0xe6, PORT, 0xeb, 0xec};

static int vm, vcpu;
static struct kvm_run *run;
static uint8_t *memory;

static void die(const char *what) {
    fprintf(stderr, "bench_memslots: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int checked(int result, const char *what) {
    if (result < 0)
        die(what);
    return result;
}

static uint64_t ticks(void) {
    unsigned aux;
    return __rdtscp(&aux);
}

static void *map_pages(size_t size) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (at == MAP_FAILED)
        die("mmap");
    return at;
}

static void set_slot(uint32_t slot, uint64_t gpa, uint64_t size, void *at) {
    struct kvm_userspace_memory_region region = {
        .slot = slot, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)at};

    checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

static void set_up(void) {
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rflags = 2};
    int kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    uint8_t *image = map_pages(PAGE);

    vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    vcpu = checked(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu,
               0);
    if (run == MAP_FAILED)
        die("mmap of kvm_run");
    memcpy(image, code, sizeof(code));
    memory = map_pages(SIZE);
    set_slot(0, 0, PAGE, image);
    set_slot(1, GPA, SIZE, memory);
    checked(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    checked(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    checked(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void run_guest(void) {
    checked(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
    if (run->exit_reason != KVM_EXIT_IO || run->io.port != PORT) {
        fprintf(stderr, "bench_memslots: unexpected exit %u\n", run->exit_reason);
        exit(1);
    }
}

static void discard_all(void) {
    checked(madvise(memory, SIZE, MADV_DONTNEED), "madvise");
}

static void discard_pages(void) {
    for (size_t at = 0; at < SIZE; at += PAGE)
        checked(madvise(memory + at, PAGE, MADV_DONTNEED), "madvise");
}

static void move(void) {
    set_slot(1, AWAY, SIZE, memory);
    set_slot(1, GPA, SIZE, memory);
}

static int ascending(const void *a, const void *b) {
    const uint64_t one = *(const uint64_t *)a, two = *(const uint64_t *)b;

    return one < two ? -1 : one > two;
}

static void measure(const char *name, void (*work)(void), size_t rounds) {
    uint64_t *times = calloc(rounds, sizeof(*times));
    double sum = 0;

    if (!times)
        die("calloc");
    run_guest();
    work();
    for (size_t i = 0; i < rounds; i++) {
        const uint64_t start = ticks();

        run_guest();
        work();
        times[i] = ticks() - start;
        sum += (double)times[i];
    }
    qsort(times, rounds, sizeof(*times), ascending);
    printf("%s %zu %llu %llu %.0f\n", name, rounds, (unsigned long long)times[0],
           (unsigned long long)times[(rounds - 1) / 2], sum / (double)rounds);
    free(times);
}

int main(int argc, char **argv) {
    const size_t rounds = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;

    if (rounds == 0) {
        fprintf(stderr, "usage: bench_memslots ROUNDS\n");
        return 2;
    }
    set_up();
    measure("map", discard_all, rounds);
    measure("unmap", discard_pages, rounds);
    measure("move", move, rounds);
    return 0;
}
