//! Devices of a machine, and what the machine may expect of each of them.
//!
//! # Order of a stop and of a start
//!
//! ```text
//! settle:  (before a switchover) disks finish what is in flight, vCPUs still run
//! pause:   vCPUs stop ──> Device::pause of every device ──> Device::save ──> (memory, disks, interrupt controllers are read)
//! resume:  Device::resume of every device ──> vCPUs run
//! ```
//!
//! * vCPUs stop **first**: a device is never paused while a vCPU can still write to its registers, so no new request can
//!   arrive between the pause and the save. vCPUs resume **last**.
//! * After [`Device::pause`] has returned, nothing of this device is in flight: every request that it had taken from the
//!   guest is answered in guest memory and on the disk, and its interrupt has been raised. From then until
//!   [`Device::resume`] it writes neither to guest memory nor to a disk nor to a network, and it raises no interrupt. The
//!   state of the interrupt controllers is therefore read **after** all devices were paused.
//! * Requests that the guest had queued but that the device had not taken stay in the queue, in guest memory, and are
//!   taken after the resume, here or at the destination.
//! * A restored device is paused. A new one runs, and does nothing before the guest's driver starts it.

use migration::guest::{DeviceSlot, StatePayload};

mod bounded;
pub mod bus;
pub mod keyboard;
mod line;
pub mod power;
pub mod serial;
pub mod state;
pub mod virtio;

pub use line::Line;
pub use state::StateError;

/// A window of registers, in guest-physical memory (MMIO) or among the I/O ports.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset` into the window. Whatever is not defined there reads as zeroes.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` into the window. Whatever is not defined there is ignored.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device whose work goes on behind its registers. The order of the calls is described in the [module](self).
pub trait Device: Send + Sync {
    /// Name of the saved state, for example `virtio-block/disk0`, and the version that [`Device::save`] writes.
    fn slot(&self) -> DeviceSlot;

    /// Finishes what is in flight and takes nothing more, while vCPUs still run: a pause that follows at once has nothing to
    /// wait for. Undone by [`Device::resume`]. Only for devices whose requests may take long; others do nothing.
    ///
    /// # Errors
    ///
    /// As [`Device::pause`].
    fn settle(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Finishes what is in flight and stops. Idempotent.
    ///
    /// # Errors
    ///
    /// If the device's worker has ended: its last words were logged.
    fn pause(&self) -> Result<(), DeviceError>;

    /// Goes on, beginning with what waits in the queues. Idempotent.
    ///
    /// # Errors
    ///
    /// As [`Device::pause`].
    fn resume(&self) -> Result<(), DeviceError>;

    /// The state to travel. The device must be paused.
    ///
    /// # Errors
    ///
    /// If the device is not paused, or its worker has ended.
    fn save(&self) -> Result<StatePayload, DeviceError>;
}

/// A device cannot be made, stopped, started or saved.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Its thread, ring or event descriptor could not be made.
    #[error("{device}: cannot {action}; check the limits of the process (threads, open files, locked memory)")]
    Setup {
        /// Which device.
        device: String,
        /// What was tried.
        action: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The worker thread has ended.
    #[error("{device}: its worker thread has ended, see the log; the machine must be stopped")]
    WorkerGone {
        /// Which device.
        device: String,
    },
    /// `save` of a running device.
    #[error("{device}: must be paused before its state is saved")]
    NotPaused {
        /// Which device.
        device: String,
    },
    /// The wiring does not fit the device.
    #[error("{device}: has {queues} queues but was wired with {notify} notification descriptors")]
    Wiring {
        /// Which device.
        device: String,
        /// How many it has.
        queues: usize,
        /// How many it got.
        notify: usize,
    },
    /// A saved state cannot be restored.
    #[error(transparent)]
    State(#[from] StateError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] crate::disk::DiskError),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] virtio::net::TapError),
}
