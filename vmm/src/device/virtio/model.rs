//! What the driver is told of a device.

use std::ops::Range;

/// What the driver is told of a device.
#[derive(Clone, Debug)]
pub struct Model {
    /// Name of the saved state: `virtio-block/disk0`.
    pub name: String,
    /// Virtio device type (virtio 1.2, section 5).
    pub device_id: u32,
    /// Features offered.
    pub features: u64,
    /// Largest size of each queue, powers of two.
    pub queue_sizes: Vec<u16>,
    /// Version of the saved state.
    pub state_version: u16,
    /// Bytes of the configuration space that the driver may write.
    pub writable: &'static [Range<usize>],
}
