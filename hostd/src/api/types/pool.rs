//! Pools: capacity, load, forecast, contention score and trigger.

use serde::{Deserialize, Serialize};

use super::{MachineStatus, MigrationLimits, Usage};

/// What a host or a pool can give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// Processor cores; the cgroup's quota where one is set.
    pub cpu_cores: f64,
    /// Memory in MiB.
    pub memory_mib: f64,
    /// Disk throughput.
    pub disk_bytes_per_second: f64,
    /// Network throughput.
    pub network_bytes_per_second: f64,
}

/// What can run short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Processor, in cores.
    Cpu,
    /// Memory, in MiB.
    Memory,
    /// Disk, in bytes per second.
    Io,
    /// Network, in bytes per second.
    Network,
}

/// One quantile of a forecast.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantile {
    /// Probability that the value stays below, 0 to 1.
    pub probability: f64,
    /// Value in the resource's unit.
    pub value: f64,
}

/// The forecast of one resource at one horizon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResourceForecast {
    /// Resource.
    pub resource: Resource,
    /// How far ahead.
    pub horizon_s: f64,
    /// Quantiles in ascending order.
    pub quantiles: Vec<Quantile>,
}

/// The forecast of one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineForecast {
    /// Machine.
    pub machine: String,
    /// Host that runs it.
    pub host: String,
    /// Per resource and horizon.
    pub forecasts: Vec<ResourceForecast>,
}

/// Probability that a resource runs short within the horizon.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResourceScore {
    /// Resource.
    pub resource: Resource,
    /// Probability, 0 to 1.
    pub probability: f64,
    /// Load now, in the resource's unit.
    pub load: f64,
    /// Capacity, in the resource's unit.
    pub capacity: f64,
    /// Load above this is contention.
    pub limit: f64,
}

/// What the trigger is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TriggerState {
    /// The score is low.
    Quiet,
    /// The score is high, but not yet for long enough.
    Rising,
    /// The score is high: the planner acts.
    Firing,
    /// A move is chosen and waits for its latest safe start.
    Planned,
    /// The planner has acted and waits for the effect.
    Cooldown,
}

/// The trigger of a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TriggerView {
    /// What it is doing.
    pub state: TriggerState,
    /// Score at which it starts to fire.
    pub start_score: f64,
    /// Score below which it becomes quiet again.
    pub stop_score: f64,
    /// When the cooldown ends.
    pub cooldown_until_unix_ms: Option<u64>,
    /// When a planned move has to start at the latest.
    #[serde(default)]
    pub latest_start_unix_ms: Option<u64>,
}

/// How fast a machine dirties its memory, as sampled while no migration was under way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DirtyEstimate {
    /// Before it comes to the same pages again.
    pub bytes_per_second: f64,
    /// Memory that it writes over and over; `null` if that was not seen.
    #[serde(default)]
    pub working_set_bytes: Option<f64>,
    /// When it was sampled.
    pub at_unix_ms: u64,
}

/// A machine in a pool view.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineSummary {
    /// Name.
    pub name: String,
    /// What it is doing.
    pub status: MachineStatus,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Size of its disks in bytes.
    pub disk_bytes: u64,
    /// What of that is allocated, and would have to be moved.
    #[serde(default)]
    pub disk_allocated_bytes: u64,
    /// What its migrations may cost.
    pub limits: MigrationLimits,
    /// Load.
    pub usage: Option<Usage>,
    /// How fast it dirties its memory; `null` until somebody has asked, or the pool came near contention.
    #[serde(default)]
    pub dirty: Option<DirtyEstimate>,
}

/// A host in a pool view.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostSummary {
    /// Name.
    pub host: String,
    /// Whether it answered within the last few intervals.
    pub live: bool,
    /// It takes no machines: it is being drained.
    #[serde(default)]
    pub draining: bool,
    /// What it can give.
    pub capacity: Capacity,
    /// What its machines use.
    pub usage: Option<Usage>,
    /// Its machines.
    pub machines: Vec<MachineSummary>,
    /// When this was measured, by its own clock.
    pub sampled_unix_ms: u64,
}

/// A machine that is likely to suffer when its pool runs short.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineRisk {
    /// Name.
    pub machine: String,
    /// What it would lack.
    pub resource: Resource,
    /// Probability that it gets less than nine tenths of what it asks for at some time within the horizon.
    pub probability: f64,
    /// Why, in words and numbers.
    pub reason: String,
}

/// One element of `GET /v1/pools`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PoolView {
    /// Name.
    pub pool: String,
    /// The live member with the lowest name: the one that plans.
    pub leader: Option<String>,
    /// Hosts, by name.
    pub hosts: Vec<HostSummary>,
    /// Sum over the live hosts.
    pub capacity: Capacity,
    /// Sum over the live hosts.
    pub usage: Usage,
    /// Forecasts of the whole pool, per resource and horizon; empty until there are enough samples.
    pub forecasts: Vec<ResourceForecast>,
    /// Probability of contention for each resource within the longest horizon.
    pub scores: Vec<ResourceScore>,
    /// Weighted score; `null` until there are enough samples.
    pub score: Option<f64>,
    /// Within which time the score applies.
    pub horizon_s: f64,
    /// When contention becomes more likely than not, from now; `null` if not within the horizon.
    pub expected_contention_s: Option<f64>,
    /// Why the score is what it is, in sentences, the most important first.
    pub reasons: Vec<String>,
    /// The trigger.
    pub trigger: TriggerView,
    /// Mean distance between the probabilities that were said and what came of them, 0 to 1; `null` until enough windows are
    /// over, and for pools that the host which answers does not plan for.
    #[serde(default)]
    pub calibration_error: Option<f64>,
    /// Why a threshold on the present load decides in the place of the forecast, if it does.
    #[serde(default)]
    pub fallback: Option<String>,
    /// Machines that are likely to get much less than they ask for, the most likely first.
    #[serde(default)]
    pub at_risk: Vec<MachineRisk>,
    /// When this was computed, by the clock of the host that did it.
    pub computed_unix_ms: u64,
}
