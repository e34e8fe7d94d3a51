//! How fast a machine dirties its memory, without a migration.

use serde::{Deserialize, Serialize};

/// Body of `PUT /v1/machine/dirty-rate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DirtyRateRequest {
    /// How long to look, in milliseconds: 100 to 10,000; 1,000 if it is not given.
    pub interval_ms: u64,
}

impl Default for DirtyRateRequest {
    fn default() -> Self {
        Self { interval_ms: 1000 }
    }
}

/// Where a rate comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DirtyRateSource {
    /// Pages were sampled.
    #[default]
    Sampled,
    /// A migration is under way, and has measured it: nothing was sampled.
    Migration,
    /// The machine does not run, and dirties nothing.
    Stopped,
}

/// Answer of `PUT /v1/machine/dirty-rate`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DirtyRate {
    /// Where it comes from.
    pub source: DirtyRateSource,
    /// Memory that was different at the end, by the length of the interval (from a migration: with disk blocks); `null` if a migration has just begun and has
    /// measured nothing yet, or arrives here.
    pub bytes_per_second: Option<f64>,
    /// The true value is above this with 97.5 %; `null` unless sampled.
    pub low_bytes_per_second: Option<f64>,
    /// The true value is below this with 97.5 %; `null` unless sampled.
    pub high_bytes_per_second: Option<f64>,
    /// Nearly all of the resident memory was different: it may be dirtied faster by any factor.
    pub lower_bound: bool,
    /// How fast it is dirtied at first, before the same pages come again; `null` unless sampled.
    pub peak_bytes_per_second: Option<f64>,
    /// Memory that is written again and again, as far as the interval shows it; `null` if it does not.
    pub working_set_bytes: Option<f64>,
    /// What was different at each look; empty unless sampled.
    pub looks: Vec<DirtyLook>,
    /// Pages that were chosen.
    pub sampled_pages: u64,
    /// Those of them that had memory, and were read.
    pub resident_pages: u64,
    /// Largest share of its time, in per cent, for which a migration holds a vCPU now: it would dirty more if it were not held.
    pub throttle_percent: u8,
}

/// One look back at the sampled pages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DirtyLook {
    /// Since the first look.
    pub after_ms: f64,
    /// Memory that was different.
    pub bytes: f64,
    /// The true value is above this with 97.5 %.
    pub low_bytes: f64,
    /// The true value is below this with 97.5 %.
    pub high_bytes: f64,
}
