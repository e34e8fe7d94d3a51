//! Virtual processors: what they are, how they run, and how they are stopped.

pub mod compat;
pub mod cpuid;
pub mod exit;
mod feature_names;
pub mod msr;
pub mod ring_choice;
pub mod ring_probe;
pub mod run;
mod shared;
pub mod state;
mod stop;
pub mod throttle;

use crate::kvm::KvmError;

pub use run::Vcpus;
pub use shared::StopHandle;
pub use stop::StopReason;

/// A vCPU cannot be made, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its thread.
    #[error("cannot start the thread of vCPU {id}: raise the limit of processes (ulimit -u, pids cgroup)")]
    Thread {
        /// Which vCPU.
        id: u8,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The thread that throttles vCPUs.
    #[error("cannot start the thread that throttles vCPUs: raise the limit of processes (ulimit -u, pids cgroup)")]
    Clock(#[source] std::io::Error),
    /// Its extended state comes from a processor with more of it.
    #[error(
        "the saved extended processor state has {found} bytes, this host's KVM takes {room}: restore it on a host whose processor has the same features"
    )]
    ExtendedState {
        /// Bytes in the payload.
        found: usize,
        /// Bytes that this host takes.
        room: usize,
    },
}
