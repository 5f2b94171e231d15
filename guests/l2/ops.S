/* SPDX-License-Identifier: Apache-2.0 */
#include "../common/registers.inc"

/* void vmcall_regs(u64 seed, u64 out[16]): register n in encoding order is given seed + n; slot 4 (RSP) is not
 * written. */
    .text
    .globl _start, vmcall_regs
    .type _start, @function
    .type vmcall_regs, @function

/* RDI: control page */
_start:
    xorl %ebp, %ebp
    call l2_main
    ud2
    .size _start, . - _start

vmcall_regs:
    push_saved
    pushq %rsi
    leaq 0(%rdi), %rax
    leaq 1(%rdi), %rcx
    leaq 2(%rdi), %rdx
    leaq 3(%rdi), %rbx
    leaq 5(%rdi), %rbp
    leaq 6(%rdi), %rsi
    leaq 8(%rdi), %r8
    leaq 9(%rdi), %r9
    leaq 10(%rdi), %r10
    leaq 11(%rdi), %r11
    leaq 12(%rdi), %r12
    leaq 13(%rdi), %r13
    leaq 14(%rdi), %r14
    leaq 15(%rdi), %r15
    leaq 7(%rdi), %rdi
    vmcall
    store_registers
    popq %rsi
    pop_saved
    ret
    .size vmcall_regs, . - vmcall_regs
    .section .note.GNU-stack, "", @progbits
