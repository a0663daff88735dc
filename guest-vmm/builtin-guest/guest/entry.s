# Ring 0, first half: the PVH entry and the start of further VPs, up to ring 3.
#
# All of ring 0 is in entry.s and gates.s and avoids what a host that interprets ring 0 cannot do: no SSE, no `int`,
# no `popcnt`. Everything else runs in ring 3. AT&T syntax.

.set COM1, 0x3f8
.set IMAGE_BASE, 0x100000           # as in image.ld
.set CODE32, 0x08                   # selectors of boot_gdt, and of every VP's own table in vps.rs
.set DATA, 0x10
.set CODE64, 0x18
.set USER_DATA, 0x23
.set USER_CODE, 0x2b
.set TASK, 0x30

# The two pages that each started VP has, laid out by vps.rs.
.set VP_BLOCK_SHIFT, 13
.set VP_BLOCK_GDTR, 64
.set VP_BLOCK_RING0_STACK, 0x1000
.set VP_BLOCK_RING3_STACK, 0x2000

# Turns on long mode (compatibility mode until the far jump that must follow), and SSE for ring 3.
# Clobbers EAX, ECX and EDX; needs no stack.
.macro ENABLE_LONG_MODE
    movl $page_map, %eax
    movl %eax, %cr3
    movl $0x620, %eax               # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx          # EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80000033, %eax          # PG, NE, ET, MP, PE
    movl %eax, %cr0
.endm

# Goes to ring 3 for good, to \function on the stack in RCX with RDI as its argument; needs a ring 0 stack.
# Interrupts stay off there: GATE_WAIT turns them on while it waits. IOPL stays zero, for a host that runs ring 3
# natively drops it: the boot VP's task has an I/O permission bitmap instead.
.macro ENTER_RING3 function
    movl $TASK, %eax
    ltr %ax
    lidt gates_pointer
    movl $USER_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    subq $8, %rcx                   # where a call would have left its return address
    pushq $USER_DATA
    pushq %rcx
    pushq $0x2
    pushq $USER_CODE
    pushq $\function
    iretq
.endm

# Xen's note 18 names the 32-bit entry of the PVH boot protocol.
.section .note.pvh, "a", @note
.balign 4
.long 4, 4, 18
.asciz "Xen"
.long pvh_entry

.section .text.entry, "ax", @progbits

# The PVH entry: protected mode without paging, flat segments, interrupts off, no stack, start_info in EBX.
# READY comes before anything else: the time until its first byte is what a launch is measured by.
.code32
.globl pvh_entry
pvh_entry:
    movl $COM1, %edx
    movb $'R', %al
    outb %al, %dx
    movb $'E', %al
    outb %al, %dx
    movb $'A', %al
    outb %al, %dx
    movb $'D', %al
    outb %al, %dx
    movb $'Y', %al
    outb %al, %dx
    movb $10, %al
    outb %al, %dx
    lgdtl boot_gdtr
    ENABLE_LONG_MODE
    ljmpl $CODE64, $boot_vp64

.code64
boot_vp64:
    movl $DATA, %eax
    movl %eax, %ss
    movq $boot_ring0_stack, %rsp
    movl $boot_task, %eax           # the task's address goes into the three places a descriptor has for it
    movw %ax, boot_gdt + TASK + 2
    shrl $16, %eax
    movb %al, boot_gdt + TASK + 4
    movb %ah, boot_gdt + TASK + 7
    movq $boot_ring0_stack, boot_task + 4
    movw $104, boot_task + 102      # the I/O permission bitmap follows; ring 3 clears it before its first I/O
    movl %ebx, %edi
    movq $boot_ring3_stack, %rcx
    ENTER_RING3 boot_main

# What a started VP runs first, in real mode in any page below 1 MiB: vps.rs copies it there.
.code16
.globl trampoline_start
trampoline_start:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdtr - trampoline_start
    movl $0x11, %eax                # ET, PE; caches on, which INIT left off
    movl %eax, %cr0
    ljmpl $CODE32, $started_vp32
.balign 4
trampoline_gdtr:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt
.globl trampoline_end
trampoline_end:

.code32
started_vp32:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    ENABLE_LONG_MODE
    ljmpl $CODE64, $started_vp64

.code64
started_vp64:
    movl $1, %eax
    lock xaddl %eax, next_vp_block  # many VPs may come here at once: each takes a block of its own
    movl %eax, %ebx
    shlq $VP_BLOCK_SHIFT, %rbx
    addq vp_blocks, %rbx
    lgdt VP_BLOCK_GDTR(%rbx)
    movl $DATA, %eax
    movl %eax, %ss
    leaq VP_BLOCK_RING0_STACK(%rbx), %rsp
    leaq VP_BLOCK_RING3_STACK(%rbx), %rcx
    ENTER_RING3 started_main

.section .data.boot, "aw", @progbits

# Identity map of the first GiB, for ring 3 too, in 2 MiB pages; address_space.rs adds the rest.
.balign 4096
.globl page_map
page_map:
    .quad page_directory_pointers + 7
    .fill 511, 8, 0
.globl page_directory_pointers
page_directory_pointers:
    .quad first_page_directory + 7
    .fill 511, 8, 0
first_page_directory:
    .set page, 0
    .rept 512
    .quad page + 0x87               # present, writable, user, 2 MiB
    .set page, page + 0x200000
    .endr

.balign 8
.globl boot_gdt
boot_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00af9b000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .quad 0x0000890000002068, 0     # the task: 104 bytes, the bitmap's 8 KiB and its end marker
boot_gdt_end:
boot_gdtr:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt

# Set by vps.rs before it starts VPs.
.balign 8
.globl vp_blocks, next_vp_block
vp_blocks: .quad 0
next_vp_block: .long 0

# Not cleared by anybody, for it is in use when ring 3 clears .bss.
.section .noinit, "aw", @nobits
.balign 16
.globl boot_task
boot_task:
    .skip 104 + 8192 + 1
.balign 4096
    .skip 4096
boot_ring0_stack:
    .skip 32768
boot_ring3_stack:
    .skip 8192
fault_stack:
