# Ring 0, second half: the ways back into ring 0, which are exceptions, interrupts and the gate.
#
# The gate is how ring 3 asks for the few things that only ring 0 can do. It is `ud2` with GATE_MAGIC in EAX and the
# wish in EDI, because a host that interprets ring 0 has no `int n`, while every host delivers an exception.

.set GATE_MAGIC, 0x67617465         # this and the wishes as in gate.rs
.set GATE_WAIT, 0
.set GATE_HALT, 1
.set GATE_CRASH, 2
.set GATE_BREAKPOINT, 3
.set GATE_WRITE_MSR, 4
.set GATE_PRINT, 5

.set FIRST_INTERRUPT, 0x40
.set INTERRUPTS, 16
.set APIC_BASE_MSR, 0x1b
.set X2APIC_EOI_MSR, 0x80b

.section .text.gates, "ax", @progbits
.code64

# One stub per exception, 16 bytes each: an error code where the processor pushes none, and the vector.
.balign 16
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if (0x60227d00 >> vector) & 1
    .else
    pushq $0
    .endif
    .if vector == 6
    jmp gate
    .else
    pushq $vector
    jmp fault
    .endif
    .set vector, vector + 1
.endr

# An exception that nobody asked for ends in ring 3's fault_main(vector, error, rip, cr2), which tells and halts.
.balign 16
fault:
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    pushq $USER_DATA
    pushq $fault_stack - 8
    pushq $0x2
    pushq $USER_CODE
    pushq $fault_main
    iretq

gate:
    cmpl $GATE_MAGIC, %eax
    jne gate_is_fault
    testb $3, 16(%rsp)
    jz gate_is_fault
    addq $8, %rsp                   # the stub's error code
    addq $2, (%rsp)                 # past the ud2
    cmpl $GATE_WAIT, %edi
    je gate_wait
    cmpl $GATE_HALT, %edi
    je gate_halt
    cmpl $GATE_CRASH, %edi
    je gate_crash
    cmpl $GATE_BREAKPOINT, %edi
    je gate_breakpoint
    cmpl $GATE_WRITE_MSR, %edi
    je gate_write_msr
    cmpl $GATE_PRINT, %edi
    je gate_print
    iretq
gate_is_fault:
    pushq $6
    jmp fault

# Interrupts are off from ring 3's look for work until the `hlt`, so none is lost between the two.
gate_wait:
    sti
    hlt
    cli
    iretq

gate_halt:
    cli
    hlt
    jmp gate_halt

# No gates, then an exception: shutdown by triple fault.
gate_crash:
    lidt no_gates_pointer
    ud2

gate_breakpoint:
    int3
    iretq

# ESI: the register, RDX: its new value. Clobbers RAX, RCX and RDX.
gate_write_msr:
    movl %esi, %ecx
    movl %edx, %eax
    shrq $32, %rdx
    wrmsr
    iretq

# RSI: bytes for the serial port, RDX: how many. Clobbers RCX, RDX and RSI. A host that runs ring 3 natively takes a
# detour for each of its port accesses; here it does not.
gate_print:
    movq %rdx, %rcx
    movl $COM1, %edx
    rep outsb
    iretq

# int3 in ring 0 was asked for.
.balign 16
breakpoint:
    iretq

# Interrupts only end a wait: say that they were taken, in the way of the mode that this VP's APIC is in.
.balign 16
interrupt:
    pushq %rax
    pushq %rcx
    pushq %rdx
    movl $APIC_BASE_MSR, %ecx
    rdmsr
    testl $0x400, %eax              # EXTD
    jnz interrupt_x2apic
    movl $0xfee000b0, %eax
    movl $0, (%rax)
    jmp interrupt_end
interrupt_x2apic:
    movl $X2APIC_EOI_MSR, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
interrupt_end:
    popq %rdx
    popq %rcx
    popq %rax
    iretq

# Not acknowledged, as SDM 3A section 11.9 asks for.
.balign 16
spurious:
    iretq

.section .data.boot
# The table of gates is constant because the image lies within 64 KiB of its base.
.macro GATE handler
    .word \handler - IMAGE_BASE
    .word CODE64
    .word 0x8e00
    .word IMAGE_BASE >> 16
    .quad 0
.endm

.balign 16
gates:
    .set vector, 0
    .rept 32
    .if vector == 3
    GATE breakpoint
    .else
    GATE exception_stubs + 16 * vector
    .endif
    .set vector, vector + 1
    .endr
    .fill (FIRST_INTERRUPT - 32) * 2, 8, 0
    .rept INTERRUPTS - 1
    GATE interrupt
    .endr
    GATE spurious
gates_end:
gates_pointer:
    .word gates_end - gates - 1
    .quad gates
no_gates_pointer:
    .word 0
    .quad 0
