//! vCPUs that write pages from ring 3, where every KVM runs them natively: one that emulates kernel code records each write of
//! that, any KVM of this code only the first one to a protected page.

use std::ops::Range;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};

use super::*;

/// Increments a word in each page from r12 to r13, for ever, one page in r14 ticks of the TSC.
#[rustfmt::skip]
const SWEEP: [u8; 48] = [
    0x0f, 0x31,                                // rdtsc
    0x48, 0xc1, 0xe2, 0x20,                    // shl rdx, 32
    0x48, 0x09, 0xd0,                          // or rax, rdx
    0x49, 0x89, 0xc7,                          // mov r15, rax
    0x4c, 0x89, 0xe6,                          // again: mov rsi, r12
    0xff, 0x06,                                // page: inc dword [rsi]
    0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00,  // add rsi, 0x1000
    0x0f, 0x31,                                // wait: rdtsc
    0x48, 0xc1, 0xe2, 0x20,                    // shl rdx, 32
    0x48, 0x09, 0xd0,                          // or rax, rdx
    0x4c, 0x39, 0xf8,                          // cmp rax, r15
    0x72, 0xf2,                                // jb wait
    0x4d, 0x01, 0xf7,                          // add r15, r14
    0x4c, 0x39, 0xee,                          // cmp rsi, r13
    0x72, 0xe1,                                // jb page
    0xeb, 0xdc,                                // jmp again
];

/// Does nothing, for ever.
const SPIN: [u8; 2] = [0xeb, 0xfe];

const SWEEP_AT: u64 = 0x8000;
const SPIN_AT: u64 = 0x9000;
/// PML4, and after it a table of 1 GiB, and one of 512 pages of 2 MiB.
const TABLES: u64 = 0x1_0000;

/// Present, writable, for ring 3, accessed and dirty: the processor has nothing to note in them.
const ENTRY: u64 = 0x67;
const LARGE: u64 = 0x80;

/// Machine code of the ring 0 that never runs: `hlt`.
pub(super) const KERNEL: [u8; 1] = [0xf4];

/// What a vCPU does.
pub(super) enum Work {
    /// Writes these pages in turn, so many bytes a second at most.
    Sweep(Range<u64>, f64),
    /// Runs, and writes nothing.
    Spin,
}

/// Puts vCPUs of a machine that has never run to work.
pub(super) fn put_to_work(machine: &Machine, works: &[Work]) {
    let ram = machine.memory().ram();
    ram.write_slice(&SWEEP, GuestAddress(SWEEP_AT)).unwrap();
    ram.write_slice(&SPIN, GuestAddress(SPIN_AT)).unwrap();
    ram.write_obj((TABLES + 0x1000) | ENTRY, GuestAddress(TABLES)).unwrap();
    ram.write_obj((TABLES + 0x2000) | ENTRY, GuestAddress(TABLES + 0x1000)).unwrap();
    for page in 0..512u64 {
        ram.write_obj((page << 21) | ENTRY | LARGE, GuestAddress(TABLES + 0x2000 + page * 8)).unwrap();
    }
    let ticks_a_second = f64::from(machine.profile().tsc_khz) * 1e3;
    machine.parts.vcpus.with(|fds| {
        for (fd, work) in fds.iter().zip(works) {
            let mut sregs = fd.get_sregs().unwrap();
            let code = segment(0x33, 0xb);
            let data = kvm_segment { l: 0, db: 1, ..segment(0x2b, 3) };
            (sregs.cs, sregs.ss, sregs.ds, sregs.es) = (code, data, data, data);
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0031, TABLES, 0x20, 0x500);
            fd.set_sregs(&sregs).unwrap();
            let mut regs = kvm_regs { rip: SPIN_AT, rflags: 2, ..Default::default() };
            if let Work::Sweep(pages, bytes_per_second) = work {
                regs.rip = SWEEP_AT;
                (regs.r12, regs.r13) = (pages.start * PAGE_BYTES, pages.end * PAGE_BYTES);
                regs.r14 = (ticks_a_second * PAGE_BYTES as f64 / bytes_per_second) as u64;
            }
            fd.set_regs(&regs).unwrap();
            fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
        }
    });
}

fn segment(selector: u16, kind: u8) -> kvm_segment {
    let rest = kvm_segment { limit: u32::MAX, present: 1, s: 1, dpl: 3, l: 1, g: 1, ..Default::default() };
    kvm_segment { selector, type_: kind, ..rest }
}

/// How often a page was written.
pub(super) fn written(machine: &Machine, page: u64) -> u32 {
    machine.memory().ram().read_obj(GuestAddress(page * PAGE_BYTES)).unwrap()
}
