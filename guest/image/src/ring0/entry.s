/* Ring 0: everything of the guest that runs in it. From the PVH entry to ring 3, and the few instructions of each
   interrupt. It is straight-line code over tables that are assembled, because ring 0 may be emulated instruction by
   instruction (KVM without VMX or SVM does so) and the emulator knows only plain instructions. It never touches SSE state,
   so ring 3's registers need not be saved.

   Every address in here is RING0 + (label - ring0_start): the linker script places this section at RING0. */

.set RING0, 0x200000
.set IDENTITY, 0x87             /* present, writable, user, 2 MiB page */
.set UNCACHED, 0x9f             /* the same with write-through and cache-disable */
.set TABLE, 0x07                /* present, writable, user */
.set KERNEL_CODE, 0x08
.set USER_DATA, 0x1b            /* selector 0x18, RPL 3 */
.set USER_CODE, 0x23            /* selector 0x20, RPL 3 */
.set TASK, 0x28
.set KVM_SYSTEM_TIME, 0x4b564d01        /* MSR_KVM_SYSTEM_TIME_NEW */
/* The local APIC's end-of-interrupt register through its alias in the highest 2 GiB (see `pml4`), where a store takes one
   instruction and no register. */
.set APIC_EOI, 0xfffffffffee000b0

/* XEN_ELFNOTE_PHYS32_ENTRY: the 32-bit entry point of the PVH boot protocol (Xen, docs/misc/pvh.pandoc). */
.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18
.asciz "Xen"
.quad pvh_entry

.section .ring0, "awx", @progbits
.balign 4096
.globl ring0_start
ring0_start:

/* ---- page tables: 4 GiB identity-mapped for ring 3 (U bit), device memory above 3 GiB uncached; Rust adds RAM above
   4 GiB. PML4 entry 511 shows the fourth GiB once more, 4 GiB below the top of the address space. ---- */
.globl pml4
pml4:
    .quad RING0 + (pdpt - ring0_start) + TABLE
    .fill 510, 8, 0
    .quad RING0 + (pdpt_top - ring0_start) + TABLE
.globl pdpt
pdpt:
    .quad RING0 + (directories - ring0_start) + TABLE
    .quad RING0 + (directories - ring0_start) + 0x1000 + TABLE
    .quad RING0 + (directories - ring0_start) + 0x2000 + TABLE
    .quad RING0 + (directories - ring0_start) + 0x3000 + TABLE
    .fill 508, 8, 0
pdpt_top:
    .fill 511, 8, 0
    .quad RING0 + (directories - ring0_start) + 0x3000 + TABLE
directories:
    .set page, 0
.rept 1536
    .quad page + IDENTITY
    .set page, page + 0x200000
.endr
.rept 512
    .quad page + UNCACHED
    .set page, page + 0x200000
.endr

/* ---- task state segment: RSP0, one stack for double faults, and an all-zero I/O bitmap, which lets ring 3 use every
   port whatever IOPL says (Intel SDM volume 1, 19.5.2) ---- */
.balign 64
task_state:
    .long 0
    .quad stack0_top            /* RSP0 */
    .quad 0, 0, 0
    .quad stack_double_fault_top /* IST1 */
    .quad 0, 0, 0, 0, 0, 0, 0
    .word 0
    .word io_bitmap - task_state
io_bitmap:
    .fill 8192, 1, 0
    .byte 0xff
task_state_end:

.balign 16
descriptors:
    .quad 0
    .quad 0x00af9b000000ffff    /* 0x08: ring 0 code, 64 bit */
    .quad 0x00cf93000000ffff    /* 0x10: ring 0 data */
    .quad 0x00cff3000000ffff    /* 0x18: ring 3 data */
    .quad 0x00affb000000ffff    /* 0x20: ring 3 code, 64 bit */
    .word task_state_end - task_state - 1   /* 0x28: the task, 16 bytes */
    .word (RING0 + (task_state - ring0_start)) & 0xffff
    .byte ((RING0 + (task_state - ring0_start)) >> 16) & 0xff
    .byte 0x89, 0
    .byte (RING0 + (task_state - ring0_start)) >> 24
    .long 0, 0
