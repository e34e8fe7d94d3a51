//! Scheduled events and the planner's decisions.

use serde::{Deserialize, Serialize};

use super::Usage;

/// Whose load an event changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum EventTarget {
    /// One machine, wherever it runs.
    Machine(String),
    /// A pool as a whole.
    Pool(String),
}

/// `POST /v1/events`: load that somebody knows will come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewEvent {
    /// What it is, for example `nightly report`.
    pub name: String,
    /// Whose load it changes.
    pub target: EventTarget,
    /// When it starts; exactly one of this and `starts_in_s`.
    #[serde(default)]
    pub starts_unix_ms: Option<u64>,
    /// In how many seconds it starts.
    #[serde(default)]
    pub starts_in_s: Option<f64>,
    /// How long it lasts.
    pub duration_s: f64,
    /// When it comes again: a rule of RFC 5545 such as `FREQ=WEEKLY;BYDAY=MO,FR`, in UTC. `FREQ` of `MINUTELY` to `WEEKLY`, `INTERVAL`,
    /// `COUNT` (at most 10,000), `UNTIL` and `BYDAY` are understood.
    #[serde(default)]
    pub repeats: Option<String>,
    /// Load that it adds; `cpu_demand_cores` is ignored.
    pub adds: Usage,
    /// How sure it is that it happens, above 0 and at most 1.
    #[serde(default = "likely")]
    pub confidence: f64,
}

fn likely() -> f64 {
    0.9
}

/// One element of `GET /v1/events`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Id, unique over the hosts.
    pub id: String,
    /// What it is.
    pub name: String,
    /// Whose load it changes.
    pub target: EventTarget,
    /// When it starts.
    pub starts_unix_ms: u64,
    /// When it ends.
    pub ends_unix_ms: u64,
    /// The rule by which it comes again; the times are those of its first occurrence.
    #[serde(default)]
    pub repeats: Option<String>,
    /// Load that it adds.
    pub adds: Usage,
    /// How sure it is that it happens, above 0 and at most 1.
    pub confidence: f64,
    /// Host on which it was declared (and where it can be removed).
    pub declared_at: String,
}

/// A machine that the planner weighed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Machine.
    pub machine: String,
    /// Host that runs it.
    pub source: String,
    /// Host in another pool; `null` if the machine can go nowhere.
    pub destination: Option<String>,
    /// Violation minutes that the move avoids, less those that it causes.
    pub benefit_minutes: Option<f64>,
    /// Expected cost in bytes to be moved.
    pub cost_bytes: Option<f64>,
    /// Expected duration.
    pub predicted_total_ms: Option<f64>,
    /// Expected downtime.
    pub predicted_downtime_ms: Option<f64>,
    /// Why it was chosen or not.
    pub reason: String,
}

/// What became of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanOutcome {
    /// Nothing could be done; the reasons say why.
    NoAction,
    /// A move is chosen and waits for its latest safe start.
    Waiting,
    /// A move waited for its latest safe start, and was not needed any more.
    Dropped,
    /// The migration was started.
    Started,
    /// The migration could not be started.
    Refused,
    /// The machine was moved.
    Completed,
    /// The migration failed; the machine runs at its source.
    Failed,
}

/// One decision, an element of `GET /v1/plans`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Id.
    pub id: String,
    /// When it was made.
    pub at_unix_ms: u64,
    /// Pool that it is about.
    pub pool: String,
    /// Host that made it.
    pub planner: String,
    /// Contention score.
    pub score: f64,
    /// Horizon of that score.
    pub horizon_s: f64,
    /// Machine to be moved; `null` if none can be.
    pub machine: Option<String>,
    /// From here.
    pub source: Option<String>,
    /// To there.
    pub destination: Option<String>,
    /// Why, in sentences.
    pub reasons: Vec<String>,
    /// All that were weighed.
    pub candidates: Vec<Candidate>,
    /// Migration that it started.
    pub migration: Option<String>,
    /// Until when the move has to start to be over in good time before contention.
    #[serde(default)]
    pub latest_start_unix_ms: Option<u64>,
    /// What became of it.
    pub outcome: PlanOutcome,
}
