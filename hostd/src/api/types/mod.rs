//! Every type that crosses the control socket, as JSON.
//!
//! Units are in the names. Times are milliseconds since 1970 (`_unix_ms`) so that any language can read them. A field that
//! may be unknown is `null` and never zero. Bodies of requests refuse unknown fields: a misspelt limit is an error and not
//! a limit that silently is not there.

mod audit;
mod capacity;
mod drain;
mod host;
mod machine;
mod migration;
mod plan;
mod pool;

pub use self::migration::{FailedAttempt, MigrateRequest, Migration, MigrationSide, MigrationStage, OnFailedProbe};
pub use audit::{AuditRecord, Decision};
pub use capacity::{CapacityAdvice, HostsNeeded, PoolCapacity};
pub use drain::{Drain, DrainRequest, DrainState, DrainStep, Drained};
pub use host::{HostBandwidth, HostView, PeerView, Pressure};
pub use machine::{
    CreateMachine, DetachDisk, Disk, KernelChoice, Machine, MachineStatus, Network, NewDisk, NewNetwork, ProbeSpec,
    StopMachine, Usage,
};
pub use plan::{Candidate, Event, EventTarget, NewEvent, Plan, PlanOutcome};
pub use pool::{
    Capacity, DirtyEstimate, HostSummary, MachineForecast, MachineRisk, MachineSummary, PoolView, Quantile, Resource,
    ResourceForecast, ResourceScore, TriggerState, TriggerView,
};

pub use ::migration::report::Report;
pub use vmm::api::{
    ChangedLimits, DirtyRate, DirtyRateRequest, DirtyRateSource, DiskSize, MigrationStatus, Phase, Problem,
};
pub use vmm::config::MigrationLimits;
