//! This host and what it sees of its peers.

use serde::{Deserialize, Serialize};

use super::{Capacity, DrainState, Usage};

/// Pressure stall information: share of the last ten seconds in which some task waited, in percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pressure {
    /// For a processor.
    pub cpu_percent: Option<f64>,
    /// For memory.
    pub memory_percent: Option<f64>,
    /// For I/O.
    pub io_percent: Option<f64>,
}

/// A peer as seen from here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerView {
    /// Its name.
    pub host: String,
    /// Its pool.
    pub pool: String,
    /// Where its daemon listens.
    pub address: String,
    /// It answered within the last few intervals.
    pub live: bool,
    /// When it last answered.
    pub last_seen_unix_ms: Option<u64>,
    /// Why it did not, if it did not.
    pub error: Option<String>,
}

/// `PUT /v1/host/bandwidth`: kept over restarts, until the configuration says something else than it says now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostBandwidth {
    /// Bytes per second over all migrations that leave this host, at least 1 MiB; `null` is no limit.
    pub bandwidth_bytes_per_second: Option<u64>,
}

/// `GET /v1/host`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostView {
    /// Its name.
    pub host: String,
    /// Its pool.
    pub pool: String,
    /// Version of hostd.
    pub version: String,
    /// Process id of hostd.
    pub pid: u32,
    /// Since when it runs.
    pub started_unix_ms: u64,
    /// What it may hand out.
    pub capacity: Capacity,
    /// What its machines use; `null` before the first two samples.
    pub usage: Option<Usage>,
    /// What the whole computer uses, machines or not.
    pub system: Option<Usage>,
    /// Pressure, where the kernel reports it.
    pub pressure: Option<Pressure>,
    /// Number of machines here.
    pub machines: usize,
    /// Migrations that are under way from or to here.
    pub migrations: usize,
    /// Bytes per second over all migrations that leave this host; `null` is no limit.
    #[serde(default)]
    pub migration_bandwidth_bytes_per_second: Option<u64>,
    /// Whether it takes machines, or is being emptied.
    #[serde(default)]
    pub drain: DrainState,
    /// Configured peers.
    pub peers: Vec<PeerView>,
}
