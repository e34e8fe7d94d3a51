//! Migrations as an operator sees them.

use migration::report::{Report, Trigger};
use serde::{Deserialize, Serialize};
use vmm::api::MigrationStatus;
use vmm::config::MigrationLimits;

/// `POST /v1/machines/{name}/migrate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Host to move it to: one of the configured peers.
    pub destination: String,
    /// What it may cost; without it the machine's own limits.
    #[serde(default)]
    pub limits: Option<MigrationLimits>,
    /// Why; without it an operator's wish.
    #[serde(default)]
    pub trigger: Trigger,
}

/// Which part this host has in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationSide {
    /// The machine leaves this host.
    Source,
    /// The machine arrives at this host.
    Destination,
}

/// How far a migration is, as the daemons see it; `progress.phase` has the engine's finer view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationStage {
    /// Waits for its turn: the host allows only so many at once.
    Queued,
    /// The destination is asked for room and permission; nothing of the guest has moved.
    Reserving,
    /// Memory and disk are being moved.
    Transferring,
    /// Commit was sent and not answered: the daemons are settling where the machine runs.
    Settling,
    /// It runs at the destination; probes are being asked.
    Verifying,
    /// Ended: the machine runs at the destination.
    Completed,
    /// Ended: the machine runs at the source as before.
    Failed,
    /// Ended by an operator: the machine runs at the source as before.
    Cancelled,
}

impl MigrationStage {
    /// Whether nothing more will happen.
    pub fn ended(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// `GET /v1/migrations/{id}`, and the elements of `GET /v1/migrations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    /// Id, the same on both hosts.
    pub id: String,
    /// Machine.
    pub machine: String,
    /// Host that it leaves.
    pub source: String,
    /// Host that it goes to.
    pub destination: String,
    /// Part of the host that answers.
    pub side: MigrationSide,
    /// How far it is.
    pub stage: MigrationStage,
    /// Why it was started.
    pub trigger: Trigger,
    /// When it was asked for.
    pub started_unix_ms: u64,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
    /// The engine's progress, while there is some.
    pub progress: Option<MigrationStatus>,
    /// What went wrong and what to do.
    pub error: Option<String>,
    /// What speaks against this move and does not keep it from being made.
    #[serde(default)]
    pub warning: Option<String>,
    /// The report, at the source once ended.
    pub report: Option<Report>,
}
