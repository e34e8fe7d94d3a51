//! How a pool's forecaster is set up.

use crate::experience::LESSONS;
use crate::sample::PerResource;
use serde::{Deserialize, Serialize};

/// How a [`PoolForecaster`](super::PoolForecaster) works.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolConfig {
    /// The sampling interval in seconds.
    pub step_s: f64,
    /// How far to look ahead, in steps.
    pub horizon_steps: usize,
    /// Samples kept of each machine and resource.
    pub history_steps: usize,
    /// Steps for which the last sample of a machine that gives none stands in for it.
    pub stale_steps: usize,
    /// Share of the capacity above which the pool counts as contended. Memory cannot be squeezed, hence its own threshold.
    pub thresholds: PerResource<f64>,
    /// How much each resource counts in the score, 0 to 1.
    pub weights: PerResource<f64>,
    /// Outcomes kept of each resource and horizon, of all pools and machines together, for [`crate::Pools`] to fit trees to; 0 = trees
    /// are never fitted. With five horizons each takes 3 KB over all resources.
    pub lessons: usize,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            step_s: 10.0,
            horizon_steps: 60,
            history_steps: 2_048,
            stale_steps: 6,
            thresholds: PerResource { cpu: 0.95, memory: 0.9, io: 0.9, network: 0.9 },
            weights: PerResource { cpu: 1.0, memory: 1.0, io: 0.7, network: 0.7 },
            lessons: LESSONS,
        }
    }
}
