/* SPDX-License-Identifier: Apache-2.0 */
#include "../abi.h"
#include "../common/registers.inc"

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
    push_saved
    movq %rdi, %gs:NVMX_CPU_FRAME_L2
    movq %rsp, %gs:NVMX_CPU_FRAME_RSP
    movq $.Lfault, %gs:NVMX_CPU_RECOVER
    testl %esi, %esi
    load_registers
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
    store_registers
    movq %gs:NVMX_CPU_FRAME_RSP, %rsp
    xorl %eax, %eax
4:  movq $0, %gs:NVMX_CPU_RECOVER
    pop_saved
    ret
    .size vmx_enter, . - vmx_enter
    .section .note.GNU-stack, "", @progbits