descriptors_end:
descriptors_pointer:
    .word descriptors_end - descriptors - 1
    .quad RING0 + (descriptors - ring0_start)

/* ---- interrupt descriptor table: interrupt gates, so handlers run with interrupts off ---- */
.macro GATE handler, stack=0
    .word (RING0 + (\handler - ring0_start)) & 0xffff
    .word KERNEL_CODE
    .byte \stack, 0x8e
    .word (RING0 + (\handler - ring0_start)) >> 16
    .long 0, 0
.endm
.altmacro
.macro EXCEPTION_GATE number, stack=0
    GATE exception_\number, \stack
.endm
.macro DEVICE_GATE number
    GATE device_\number
.endm
.balign 16
.globl interrupts
interrupts:
    .set number, 0
.rept 32
    .if number == 8
    EXCEPTION_GATE %number, 1
    .else
    EXCEPTION_GATE %number
    .endif
    .set number, number + 1
.endr
    .fill 32 * 16, 1, 0         /* 0x20 to 0x3f */
    GATE timer                  /* 0x40 */
    .set number, 1
.rept 15                        /* 0x41 to 0x4f: devices */
    DEVICE_GATE %number
    .set number, number + 1
.endr
    .fill (0xff - 0x50) * 16, 1, 0
    GATE spurious               /* 0xff */
interrupts_end:
.globl interrupts_pointer
interrupts_pointer:
    .word interrupts_end - interrupts - 1
    .quad RING0 + (interrupts - ring0_start)

/* ---- what ring 3 reads (`ring0::Facts`) and shares (`wake`) ---- */
.balign 64
.globl wake
wake:                           /* one byte for each of the 16 interrupt sources: it has fired */
    .fill 16, 1, 0
.globl facts
facts:
facts_start_info:       .quad 0     /* physical address of the PVH start info */
facts_entry_tsc:        .quad 0
facts_system_time:      .long 0     /* 1: KVM fills `system_time` */
facts_kvm_tsc_khz:      .long 0     /* CPUID 0x40000010 EAX */
facts_tsc_denominator:  .long 0     /* CPUID 0x15 EAX, EBX, ECX */
facts_tsc_numerator:    .long 0
facts_crystal_hz:       .long 0
.balign 8
.globl fault
fault:                          /* `ring0::Fault` */
fault_vector:   .quad 0
fault_error:    .quad 0
fault_rip:      .quad 0
fault_cs:       .quad 0
fault_rsp:      .quad 0
fault_cr2:      .quad 0
fault_seen:     .quad 0
.balign 64
.globl system_time
system_time:    .fill 32, 1, 0  /* struct pvclock_vcpu_time_info */

/* ---- from the PVH entry (32-bit, paging off, EBX = start info) to ring 3 ---- */
.code32
.globl pvh_entry
pvh_entry:
    cld
    movl %ebx, facts_start_info
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0x620, %eax           /* PAE, OSFXSR, OSXMMEXCPT */
    movl %eax, %cr4
    movl $0xc0000080, %ecx      /* EFER.LME */
    movl $0x100, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80000033, %eax      /* PG, NE, ET, MP, PE */
    movl %eax, %cr0
    lgdtl descriptors_pointer
    ljmpl $KERNEL_CODE, $entry64

.code64
entry64:
    movl $USER_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movq $stack0_top, %rsp
    lidt interrupts_pointer
    movl $TASK, %eax
    ltr %ax
    movb $0xff, %al             /* the 8259s stay out of it: everything comes through the I/O APIC */
    outb %al, $0x21
    outb %al, $0xa1
    rdtsc
    movl %eax, facts_entry_tsc
    movl %edx, facts_entry_tsc + 4

    /* CPUID is asked here: in ring 3 it may be answered by the host's processor instead of the machine's table. */
    xorl %eax, %eax
    cpuid
    cmpl $0x15, %eax
    jb 1f
    movl $0x15, %eax
    xorl %ecx, %ecx
    cpuid
    movl %eax, facts_tsc_denominator
    movl %ebx, facts_tsc_numerator
    movl %ecx, facts_crystal_hz
