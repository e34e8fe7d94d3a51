//! The local APIC (xAPIC, Intel SDM volume 3, chapter 12): its one-shot timer, and the routes of device interrupts
//! through the I/O APIC.
//!
//! One shot, because an idle guest then takes no tick at all, and because setting it is one store from ring 3 that KVM
//! handles without leaving the kernel; the deadline form would take a `wrmsr` in ring 0.

use super::{Clock, MILLISECOND, SECOND};
use crate::ring0;

const LOCAL_APIC: usize = 0xfee0_0000;
const ID: usize = 0x20;
const SPURIOUS: usize = 0xf0;
const LVT_TIMER: usize = 0x320;
const LVT_LINT0: usize = 0x350;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;

const ENABLED: u32 = 0x100;
const MASKED: u32 = 0x1_0000;
const DIVIDE_BY_16: u32 = 0x3;

const IO_APIC: usize = 0xfec0_0000;
const IO_APIC_WINDOW: usize = 0x10;

/// How long the timer is compared with the clock at boot.
const CALIBRATION: u64 = 2 * MILLISECOND;
/// The timer is never set for longer: a wrong rate or a lost tick then costs this much.
const LONGEST: u64 = SECOND;

fn read(register: usize) -> u32 {
    // SAFETY: a register of the local APIC, identity-mapped and uncached.
    unsafe { ((LOCAL_APIC + register) as *const u32).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as for `read`.
    unsafe { ((LOCAL_APIC + register) as *mut u32).write_volatile(value) }
}

/// The one-shot timer.
pub struct Timer {
    /// Ticks of the timer in a second.
    ticks_per_second: u64,
    /// What it is set for.
    armed: Option<u64>,
}

impl Timer {
    /// Switches the local APIC on and measures the timer's rate.
    pub fn new(clock: &Clock) -> Self {
        write(SPURIOUS, ENABLED | u32::from(ring0::SPURIOUS_VECTOR));
        write(LVT_LINT0, MASKED);
        write(DIVIDE, DIVIDE_BY_16);
        write(LVT_TIMER, MASKED | u32::from(ring0::TIMER_VECTOR));
        write(INITIAL_COUNT, u32::MAX);
        let start = (clock.now(), read(CURRENT_COUNT));
        while clock.now() - start.0 < CALIBRATION {}
        let end = (read(CURRENT_COUNT), clock.now());
        write(INITIAL_COUNT, 0);
        write(LVT_TIMER, u32::from(ring0::TIMER_VECTOR));
        let ticks = u64::from(start.1 - end.0);
        Self { ticks_per_second: (ticks * SECOND / (end.1 - start.0)).max(1), armed: None }
    }

    /// Makes sure that the timer interrupts at `deadline` or earlier.
    pub fn arm(&mut self, now: u64, deadline: u64) {
        if ring0::take_wake(0) || self.armed.is_some_and(|armed| armed <= now) {
            self.armed = None;
        }
        let deadline = deadline.min(now + LONGEST);
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
        let wait = deadline.saturating_sub(now);
        let ticks = (wait * self.ticks_per_second / SECOND).clamp(1, u64::from(u32::MAX));
        self.armed = Some(deadline);
        write(INITIAL_COUNT, ticks as u32);
    }
}

/// Routes a global system interrupt to this vCPU as interrupt source `source`: edge-triggered and active high, as KVM's
/// irqfds raise it (82093AA I/O APIC, 3.2.4).
pub fn route(gsi: u32, source: usize) {
    let redirection = 0x10 + gsi * 2;
    let vector = u32::from(ring0::TIMER_VECTOR) + source as u32;
    for (register, value) in [(redirection + 1, read(ID) & 0xff00_0000), (redirection, vector)] {
        // SAFETY: the I/O APIC's select and data registers, identity-mapped and uncached.
        unsafe {
            (IO_APIC as *mut u32).write_volatile(register);
            ((IO_APIC + IO_APIC_WINDOW) as *mut u32).write_volatile(value);
        }
    }
}
