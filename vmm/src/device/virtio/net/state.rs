//! Saved state of a network card.

use serde::{Deserialize, Serialize};

use crate::device::virtio::TransportStateV1;

/// Version of [`NetStateV1`]; the first had no control queue.
pub const VERSION: u16 = 2;

/// A paused card has no frame in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV1 {
    /// Registers and queues.
    pub transport: TransportStateV1,
    /// MAC address, which must not change under a running guest.
    pub mac: [u8; 6],
    /// IPv4 addresses that the guest was seen to use.
    pub addresses: Vec<[u8; 4]>,
    /// Whether the guest was told that its link is up.
    pub link_up: bool,
}
