//! What a machine cannot do, and what to do about it.

use crate::api::MachineState;
use crate::device::DeviceError;
use crate::disk::DiskError;
use crate::kvm::KvmError;
use crate::memory::TrackError;
use crate::vcpu::{StopReason, VcpuError};

/// The machine cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Not in this state.
    #[error("the machine is {state:?}: it cannot be {action}{remedy}")]
    State {
        /// What it does now.
        state: MachineState,
        /// What was asked.
        action: &'static str,
        /// What to do, beginning with a comma, or nothing.
        remedy: &'static str,
    },
    /// It stopped by itself.
    #[error("the machine has stopped by itself: {0}")]
    Stopped(StopReason),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Dirty tracking.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// One of its disks.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Its guest cannot be asked.
    #[error(
        "the guest does not listen to Ctrl-Alt-Del: it has no driver for a keyboard (Linux: CONFIG_SERIO_I8042, CONFIG_KEYBOARD_ATKBD and CONFIG_VT), or not yet; turn it off from inside"
    )]
    Deaf,
    /// It has no such disk.
    #[error("the machine has no disk {id}; it has {there}")]
    NoDisk {
        /// What was asked for.
        id: String,
        /// Those that it has.
        there: String,
    },
    /// Throttling.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}
