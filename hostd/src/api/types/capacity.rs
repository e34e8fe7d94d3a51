//! How many hosts pools need.

use serde::{Deserialize, Serialize};

use super::{Capacity, Resource};

/// What to do about a pool's hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapacityAdvice {
    /// Nothing.
    Keep,
    /// Start hosts.
    Provision,
    /// Drain one host.
    Release,
    /// Nothing is known of the pool yet.
    Unknown,
}

/// Hosts that a pool needs within a time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostsNeeded {
    /// From now.
    pub within_s: f64,
    /// Hosts.
    pub hosts: usize,
    /// The resource that decides.
    pub resource: Resource,
    /// Its use that is exceeded only with the accepted risk, in the resource's unit.
    pub use_at_risk: f64,
}

/// One element of `GET /v1/capacity`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PoolCapacity {
    /// Pool.
    pub pool: String,
    /// Its live hosts that are not being drained.
    pub hosts: usize,
    /// What one of them gives: the mean.
    pub per_host: Capacity,
    /// Accepted probability that the pool runs out within each time of `needs`.
    pub risk: f64,
    /// Needs at that risk, the nearest time first; empty until enough was measured.
    pub needs: Vec<HostsNeeded>,
    /// Hosts that are missing at the end of `needs`.
    pub missing: usize,
    /// When a further host has to be ordered at the latest to be there in time, from now; `null` if none is needed.
    pub provision_within_s: Option<f64>,
    /// What to do now. It is at the configured risk (`planner.capacity`), whatever risk was asked for.
    pub advice: CapacityAdvice,
    /// Why, in words and numbers.
    pub reason: String,
}
