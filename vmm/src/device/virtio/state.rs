//! Saved state of the transport, the part that all virtio devices share.

use serde::{Deserialize, Serialize};

/// One queue: what the driver has set up, and how far the device has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStateV1 {
    /// Number of descriptors.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Index of the next chain to take.
    pub next_avail: u16,
    /// Index of the next entry of the used ring.
    pub next_used: u16,
}

/// The registers of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportStateV1 {
    /// Device status (virtio 1.2, section 2.1), without `DEVICE_NEEDS_RESET`.
    pub status: u8,
    /// `DEVICE_NEEDS_RESET`.
    pub needs_reset: bool,
    /// Features that the driver has accepted.
    pub driver_features: u64,
    /// `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// `QueueSel`.
    pub queue_select: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// The queues, in order.
    pub queues: Vec<QueueStateV1>,
}
