//! What KVM says, and what to do about it.

use std::io;

use vmm_sys_util::errno::Error as Errno;

/// The only API version there has ever been since Linux 2.6.22 (KVM API, 4.1).
pub(super) const API_VERSION: i32 = 12;

/// KVM cannot be used, or not for such a machine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` does not exist.
    #[error(
        "/dev/kvm is missing: load the kvm_intel or kvm_amd module, enable virtualization in the firmware, or, inside a virtual machine, enable nested virtualization on its host"
    )]
    Missing,
    /// `/dev/kvm` may not be opened.
    #[error("no permission to open /dev/kvm: run as root or as a member of the group that owns it (usually kvm)")]
    Permission,
    /// Another failure to open it.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// Not the KVM API that everybody has.
    #[error("/dev/kvm speaks API version {0} and not {API_VERSION}: this is not a KVM that can be used")]
    Version(i32),
    /// The kernel's KVM is too old or cut down.
    #[error("this kernel's KVM lacks {0}: Linux 4.14 or newer with full x86 KVM support is needed")]
    Capability(&'static str),
    /// An ioctl failed.
    #[error("{call} failed{hint}")]
    Ioctl {
        /// Name of the request.
        call: &'static str,
        /// What to do, beginning with a colon, or nothing.
        hint: &'static str,
        /// What KVM said.
        #[source]
        source: Errno,
    },
}

/// Wraps the error of one ioctl.
pub(crate) fn ioctl_error(call: &'static str) -> impl Fn(Errno) -> KvmError {
    move |source| KvmError::Ioctl { call, hint: hint(source), source }
}

fn hint(error: Errno) -> &'static str {
    match error.errno() {
        libc::ENOMEM => ": the host is out of memory",
        libc::EMFILE | libc::ENFILE => ": raise the limit of open files",
        libc::EBUSY => ": another hypervisor uses the processor's virtualization",
        _ => "",
    }
}
