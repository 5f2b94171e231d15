/* SPDX-License-Identifier: Apache-2.0 */
/*
 * IDT and exception stubs, the same for both levels. The linker script puts .vectors at IMAGE_BASE and every
 * stub is 16 bytes long: so the gates are assembly-time constants and the table needs no start-up code.
 */
#define CODE_SELECTOR 0x08
/* 64-bit interrupt gate, present, DPL 0 */
#define GATE_TYPE 0x8e00

    .section .vectors, "ax"
    .globl vectors
vectors:
    .set vector, 0
    .rept 256
    .balign 16, 0xcc
    /* #DF #TS #NP #SS #GP #PF #AC #CP push an error code */
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    pushq $0
    .endif
    pushq $vector
    jmp trap_entry
    .set vector, vector + 1
    .endr

    .balign 16
trap_entry:
    cld
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rbp
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, %rdi
    call trap
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rbp
    popq %rbx
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq

    .section .rodata.idt, "a"
    .balign 16
    .globl idt
idt:
    .set vector, 0
    .rept 256
    .word (IMAGE_BASE + 16 * vector) & 0xffff
    .word CODE_SELECTOR
    /* #DF and NMI may find any stack: L1 gives them their own */
    .if (NVMX_USE_IST == 1) && (vector == 2 || vector == 8)
    .word GATE_TYPE | 1
    .else
    .word GATE_TYPE
    .endif
    .word (IMAGE_BASE + 16 * vector) >> 16
    .long 0
    .long 0
    .set vector, vector + 1
    .endr
    .size idt, . - idt
    .section .note.GNU-stack, "", @progbits
