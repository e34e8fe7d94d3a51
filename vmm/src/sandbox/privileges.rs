//! Privileges that are given away: capabilities, and the way to new ones.

use std::io;

use rustix::process::{Resource, Rlimit, getpriority_process, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

use super::SandboxError;

/// Where Linux 6.1 and later give a userfaultfd for faults of the kernel to whoever may open it.
const USERFAULTFD: &str = "/dev/userfaultfd";

/// What a VMM that has capabilities keeps, and why. Raises the limit for niceness where it may.
pub(super) fn kept(taps_by_name: bool) -> CapabilitySet {
    // Images, certificates and sockets are opened by path, and may belong to another user than the VMM's.
    let mut kept = CapabilitySet::DAC_OVERRIDE;
    // The buffers that a migration registers with io_uring are locked memory, whose usual limit all VMMs of a host would share.
    kept |= CapabilitySet::IPC_LOCK;
    // Without the device, post-copy needs this for faults of KVM (userfaultfd(2)).
    if !std::path::Path::new(USERFAULTFD).exists() {
        kept |= CapabilitySet::SYS_PTRACE;
    }
    // Threads of a migration are niced, and get their niceness back while the guest waits for them. The limit for that does without the
    // capability, which allows real-time classes too.
    if let Err(error) = keep_niceness() {
        tracing::debug!(%error, "CAP_SYS_NICE is kept: RLIMIT_NICE cannot be raised");
        kept |= CapabilitySet::SYS_NICE;
    }
    // The tap may be another user's. One that hostd has opened needs nothing.
    if taps_by_name {
        kept |= CapabilitySet::NET_ADMIN;
    }
    kept
}

/// From here on neither this thread nor what it starts gets privileges that it has not, and of its capabilities it has those in `kept`.
pub(super) fn limit(kept: CapabilitySet) -> Result<(), SandboxError> {
    let step = |action| move |error: rustix::io::Errno| SandboxError::Step { action, source: error.into() };
    set_no_new_privs(true).map_err(step("no new privileges"))?;
    let has = capabilities(None).map_err(step("read its capabilities"))?;
    if has.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all() {
            match remove_capability_from_bounding_set(capability) {
                // One that this kernel does not know.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(step("empty the bounding set")(error)),
            }
        }
    }
    clear_ambient_capability_set().map_err(step("clear ambient capabilities"))?;
    let permitted = has.permitted & kept;
    let sets = CapabilitySets { permitted, effective: permitted, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(step("drop capabilities"))
}

/// The calling thread has no capability any more.
pub(super) fn drop_all() -> Result<(), SandboxError> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { permitted: none, effective: none, inheritable: none })
        .map_err(|error| SandboxError::Step { action: "drop capabilities", source: error.into() })
}

/// Lets threads have the niceness that the process begins with, whatever they had meanwhile.
fn keep_niceness() -> io::Result<()> {
    // As setrlimit(2) counts: 20 minus the niceness.
    let wanted = (20 - getpriority_process(None)?).unsigned_abs().into();
    let now = getrlimit(Resource::Nice);
    let enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= wanted);
    if enough(now.current) {
        return Ok(());
    }
    let maximum = if enough(now.maximum) { now.maximum } else { Some(wanted) };
    Ok(setrlimit(Resource::Nice, Rlimit { current: Some(wanted), maximum })?)
}