1:  movl $1, %eax
    cpuid
    testl %ecx, %ecx            /* bit 31: there is a hypervisor */
    jns 3f
    movl $0x40000000, %eax
    cpuid
    cmpl $0x4b4d564b, %ebx      /* "KVMKVMKVM" */
    jne 3f
    cmpl $0x564b4d56, %ecx
    jne 3f
    cmpl $0x4d, %edx
    jne 3f
    cmpl $0x40000010, %eax
    jb 2f
    movl $0x40000010, %eax
    cpuid
    movl %eax, facts_kvm_tsc_khz
2:  movl $0x40000001, %eax
    cpuid
    testb $8, %al               /* KVM_FEATURE_CLOCKSOURCE2 */
    jz 3f
    movl $KVM_SYSTEM_TIME, %ecx
    movl $system_time + 1, %eax
    xorl %edx, %edx
    wrmsr
    movl $1, facts_system_time

3:  pushq $USER_DATA
    pushq $stack_top - 8        /* as after a call */
    pushq $0x202                /* interrupts on */
    pushq $USER_CODE
    pushq $ring3_entry
    iretq

/* ---- interrupts ---- */
timer:
    movb $1, wake
    movl $0, APIC_EOI
    iretq
.macro DEVICE number
device_\number:
    movb $1, wake + \number
    movl $0, APIC_EOI
    iretq
.endm
    .set number, 1
.rept 15
    DEVICE %number
    .set number, number + 1
.endr
spurious:
    iretq

/* ---- exceptions. Ring 3's two privileged instructions mean something: the one at `idle_instruction` waits for an
   interrupt, the one at `stop_instruction` stops for good. Anything else is a defect, which Rust reports: the handler
   returns to `ring3_fault` instead of the instruction that faulted. ---- */
exception_13:
    cmpq $idle_instruction, 8(%rsp)
    jne 2f
    addq $8, %rsp               /* the error code */
    incq (%rsp)                 /* the length of hlt */
    /* An interrupt that came after ring 3 looked for work has set its byte: then there is no waiting. From here on none
       is lost, since sti takes effect after the hlt. */
    cmpq $0, wake
    jne 1f
    cmpq $0, wake + 8
    jne 1f
    sti
    hlt
1:  iretq
2:  pushq $13
    jmp exception

.macro EXCEPTION number, has_error_code
exception_\number:
    .if \has_error_code == 0
    pushq $0
    .endif
    pushq $\number
    jmp exception
.endm
    .irp number, 0, 1, 2, 3, 4, 5, 6, 7, 9, 15, 16, 18, 19, 20, 22, 23, 24, 25, 26, 27, 28, 31
    EXCEPTION \number, 0
    .endr
    .irp number, 8, 10, 11, 12, 14, 17, 21, 29, 30
    EXCEPTION \number, 1
    .endr

exception:                      /* vector, error code, RIP, CS, RFLAGS, RSP, SS */
    cmpq $stop_instruction, 16(%rsp)
    je stop
    cmpq $0, fault_seen         /* a fault while reporting a fault */
    jne stop
    movq $1, fault_seen
    popq fault_vector
    popq fault_error
    popq fault_rip
    popq fault_cs
    movq 8(%rsp), %rax
    movq %rax, fault_rsp
    movq %cr2, %rax
    movq %rax, fault_cr2
    pushq $USER_DATA
    pushq $stack_fault_top - 8
    pushq $2                    /* interrupts off */
    pushq $USER_CODE
    pushq $ring3_fault
    iretq
stop:
    cli
    hlt
    jmp stop

.globl idle_until_interrupt
idle_until_interrupt:
idle_instruction:
    hlt
    ret
.globl stop_forever
stop_forever:
stop_instruction:
    hlt
    jmp stop_forever
.noaltmacro

/* ---- stacks: ring 3's main one, the one that reports faults, RSP0 and IST1 ---- */
.section .stack, "aw", @nobits
.balign 4096
    .skip 0x40000
stack_top:
    .skip 0x4000
stack_fault_top:
    .skip 0x1000
stack0_top:
    .skip 0x1000
stack_double_fault_top:
.text
