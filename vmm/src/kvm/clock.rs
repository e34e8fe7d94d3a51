//! Guest time: kvm-clock and the TSC, and what a move to another host does to them.
//!
//! Guest time must not jump back, and must not jump forward by more than the pause really lasted. A pause on one host needs
//! nothing: both clocks go on. A move needs an estimate of the pause that is never too long:
//!
//! * the destination itself saw at least the time since it began to restore: a lower bound that needs no common clock;
//! * the difference of both hosts' real-time clocks, less the largest error that both kernels admit to (`adjtimex`): a
//!   better bound where the clocks are synchronised well, and worthless (negative) where they are not;
//! * on one and the same host (equal boot id) the monotonic clock says it exactly.
//!
//! The largest of these is used. A machine restored from a file goes on where it stopped.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_clock_data, kvm_device_attr, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::KvmError;
use super::error::ioctl_error;
use super::request::{KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR};

/// The time stamp counter (Intel SDM vol. 4).
pub const MSR_IA32_TSC: u32 = 0x10;

/// A clock whose error the kernel does not know is not used for anything.
const UNKNOWN_ERROR_US: u64 = u64::MAX;

/// The host's clocks at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostClock {
    /// Random id of this boot of the host.
    boot_id: String,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    monotonic_ns: u64,
    /// `CLOCK_REALTIME` in nanoseconds.
    realtime_ns: u64,
    /// Largest error of the real time in microseconds, [`UNKNOWN_ERROR_US`] if it is not synchronised.
    error_us: u64,
}

impl HostClock {
    /// Reads the clocks.
    pub fn now() -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            boot_id: boot_id.trim().to_owned(),
            monotonic_ns: read_clock(libc::CLOCK_MONOTONIC),
            realtime_ns: read_clock(libc::CLOCK_REALTIME),
            error_us: clock_error_us(),
        }
    }

    /// How long ago `saved` was, never overestimated; `at_least` is what this host saw itself.
    pub fn since(&self, saved: &Self, at_least: Duration) -> Duration {
        if !self.boot_id.is_empty() && self.boot_id == saved.boot_id {
            return Duration::from_nanos(self.monotonic_ns.saturating_sub(saved.monotonic_ns)).max(at_least);
        }
        let errors = self.error_us.saturating_add(saved.error_us).saturating_mul(1000);
        let realtime = self.realtime_ns.saturating_sub(saved.realtime_ns).saturating_sub(errors);
        Duration::from_nanos(realtime).max(at_least)
    }
}

fn read_clock(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writing; both clocks exist on every Linux.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec.cast_unsigned().saturating_mul(1_000_000_000).saturating_add(time.tv_nsec.cast_unsigned())
}

fn clock_error_us() -> u64 {
    // SAFETY: all-zero is a valid `timex`, and `modes` 0 only reads.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `timex` is valid for reading and writing.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    if state < 0 || state == libc::TIME_ERROR || timex.status & libc::STA_UNSYNC != 0 {
        UNKNOWN_ERROR_US
    } else {
        timex.maxerror.max(0).cast_unsigned()
    }
}

/// Saved state of the machine's clock, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockStateV1 {
    /// kvm-clock in nanoseconds.
    guest_ns: u64,
    /// TSC of the first vCPU at that moment.
    guest_tsc: u64,
    /// The guest's TSC frequency.
    tsc_khz: u32,
    /// The host's clocks at that moment.
    host: HostClock,
}

impl ClockStateV1 {
    /// Reads the clocks of a paused machine; `first` is its first vCPU.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if KVM refuses.
    pub fn save(vm: &VmFd, first: &VcpuFd, tsc_khz: u32) -> Result<Self, KvmError> {
        let clock = vm.get_clock().map_err(ioctl_error("KVM_GET_CLOCK"))?;
        // The host's clocks come last: the guest then appears to have stopped a little later than it did, and the pause
        // a little shorter.
        Ok(Self { guest_ns: clock.clock, guest_tsc: read_tsc(first)?, tsc_khz, host: HostClock::now() })
    }
}

/// A clock that was restored and waits for the machine to run.
#[derive(Debug)]
pub struct PendingClock {
    state: ClockStateV1,
    restored: Instant,
    advance: bool,
}

impl PendingClock {
    /// `advance`: the guest's time goes on while it moves; not so for a machine that lay in a file.
    pub fn new(state: ClockStateV1, advance: bool) -> Self {
        Self { state, restored: Instant::now(), advance }
    }

