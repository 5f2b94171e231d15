/* SPDX-License-Identifier: Apache-2.0 */
/* What both levels need of the instruction set. */
#ifndef NVMX_GUESTS_CPU_H
#define NVMX_GUESTS_CPU_H

#include "../abi.h"

/* Built by vectors.S. */
struct trap_frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error_code;
    u64 rip, cs, rflags, rsp, ss;
};

extern const u64 idt[512];
extern const u8 vectors[];

struct __attribute__((packed)) table_register {
    u16 limit;
    u64 base;
};

static inline void out8(u16 port, u8 value) {
    asm volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}
static inline void out16(u16 port, u16 value) {
    asm volatile("outw %0, %1" ::"a"(value), "Nd"(port));
}
static inline void out32(u16 port, u32 value) {
    asm volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline u8 in8(u16 port) {
    u8 value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u16 in16(u16 port) {
    u16 value;
    asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u32 in32(u16 port) {
    u32 value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u64 rdmsr(u32 index) {
    u32 low, high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (u64)high << 32 | low;
}

static inline void wrmsr(u32 index, u64 value) {
    asm volatile("wrmsr" ::"c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static inline u64 rdtsc(void) {
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}

static inline void cpuid(u32 leaf, u32 subleaf, u32 out[4]) {
    asm volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(subleaf));
}

static inline u64 read_cr2(void) {
    u64 value;
    asm volatile("mov %%cr2, %0" : "=r"(value));
    return value;
}

/* One MOV each: an emulated or skipped access must be exactly one instruction. */
static inline u64 load(u64 address, u32 size) {
    u64 value = 0;
    switch (size) {
    case 1: {
        u8 byte;
        asm volatile("movb (%1), %0" : "=q"(byte) : "r"(address) : "memory");
        return byte;
    }
    case 2: {
        u16 word;
        asm volatile("movw (%1), %0" : "=r"(word) : "r"(address) : "memory");
        return word;
    }
    case 4: {
        u32 dword;
        asm volatile("movl (%1), %0" : "=r"(dword) : "r"(address) : "memory");
        return dword;
    }
    default: asm volatile("movq (%1), %0" : "=r"(value) : "r"(address) : "memory"); return value;
    }
}

static inline void store(u64 address, u32 size, u64 value) {
    switch (size) {
    case 1: asm volatile("movb %0, (%1)" ::"q"((u8)value), "r"(address) : "memory"); break;
    case 2: asm volatile("movw %0, (%1)" ::"r"((u16)value), "r"(address) : "memory"); break;
    case 4: asm volatile("movl %0, (%1)" ::"r"((u32)value), "r"(address) : "memory"); break;
    default: asm volatile("movq %0, (%1)" ::"r"(value), "r"(address) : "memory"); break;
    }
}

static inline void record_fault(struct nvmx_fault *fault, u32 level, const struct trap_frame *frame) {
    fault->level = level;
    fault->vector = (u32)frame->vector;
    fault->error_code = frame->error_code;
    fault->rip = frame->rip;
    fault->rsp = frame->rsp;
    fault->rflags = frame->rflags;
    fault->cr2 = read_cr2();
    fault->count++;
}

#endif
