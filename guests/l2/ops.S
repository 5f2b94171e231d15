/* SPDX-License-Identifier: Apache-2.0 */
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
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
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
    pushq %rax
    movq 8(%rsp), %rax
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
    popq %rsi
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
    .size vmcall_regs, . - vmcall_regs
    .section .note.GNU-stack, "", @progbits
