//! What the operator allows.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How memory and disks may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MigrationMode {
    /// Rounds, then stop-and-copy; a guest that writes too fast stays where it is.
    Precopy,
    /// One round, then the guest runs at the destination and the rest follows it.
    Postcopy,
    /// Pre-copy that falls over to post-copy when it does not converge.
    #[default]
    #[serde(alias = "auto")]
    Hybrid,
}

/// What the operator allows.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Longest downtime that the switchover may be expected to take.
    pub downtime: Duration,
    /// Bytes per second over all channels; `None` is no limit.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Memory channels, each its own TLS session and thread at both ends, 1 to [`Limits::MAX_STREAMS`].
    pub streams: u16,
    /// Give up after so many rounds without convergence.
    pub max_rounds: u32,
    /// Give up after so long before the switchover.
    pub timeout: Duration,
    /// When it does not converge: give up, or accept a longer downtime.
    pub force_switchover: bool,
    /// Test mode: compare full images of both stopped machines before Commit.
    pub compare_full: bool,
    /// Whether the guest may run at the destination before all of it is there.
    pub mode: MigrationMode,
    /// Most of its time, in per cent, for which a vCPU may be held so that it dirties less; 0 holds none.
    pub throttle_max_percent: u8,
}

impl Limits {
    /// Most memory channels in one migration.
    pub const MAX_STREAMS: u16 = 16;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(50),
            bandwidth_bytes_per_second: None,
            streams: 2,
            max_rounds: 30,
            timeout: Duration::from_secs(600),
            force_switchover: false,
            compare_full: false,
            mode: MigrationMode::default(),
            throttle_max_percent: 0,
        }
    }
}
