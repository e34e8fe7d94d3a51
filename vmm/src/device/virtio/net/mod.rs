//! The network card of a machine (virtio 1.2, section 5.1), over a tap.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use migration::guest::{DeviceSlot, StatePayload};

use super::Wiring;
use super::mmio::MmioTransport;
use crate::config::NetworkConfig;
use crate::device::{Device, DeviceError};

/// Number of queues: receive, transmit.
pub const QUEUES: usize = 2;

/// A tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {}

/// An open tap and the name and MAC address of the card that it serves.
pub struct Tap {
    _private: (),
}

impl Tap {
    /// Opens the tap of a card.
    ///
    /// # Errors
    ///
    /// [`TapError`] if it is missing, in use, of the wrong kind, or not permitted.
    pub fn open(_config: &NetworkConfig) -> Result<Self, TapError> {
        Ok(Self { _private: () })
    }
}

/// What passed through a card since the process started.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Bytes received by the guest.
    pub receive_bytes: AtomicU64,
    /// Frames received by the guest.
    pub receive_frames: AtomicU64,
    /// Bytes sent by the guest.
    pub transmit_bytes: AtomicU64,
    /// Frames sent by the guest.
    pub transmit_frames: AtomicU64,
    /// Frames of either direction that could not be delivered.
    pub dropped_frames: AtomicU64,
}

/// A network card. It also implements [`crate::device::Device`].
pub struct Net {
    counters: Arc<NetCounters>,
}

impl Net {
    /// A new card.
    ///
    /// # Errors
    ///
    /// If its thread or descriptors cannot be made.
    pub fn new(_tap: Tap, _wiring: Wiring) -> Result<Self, DeviceError> {
        Ok(Self { counters: Arc::default() })
    }

    /// A card as it was saved, paused.
    ///
    /// # Errors
    ///
    /// As [`Net::new`], or if the state does not fit.
    pub fn restore(tap: Tap, wiring: Wiring, _state: &StatePayload) -> Result<Self, DeviceError> {
        Self::new(tap, wiring)
    }

    /// The registers, to be put on the bus.
    pub fn transport(&self) -> MmioTransport {
        unreachable!("skeleton")
    }

    /// Tells the network where this card now is: RARP and gratuitous ARP frames, sent at once and repeated a few times
    /// from the card's own thread. Returns at once.
    pub fn announce(&self) {}

    /// What passed.
    pub fn counters(&self) -> &Arc<NetCounters> {
        &self.counters
    }
}

impl Device for Net {
    fn slot(&self) -> DeviceSlot {
        DeviceSlot { name: "virtio-net/".into(), version: 1 }
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
