//! The clock: nanoseconds since boot.
//!
//! Under KVM it is KVM's system time (`MSR_KVM_SYSTEM_TIME_NEW`, Documentation/virt/kvm/x86/msr.rst), because the VMM
//! carries that one over a live migration: the page's parameters change at the destination, whose TSC may count from
//! elsewhere and at another rate, and the time goes on. Reading it is a version check, `rdtsc` and a multiplication, all in
//! ring 3. Elsewhere it is the TSC, whose rate is asked from CPUID or measured against the PIT.

use core::arch::x86_64::_rdtsc;
use core::cell::Cell;
use core::fmt;
use core::hint::spin_loop;
use core::sync::atomic::{Ordering, compiler_fence};

use crate::{port, ring0};

/// Bounds of a believable TSC, in kHz.
const TSC_KHZ_MIN: u64 = 100_000;
const TSC_KHZ_MAX: u64 = 20_000_000;
/// Taken if nothing tells the rate: the clock runs wrong but the guest works.
const TSC_KHZ_GUESS: u64 = 2_000_000;

#[derive(Clone, Copy)]
enum Source {
    /// KVM's system time.
    System,
    /// The time stamp counter at this many kHz.
    Tsc(u64),
}

/// The clock. It never goes back.
pub struct Clock {
    source: Source,
    start: u64,
    last: Cell<u64>,
}

/// For the boot message.
impl fmt::Display for Clock {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source {
            Source::System => formatter.write_str("KVM system time"),
            Source::Tsc(khz) => write!(formatter, "TSC at {khz} kHz"),
        }
    }
}

impl Clock {
    /// Finds the best source and starts at 0.
    pub fn new() -> Self {
        let source = if ring0::facts().system_time == 1 { Source::System } else { Source::Tsc(tsc_khz()) };
        let mut clock = Self { source, start: 0, last: Cell::new(0) };
        clock.start = clock.read();
        clock
    }

    /// Nanoseconds since boot.
    pub fn now(&self) -> u64 {
        let now = self.read().saturating_sub(self.start).max(self.last.get());
        self.last.set(now);
        now
    }

    /// Nanoseconds since the program was entered, as far as the source tells: how long the boot took so far.
    pub fn since_entry(&self) -> u64 {
        // SAFETY: rdtsc is allowed in ring 3 (CR4.TSD is clear).
        let ticks = unsafe { _rdtsc() }.saturating_sub(ring0::facts().entry_tsc);
        match self.source {
            Source::System => Parameters::read().to_nanoseconds(ticks),
            Source::Tsc(khz) => ticks_to_nanoseconds(ticks, khz),
        }
    }

    fn read(&self) -> u64 {
        match self.source {
            Source::System => loop {
                let before = Parameters::read();
                // SAFETY: rdtsc is allowed in ring 3 (CR4.TSD is clear).
                let tsc = unsafe { _rdtsc() };
                if Parameters::version() == before.version {
                    let ticks = tsc.saturating_sub(before.tsc_timestamp);
                    break before.system_time.wrapping_add(before.to_nanoseconds(ticks));
                }
            },
            // SAFETY: as above.
            Source::Tsc(khz) => ticks_to_nanoseconds(unsafe { _rdtsc() }, khz),
        }
    }
}

fn ticks_to_nanoseconds(ticks: u64, khz: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(khz)) as u64
}

/// `struct pvclock_vcpu_time_info`.
struct Parameters {
    version: u32,
    tsc_timestamp: u64,
    system_time: u64,
    multiplier: u32,
    shift: i8,
}

impl Parameters {
    fn version() -> u32 {
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the page is 32 bytes, aligned to 64, and lives for ever. Volatile, since KVM changes it.
        unsafe { ring0::system_time().cast::<u32>().read_volatile() }
    }

    /// A consistent copy. KVM changes the page only while this vCPU is out of the guest, and makes the version odd
    /// meanwhile and another one afterwards.
    fn read() -> Self {
        let page = ring0::system_time();
        loop {
            let version = Self::version();
            // SAFETY: as in `version`; each field lies at its offset in the structure, naturally aligned.
            let parameters = unsafe {
                Self {
                    version,
                    tsc_timestamp: page.add(8).cast::<u64>().read_volatile(),
                    system_time: page.add(16).cast::<u64>().read_volatile(),
                    multiplier: page.add(24).cast::<u32>().read_volatile(),
                    shift: page.add(28).cast::<i8>().read_volatile(),
                }
            };
            if version.is_multiple_of(2) && Self::version() == version {
                return parameters;
            }
            spin_loop();
        }
    }

    fn to_nanoseconds(&self, ticks: u64) -> u64 {
        let shift = u32::from(self.shift.unsigned_abs()).min(63);
        let shifted = if self.shift < 0 { ticks >> shift } else { ticks << shift };
        ((u128::from(shifted) * u128::from(self.multiplier)) >> 32) as u64
    }
}

/// The TSC's rate from CPUID (KVM's leaf, then Intel's: SDM volume 3, 20.7.3), else measured.
fn tsc_khz() -> u64 {
    let facts = ring0::facts();
    let crystal = u64::from(facts.crystal_hz) * u64::from(facts.tsc_numerator);
    let told =
        [u64::from(facts.kvm_tsc_khz), crystal.checked_div(u64::from(facts.tsc_denominator)).unwrap_or(0) / 1000];
    told.into_iter()
        .chain(core::iter::once_with(median_tsc_khz))
        .find(|khz| (TSC_KHZ_MIN..=TSC_KHZ_MAX).contains(khz))
        .unwrap_or(TSC_KHZ_GUESS)
}

/// The middle of three measurements: one that the host has disturbed does not count.
fn median_tsc_khz() -> u64 {
    let mut measured = [measure_tsc_khz(), measure_tsc_khz(), measure_tsc_khz()];
    measured.sort_unstable();
    measured[1]
}

/// Compares the TSC with channel 0 of the PIT (8254) for 20 ms; 0 if there is none. Nobody hears that channel's interrupt:
/// the 8259s and the I/O APIC mask it.
fn measure_tsc_khz() -> u64 {
    const COUNTER: u16 = 0x40;
    const MODE: u16 = 0x43;
    const COUNT_DOWN_ONCE: u8 = 0x30;
    const LATCH: u8 = 0x00;
    const PIT_HZ: u64 = 1_193_182;
    const TICKS: u16 = 23_864;
    const LOOKS_MAX: u32 = 10_000;
    let sample = || {
        port::write(MODE, LATCH);
        // SAFETY: rdtsc is allowed in ring 3 (CR4.TSD is clear).
        let tsc = unsafe { _rdtsc() };
        (tsc, u16::from_le_bytes([port::read(COUNTER), port::read(COUNTER)]))
    };
    port::write(MODE, COUNT_DOWN_ONCE);
    port::write(COUNTER, 0xff);
    port::write(COUNTER, 0xff);
    let (start, first) = sample();
    for _ in 0..LOOKS_MAX {
        let (end, count) = sample();
        let ticks = first.wrapping_sub(count);
        if ticks >= TICKS {
            return (end - start) * PIT_HZ / (u64::from(ticks) * 1000);
        }
    }
    0
}
