/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loops that nvmx bench measures. They stand in L2's image because it is mapped at both levels: L1 calls
 * those that return, an L2 starts in those that do not (its stack is there, RDI is the record).
 */
#include "l2.h"

#define PAGE 4096ull

void bench_vmcall(void) __attribute__((noreturn));
void bench_rdmsr_l2(struct nvmx_bench *bench) __attribute__((noreturn));
void bench_in_l2(struct nvmx_bench *bench) __attribute__((noreturn));
void bench_touch_l2(struct nvmx_bench *bench) __attribute__((noreturn));
u64 bench_cpuid(struct nvmx_bench *bench);
u64 bench_rdmsr(struct nvmx_bench *bench);
u64 bench_in(struct nvmx_bench *bench);
u64 bench_touch(struct nvmx_bench *bench);
u64 bench_rw(struct nvmx_bench *bench);

/* An L2 that does nothing but exit: what is left is the round trip. */
void bench_vmcall(void) {
    for (;;)
        vmcall(0);
}

static void take(struct nvmx_bench *bench, u64 turn, u64 start) {
    const u64 ticks = rdtsc() - start;

    ((u32 *)bench->samples)[turn] = ticks >> 32 ? 0xffffffff : (u32)ticks;
}

/* An exit that is L0's own business wherever it comes from; from L2 CPUID would go to L1. */
u64 bench_cpuid(struct nvmx_bench *bench) {
    u64 turn;

    for (turn = 0; turn < bench->turns; turn++) {
        u32 out[4];
        const u64 start = rdtsc();

        cpuid(0, 0, out);
        take(bench, turn, start);
    }
    return turn;
}

u64 bench_rdmsr(struct nvmx_bench *bench) {
    u64 turn;

    for (turn = 0; turn < bench->turns; turn++) {
        const u64 start = rdtsc();

        rdmsr((u32)bench->operand);
        take(bench, turn, start);
    }
    return turn;
}

u64 bench_in(struct nvmx_bench *bench) {
    u64 turn;

    for (turn = 0; turn < bench->turns; turn++) {
        const u64 start = rdtsc();

        in8((u16)bench->operand);
        take(bench, turn, start);
    }
    return turn;
}

void bench_rdmsr_l2(struct nvmx_bench *bench) {
    for (;;)
        vmcall(bench_rdmsr(bench));
}

void bench_in_l2(struct nvmx_bench *bench) {
    for (;;)
        vmcall(bench_in(bench));
}

static void touch_next(struct nvmx_bench *bench) {
    bench->touched++;
    store(bench->start + bench->next * PAGE, 8, bench->touched);
    bench->next++;
    if (bench->next == bench->pages)
        bench->next = 0;
}

u64 bench_touch(struct nvmx_bench *bench) {
    for (u64 i = 0; i < bench->share; i++)
        touch_next(bench);
    return bench->share;
}

void bench_touch_l2(struct nvmx_bench *bench) {
    for (;;) {
        touch_next(bench);
        vmcall(0);
    }
}

/* The host wrote the number of the last round to the first word of each page; ours goes to the second. */
u64 bench_rw(struct nvmx_bench *bench) {
    for (u64 i = 0; i < bench->pages; i++) {
        const u64 page = bench->start + i * PAGE;

        if (load(page, 8) != bench->round)
            bench->wrong++;
        store(page + 8, 8, bench->round + 1);
    }
    return ++bench->round;
}
