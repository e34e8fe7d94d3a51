//! Opening `/dev/kvm` and checking, once and up front, that it can do what a machine needs.

use std::io;

use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_XSAVE2, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::errno::Error as Errno;

use super::dirty_ring;
use super::error::{API_VERSION, KvmError, ioctl_error};

/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`: `KVM_GET_DIRTY_LOG` copies, `KVM_CLEAR_DIRTY_LOG` write-protects (KVM API, 7.12).
/// `KVM_DIRTY_LOG_INITIALLY_SET` is not asked for: it would report every page after logging starts, and a destination,
/// which logs from the resume on, could no longer tell what the guest wrote.
const MANUAL_PROTECT_ENABLE: u64 = 1;

/// What this host's KVM can do beyond what is required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Bytes that `KVM_GET_XSAVE2` writes; 4096 without that capability.
    pub xsave_bytes: usize,
    /// Dirty pages are cleared by `KVM_CLEAR_DIRTY_LOG`.
    pub manual_dirty_log: bool,
    /// Each vCPU can have a dirty ring: the capability that gives it, and the most entries.
    pub dirty_ring: Option<(u32, u32)>,
    /// The TSC frequency that a guest sees can differ from the host's.
    pub tsc_scaling: bool,
    /// The LAPIC timer has a TSC deadline mode.
    pub tsc_deadline: bool,
    /// `KVM_KVMCLOCK_CTRL`.
    pub kvmclock_ctrl: bool,
    /// `KVM_SET_CLOCK` and `KVM_GET_CLOCK` know the real time and the host's TSC.
    pub clock_realtime: bool,
    /// Recommended and largest number of vCPUs.
    pub max_vcpus: usize,
}

/// An open `/dev/kvm` with its capabilities.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    capabilities: Capabilities,
}

const REQUIRED: [(Cap, &str); 15] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP (in-kernel interrupt controllers)"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

impl Host {
    /// Opens `/dev/kvm` and checks it.
    ///
    /// # Errors
    ///
    /// [`KvmError`] that says what is missing and how to get it.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::Permission,
            code => KvmError::Open(io::Error::from_raw_os_error(code)),
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::Version(version));
        }
        if let Some((_, name)) = REQUIRED.into_iter().find(|&(cap, _)| !kvm.check_extension(cap)) {
            return Err(KvmError::Capability(name));
        }
        let value = |cap: u32| kvm.check_extension_raw(cap.into());
        let clock_flags = kvm.check_extension_int(Cap::AdjustClock).cast_unsigned();
        let clock_realtime = kvm_bindings::KVM_CLOCK_REALTIME | kvm_bindings::KVM_CLOCK_HOST_TSC;
        let capabilities = Capabilities {
            xsave_bytes: usize::try_from(value(KVM_CAP_XSAVE2)).unwrap_or(0).max(4096),
            manual_dirty_log: value(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & 1 == 1,
            dirty_ring: dirty_ring::offered(&kvm),
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            kvmclock_ctrl: kvm.check_extension(Cap::KvmclockCtrl),
            clock_realtime: clock_flags & clock_realtime == clock_realtime,
            max_vcpus: kvm.get_max_vcpus(),
        };
        Ok(Self { kvm, capabilities })
    }

    /// What it can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The device itself.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// A virtual machine without memory or devices. With `ring_entries` each of its vCPUs will have a dirty ring of so many
    /// entries, which this host must offer; without, its dirty log is in the best mode that the host has.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if KVM refuses.
    pub fn create_vm(&self, ring_entries: Option<u32>) -> Result<VmFd, KvmError> {
        let vm = retry_interrupted(|| self.kvm.create_vm()).map_err(ioctl_error("KVM_CREATE_VM"))?;
        if let (Some(entries), Some((cap, _))) = (ring_entries, self.capabilities.dirty_ring) {
            dirty_ring::enable(&vm, cap, entries)?;
        } else if self.capabilities.manual_dirty_log {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
            cap.args[0] = MANUAL_PROTECT_ENABLE;
            vm.enable_cap(&cap).map_err(ioctl_error("KVM_ENABLE_CAP(MANUAL_DIRTY_LOG_PROTECT2)"))?;
        }
        Ok(vm)
    }
}

/// `KVM_CREATE_VM` may answer EINTR when a signal arrives while it waits for a lock.
fn retry_interrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other,
        }
    }
}

/// For tests: KVM, or `None` with a printed line where there is none. With `HEADROOM_REQUIRE_KVM=1` its absence is a
/// failure.
#[cfg(test)]
#[expect(clippy::print_stderr, reason = "the reader of a test log shall see what was skipped")]
pub(crate) fn host_for_test(test: &str) -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) if std::env::var_os("HEADROOM_REQUIRE_KVM").is_some_and(|value| value == "1") => {
            panic!("HEADROOM_REQUIRE_KVM=1 is set and {error}")
        }
        Err(error) => {
            eprintln!("skipped {test}: {error}");
            None
        }
    }
}
