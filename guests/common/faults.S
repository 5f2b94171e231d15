/* SPDX-License-Identifier: Apache-2.0 */
/* Functions that fault on purpose, for the CALL command and operation. */
    .text
    .globl fault_ud, fault_gp, fault_pf
    .type fault_ud, @function
    .type fault_gp, @function
    .type fault_pf, @function
fault_ud:
    ud2
    ret
    .size fault_ud, . - fault_ud
fault_gp:
    /* a non-canonical address */
    movabsq $0x8000000000000000, %rax
    movq (%rax), %rax
    ret
    .size fault_gp, . - fault_gp
fault_pf:
    /* canonical, above the 4 GiB both levels map */
    movabsq $0x4000000000, %rax
    movq %rax, (%rax)
    ret
    .size fault_pf, . - fault_pf
    .section .note.GNU-stack, "", @progbits
