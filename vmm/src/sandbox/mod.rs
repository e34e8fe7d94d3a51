//! What this process may still ask of the kernel: no more than a VMM needs.
//!
//! A guest that breaks into the code which serves it has what that code's thread has. So the process gives away what it does not need
//! before its first thread starts, and the threads that read what guests write give away more:
//!
//! | | whole process ([`enter`]) | vCPUs and devices ([`confine`]) |
//! | --- | --- | --- |
//! | new privileges | none, by whatever program it would execute (`no_new_privs`) | the same |
//! | capabilities | those of [`privileges::kept`] | none |
//! | files by path | those of its configuration and those that are named ([`Paths`]), where any are named | none: they open nothing |
//! | system calls | [`calls::FORBIDDEN`] end the process; what is not in [`calls::process`] is answered with `ENOSYS` | what is not in [`calls::of`] either, with `EPERM` |
//!
//! Threads inherit all of it. Rings of io_uring, whose requests no filter sees, are restricted where they are made
//! ([`crate::disk::Ring`]). What none of this protects from is in `docs/design/0011-sandbox.md`.

mod calls;
mod paths;
mod privileges;
mod seccomp;

use std::io;
use std::sync::OnceLock;

use seccompiler::BpfProgram;

pub use calls::Role;
pub use paths::{AllowedPath, Paths};

/// The process cannot be confined as it must be.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel refused one step.
    #[error("cannot confine the process ({action}): the kernel must have seccomp filters; --no-sandbox runs without")]
    Step {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Paths.
    #[error(
        "cannot confine the process to its files: the kernel must have Landlock or know nothing of it; --no-sandbox runs without"
    )]
    Paths(#[from] landlock::RulesetError),
    /// A filter could not be compiled or installed.
    #[error("cannot filter system calls: the kernel must have seccomp filters; --no-sandbox runs without")]
    Filter(#[from] seccompiler::Error),
}

/// Filters of the threads, once the process has been confined.
static FILTERS: OnceLock<Filters> = OnceLock::new();

#[derive(Debug)]
struct Filters {
    vcpu: BpfProgram,
    device: BpfProgram,
}

/// Confines this process and all threads that it will start; to be called while there is one. With `taps_by_name` it keeps what attaching
/// to a tap by its name may need. With `paths` it opens nothing else, where the kernel has Landlock.
///
/// # Errors
///
/// [`SandboxError`]; the process is to end then.
pub fn enter(taps_by_name: bool, paths: Option<&Paths>) -> Result<(), SandboxError> {
    let pid = std::process::id();
    privileges::limit(privileges::kept(taps_by_name))?;
    // Its own calls are on no list of the filters.
    if let Some(paths) = paths
        && !paths::limit(paths)?
    {
        tracing::warn!("files can be opened wherever this process's user may: the kernel has no Landlock (Linux 5.13)");
    }
    let filters = Filters { vcpu: seccomp::of_role(Role::Vcpu)?, device: seccomp::of_role(Role::Device)? };
    for filter in seccomp::of_process(pid)? {
        seccompiler::apply_filter(&filter)?;
    }
    // Nobody else sets it: this is called once, before there are threads.
    let _ = FILTERS.set(filters);
    Ok(())
}

/// Confines the calling thread to what its role needs, for the rest of its life. Does nothing in a process that was not confined.
///
/// # Errors
///
/// [`SandboxError`]; the thread must not serve a guest then.
pub fn confine(role: Role) -> Result<(), SandboxError> {
    let Some(filters) = FILTERS.get() else { return Ok(()) };
    privileges::drop_all()?;
    let filter = match role {
        Role::Vcpu => &filters.vcpu,
        Role::Device => &filters.device,
    };
    Ok(seccompiler::apply_filter(filter)?)
}

#[cfg(test)]
mod tests;
