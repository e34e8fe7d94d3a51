//! Saved state of a balloon.

use serde::{Deserialize, Serialize};

use crate::device::virtio::TransportStateV1;

/// Version of [`BalloonStateV1`].
pub const VERSION: u16 = 1;

/// A paused balloon has no page in its hands. Which pages the guest has given back is not kept: it knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStateV1 {
    /// Registers and queues.
    pub transport: TransportStateV1,
    /// Pages that the guest is asked to give back.
    pub target: u32,
    /// Pages that it says it has given back.
    pub actual: u32,
    /// What it writes into free pages.
    pub poison: u32,
    /// The last id of a session of free page hints.
    pub hint_id: u32,
}
