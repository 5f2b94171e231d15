/* SPDX-License-Identifier: Apache-2.0 */
#include "../abi.h"

/*
 * u32 vmx_enter(u64 *regs, u32 launch)
 *
 * HOST_RSP never changes while a VMCS stays on a vCPU: it points at frame_l2 in the CPU area, so that on exit
 * one push saves a register to frame_scratch and the address of the L2's register file is at hand.
 */
#define STATUS_VMFAIL_INVALID 2
#define STATUS_VMFAIL_VALID 3
#define STATUS_FAULT 4

    .text
    .globl _start, vmx_enter, vmx_exit, restart
    .type _start, @function
    .type vmx_enter, @function
    .type vmx_exit, @function
    .type restart, @function

_start:
    call l1_main
1:  jmp 1b
    .size _start, . - _start

/* void restart(cpu): forget the stack and take commands again */
restart:
    movq NVMX_CPU_STACK_TOP(%rdi), %rsp
    xorl %ebp, %ebp
    call serve
    ud2
    .size restart, . - restart

vmx_enter:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rdi, %gs:NVMX_CPU_FRAME_L2
    movq %rsp, %gs:NVMX_CPU_FRAME_RSP
    movq $.Lfault, %gs:NVMX_CPU_RECOVER
    testl %esi, %esi
    movq 0x00(%rdi), %rax
    movq 0x08(%rdi), %rcx
    movq 0x10(%rdi), %rdx
    movq 0x18(%rdi), %rbx
    movq 0x28(%rdi), %rbp
    movq 0x30(%rdi), %rsi
    movq 0x40(%rdi), %r8
    movq 0x48(%rdi), %r9
    movq 0x50(%rdi), %r10
    movq 0x58(%rdi), %r11
    movq 0x60(%rdi), %r12
    movq 0x68(%rdi), %r13
    movq 0x70(%rdi), %r14
    movq 0x78(%rdi), %r15
    movq 0x38(%rdi), %rdi
    jz 1f
    vmlaunch
    jmp 2f
1:  vmresume
2:  /* only a failed entry gets here */
    movl $STATUS_VMFAIL_VALID, %eax
    movl $STATUS_VMFAIL_INVALID, %ecx
    cmovcl %ecx, %eax
    jmp 3f
.Lfault:
    movl $STATUS_FAULT, %eax
3:  movq %gs:NVMX_CPU_FRAME_RSP, %rsp
    jmp 4f

vmx_exit:
    pushq %rax
    movq 8+0(%rsp), %rax
    movq %rcx, 0x08(%rax)
    movq %rdx, 0x10(%rax)
    movq %rbx, 0x18(%rax)
    movq %rbp, 0x28(%rax)
    movq %rsi, 0x30(%rax)
    movq %rdi, 0x38(%rax)
    movq %r8, 0x40(%rax)
    movq %r9, 0x48(%rax)
    movq %r10, 0x50(%rax)
    movq %r11, 0x58(%rax)
    movq %r12, 0x60(%rax)
    movq %r13, 0x68(%rax)
    movq %r14, 0x70(%rax)
    movq %r15, 0x78(%rax)
    popq %rcx
    movq %rcx, 0x00(%rax)
    movq %gs:NVMX_CPU_FRAME_RSP, %rsp
    xorl %eax, %eax
4:  movq $0, %gs:NVMX_CPU_RECOVER
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
    .size vmx_enter, . - vmx_enter
    .section .note.GNU-stack, "", @progbits
