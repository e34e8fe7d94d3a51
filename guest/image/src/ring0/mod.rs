//! The border to ring 0: the assembled part (`entry.s`) and what it shares with ring 3, where all Rust code runs.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU8, Ordering};

global_asm!(include_str!("entry.s"), options(att_syntax));

/// Vector of the local APIC's timer; the devices have the 15 that follow.
pub const TIMER_VECTOR: u8 = 0x40;
/// Interrupt sources with a vector and a wake byte: the timer is 0.
pub const SOURCES: usize = 16;
/// Where the local APIC sends interrupts that went away before they were taken.
pub const SPURIOUS_VECTOR: u8 = 0xff;

/// What only ring 0 could find out, left at boot. The layout is that of `facts` in `entry.s`.
#[repr(C)]
pub struct Facts {
    /// Physical address of the PVH start info.
    pub start_info: u64,
    /// Time stamp counter at the entry.
    pub entry_tsc: u64,
    /// 1 if KVM was told to fill [`system_time`].
    pub system_time: u32,
    /// CPUID 0x40000010 EAX: kHz of the TSC, or 0.
    pub kvm_tsc_khz: u32,
    /// CPUID 0x15: EAX, EBX, ECX.
    pub tsc_denominator: u32,
    pub tsc_numerator: u32,
    pub crystal_hz: u32,
}

/// An exception that was nobody's plan. The layout is that of `fault` in `entry.s`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Fault {
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rsp: u64,
    pub cr2: u64,
}

unsafe extern "C" {
    #[link_name = "facts"]
    static FACTS: Facts;
    #[link_name = "fault"]
    static FAULT: Fault;
    #[link_name = "wake"]
    static WAKE: [AtomicU8; SOURCES];
    #[link_name = "system_time"]
    static mut SYSTEM_TIME: [u8; 32];
    #[link_name = "interrupts"]
    static mut INTERRUPTS: [u64; 512];
    #[link_name = "pdpt"]
    static mut PDPT: [u64; 512];
    #[link_name = "image_end"]
    static IMAGE_END: u8;
    fn idle_until_interrupt();
    fn stop_forever() -> !;
}

/// What ring 0 found out at boot.
pub fn facts() -> &'static Facts {
    // SAFETY: ring 0 wrote it before it entered ring 3 and never again.
    unsafe { &FACTS }
}

/// The last fault.
pub fn fault() -> Fault {
    // SAFETY: called on the way out of a fault; ring 0 reports no second one.
    unsafe { FAULT }
}

/// KVM's page with the parameters of its clock.
pub fn system_time() -> *const u8 {
    &raw const SYSTEM_TIME as *const u8
}

/// The page directory pointers of the lowest 512 GiB.
pub fn page_directory_pointers() -> *mut [u64; 512] {
    &raw mut PDPT
}

/// First address after the image, on a page boundary.
pub fn image_end() -> u64 {
    &raw const IMAGE_END as u64
}

/// Whether interrupt source `source` has fired since it was asked last.
pub fn take_wake(source: usize) -> bool {
    // SAFETY: the bytes are shared with interrupt handlers, and atomic.
    let wake = unsafe { &WAKE };
    wake[source].load(Ordering::Relaxed) != 0 && wake[source].swap(0, Ordering::SeqCst) != 0
}

/// Waits until an interrupt source has fired and was not yet taken; returns at once if one has.
pub fn idle() {
    // SAFETY: ring 0 handles the #GP of its hlt, see `entry.s`.
    unsafe { idle_until_interrupt() }
}

/// Halts the vCPU for good, with interrupts off.
pub fn stop() -> ! {
    // SAFETY: ring 0 handles the #GP of its hlt by stopping, see `entry.s`.
    unsafe { stop_forever() }
}

/// Ends the machine with a triple fault, which every VMM sees as a shutdown or reset.
pub fn triple_fault() -> ! {
    // SAFETY: without gates no exception can be delivered, which is the purpose. Nothing after this runs.
    unsafe {
        (&raw mut INTERRUPTS).write_volatile([0; 512]);
        core::arch::asm!("ud2", options(noreturn));
    }
}
