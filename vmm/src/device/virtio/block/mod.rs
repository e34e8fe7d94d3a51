//! The disk of a machine (virtio 1.2, section 5.2).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use migration::guest::{DeviceSlot, StatePayload};

use super::Wiring;
use super::mmio::MmioTransport;
use crate::device::{Device, DeviceError};
use crate::disk::RawDisk;

/// Number of queues.
pub const QUEUES: usize = 1;

/// What the guest did to a disk since the process started.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Bytes written.
    pub write_bytes: AtomicU64,
}

/// A disk device. It also implements [`crate::device::Device`].
pub struct Block {
    disk: Arc<RawDisk>,
    counters: Arc<BlockCounters>,
}

impl Block {
    /// A new device over `disk`.
    ///
    /// # Errors
    ///
    /// If its thread, ring or descriptors cannot be made.
    pub fn new(disk: Arc<RawDisk>, _wiring: Wiring) -> Result<Self, DeviceError> {
        Ok(Self { disk, counters: Arc::default() })
    }

    /// A device as it was saved, paused.
    ///
    /// # Errors
    ///
    /// As [`Block::new`], or if the state does not fit.
    pub fn restore(disk: Arc<RawDisk>, wiring: Wiring, _state: &StatePayload) -> Result<Self, DeviceError> {
        Self::new(disk, wiring)
    }

    /// The registers, to be put on the bus.
    pub fn transport(&self) -> MmioTransport {
        unreachable!("skeleton")
    }

    /// The disk behind it.
    pub fn disk(&self) -> &Arc<RawDisk> {
        &self.disk
    }

    /// What the guest did.
    pub fn counters(&self) -> &Arc<BlockCounters> {
        &self.counters
    }
}

impl Device for Block {
    fn slot(&self) -> DeviceSlot {
        DeviceSlot { name: "virtio-block/".into(), version: 1 }
    }

    fn pause(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self) -> Result<StatePayload, DeviceError> {
        Err(DeviceError::NotPaused { device: self.slot().name })
    }
}
