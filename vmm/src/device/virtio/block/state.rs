//! Saved state of a disk device.

use serde::{Deserialize, Serialize};

use crate::device::virtio::TransportStateV1;

/// Version of [`BlockStateV1`].
pub const VERSION: u16 = 1;

/// A paused device has no request in flight, so its registers and the shape of its disk are all there is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStateV1 {
    /// Registers and queues.
    pub transport: TransportStateV1,
    /// Capacity in bytes that the guest was told last.
    pub bytes: u64,
    /// Whether the guest was told that it cannot write.
    pub read_only: bool,
}
