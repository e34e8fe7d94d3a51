//! What a migration may cost, and what to do next after each round.

use std::time::Duration;

/// What the operator allows.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Longest downtime that the switchover may be expected to take.
    pub downtime: Duration,
    /// Bytes per second over all channels; `None` is no limit.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Memory channels, each its own TLS session and thread, 1 to [`Limits::MAX_STREAMS`].
    pub streams: u16,
    /// Give up after so many rounds without convergence.
    pub max_rounds: u32,
    /// Give up after so long before the switchover.
    pub timeout: Duration,
    /// When it does not converge: give up, or accept a longer downtime.
    pub force_switchover: bool,
    /// Test mode: compare full images of both stopped machines before Commit.
    pub compare_full: bool,
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
            streams: 1,
            max_rounds: 30,
            timeout: Duration::from_secs(600),
            force_switchover: false,
            compare_full: false,
        }
    }
}
