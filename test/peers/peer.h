// SPDX-License-Identifier: Apache-2.0
// What the C programs that `npm run bench:kvm` compares with have in common: plain ioctls, checked.
#pragma once

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static inline long check(long result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}
#define CALL(fd, request, argument) check(ioctl(fd, request, argument), #request)

static inline double now_us(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

struct machine {
    int kvm, vm, vcpu;
    uint8_t *code;
    struct kvm_run *run;
};

/// A VM with one page of 16-bit code at 0x1000 and a vCPU about to execute it.
static inline struct machine machine_with(const uint8_t *code, size_t size) {
    struct machine machine;
    machine.kvm = (int)check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "open /dev/kvm");
    machine.vm = (int)CALL(machine.kvm, KVM_CREATE_VM, 0);
    machine.code = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(machine.code, code, size);
    struct kvm_userspace_memory_region region = {
        .slot = 0, .guest_phys_addr = 0x1000, .memory_size = 4096, .userspace_addr = (uintptr_t)machine.code};
    CALL(machine.vm, KVM_SET_USER_MEMORY_REGION, &region);
    machine.vcpu = (int)CALL(machine.vm, KVM_CREATE_VCPU, 0);
    const size_t run_size = (size_t)CALL(machine.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    machine.run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine.vcpu, 0);
    struct kvm_sregs sregs;
    CALL(machine.vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    CALL(machine.vcpu, KVM_SET_SREGS, &sregs);
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
    CALL(machine.vcpu, KVM_SET_REGS, &regs);
    return machine;
}