    /// Sets kvm-clock just before the vCPUs run, and returns what the first vCPU's TSC is to be now.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if KVM refuses.
    pub fn start(&self, vm: &VmFd) -> Result<u64, KvmError> {
        let pause = if self.advance {
            HostClock::now().since(&self.state.host, self.restored.elapsed())
        } else {
            Duration::ZERO
        };
        let pause_ns = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
        let clock = kvm_clock_data { clock: self.state.guest_ns.saturating_add(pause_ns), ..kvm_clock_data::default() };
        vm.set_clock(&clock).map_err(ioctl_error("KVM_SET_CLOCK"))?;
        let ticks = u128::from(pause_ns) * u128::from(self.state.tsc_khz) / 1_000_000;
        Ok(self.state.guest_tsc.wrapping_add(ticks as u64))
    }
}

fn tsc_offset_attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr: address }
}

/// The difference between a vCPU's TSC and the (scaled) TSC of its host, where KVM tells it (Linux 5.16).
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(&raw mut offset as u64);
    // SAFETY: KVM writes eight bytes to `addr`, which is `offset`.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

/// Sets what [`tsc_offset`] reads. Unlike a write to the TSC itself this is exact: KVM does not guess whether vCPUs were
/// meant to be synchronised.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if KVM refuses.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), KvmError> {
    let attribute = tsc_offset_attribute(&raw const offset as u64);
    // SAFETY: KVM reads eight bytes from `addr`, which is `offset`.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result == 0 { Ok(()) } else { Err(ioctl_error("KVM_SET_DEVICE_ATTR(TSC_OFFSET)")(Errno::last())) }
}

/// `MSR_IA32_TSC` as the guest would read it now.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if KVM refuses.
pub fn read_tsc(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let entry = kvm_msr_entry { index: MSR_IA32_TSC, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| KvmError::Capability("the TSC MSR"))?;
    match vcpu.get_msrs(&mut msrs).map_err(ioctl_error("KVM_GET_MSRS(TSC)"))? {
        1 => Ok(msrs.as_slice()[0].data),
        _ => Err(KvmError::Capability("the TSC MSR")),
    }
}

/// Makes the TSCs of all vCPUs go on from `target`, the value of the first one, with the differences that the guest had
/// given them: `saved_offsets` as [`tsc_offset`] told them at the source.
///
/// # Errors
///
/// [`KvmError::Ioctl`] if KVM refuses.
pub fn start_tsc(vcpus: &[&VcpuFd], saved_offsets: &[Option<u64>], target: u64) -> Result<(), KvmError> {
    let Some((&first, &saved_first)) = vcpus.first().zip(saved_offsets.first()) else { return Ok(()) };
    let (Some(here), Some(saved_first)) = (tsc_offset(first), saved_first) else {
        return vcpus.iter().try_for_each(|vcpu| write_tsc(vcpu, target));
    };
    let base = here.wrapping_add(target).wrapping_sub(read_tsc(first)?);
    for (vcpu, saved) in vcpus.iter().zip(saved_offsets) {
        let difference = saved.unwrap_or(saved_first).wrapping_sub(saved_first);
        set_tsc_offset(vcpu, base.wrapping_add(difference))?;
    }
    Ok(())
}

fn write_tsc(vcpu: &VcpuFd, value: u64) -> Result<(), KvmError> {
    let entry = kvm_msr_entry { index: MSR_IA32_TSC, data: value, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| KvmError::Capability("the TSC MSR"))?;
    vcpu.set_msrs(&msrs).map_err(ioctl_error("KVM_SET_MSRS(TSC)")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(boot: &str, monotonic_ms: u64, realtime_ms: u64, error_us: u64) -> HostClock {
        HostClock {
            boot_id: boot.into(),
            monotonic_ns: monotonic_ms * 1_000_000,
            realtime_ns: realtime_ms * 1_000_000,
            error_us,
        }
    }

    #[test]
    fn pause_is_never_overestimated() {
        let ms = Duration::from_millis;
        let saved = clock("a", 1000, 50_000, 500);
        // One host: the monotonic clock, whatever happened to the real time.
        assert_eq!(clock("a", 1020, 90_000, 500).since(&saved, ms(3)), ms(20));
        // Two hosts, synchronised to half a millisecond and to a millisecond and a half.
        assert_eq!(clock("b", 7, 50_020, 1500).since(&saved, ms(3)), ms(18));
        // Too uncertain, unsynchronised, or behind: what this host saw itself.
        assert_eq!(clock("b", 7, 50_020, 30_000).since(&saved, ms(3)), ms(3));
        assert_eq!(clock("b", 7, 50_020, UNKNOWN_ERROR_US).since(&saved, ms(3)), ms(3));
        assert_eq!(clock("b", 7, 40_000, 0).since(&saved, ms(3)), ms(3));
        // Without a boot id nothing says that it is the same host.
        assert_eq!(clock("", 1020, 50_010, 0).since(&clock("", 1000, 50_000, 0), ms(1)), ms(10));
    }
}
