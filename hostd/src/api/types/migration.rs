//! Migrations as an operator sees them.

use migration::report::{Report, Trigger};
use serde::{Deserialize, Serialize};
use vmm::api::MigrationStatus;
use vmm::config::MigrationLimits;

use crate::clock::unix_ms;

/// What to do with a machine that has moved and does not answer a declared probe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailedProbe {
    /// Raise an alarm and leave the machine where it is.
    #[default]
    Alarm,
    /// Raise an alarm and move the machine back, once.
    Return,
}

/// `POST /v1/machines/{name}/migrate`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
    /// When it is ready, wait for `POST /v1/migrations/{id}/continue` before the guest is stopped.
    #[serde(default)]
    pub pause_before_switchover: bool,
    /// How often to try again after a failure that may be gone the next time; without it `migration.retries` of the
    /// configuration.
    #[serde(default)]
    pub retries: Option<u32>,
    /// What a failed probe means; without it `migration.on_failed_probe` of the configuration.
    #[serde(default)]
    pub on_failed_probe: Option<OnFailedProbe>,
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
    /// It failed for a reason that may be gone soon, and will be tried again; the machine runs at the source.
    Retrying,
    /// Commit was sent and not answered: the daemons are settling where the machine runs.
    Settling,
    /// It runs at the destination; in post-copy the rest of it follows, then probes are being asked.
    Verifying,
    /// Ended: the machine runs at the destination.
    Completed,
    /// Ended: the machine runs at the source as before.
    Failed,
    /// Ended by an operator: the machine runs at the source as before.
    Cancelled,
    /// Ended in post-copy with a part of the machine missing at the destination for good: it is stopped on both hosts.
    Lost,
}

impl MigrationStage {
    /// Whether nothing more will happen.
    pub fn ended(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled | Self::Lost)
    }
}

/// An attempt that failed and was followed by another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedAttempt {
    /// When it failed.
    pub at_unix_ms: u64,
    /// Why.
    pub error: String,
}

/// `GET /v1/migrations/{id}`, and the elements of `GET /v1/migrations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    /// Id, the same on both hosts; the destination knows the n-th attempt as `ID-n`.
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
    /// What it may cost, as it is now; at the source.
    #[serde(default)]
    pub limits: MigrationLimits,
    /// The guest is stopped only when an operator says so.
    #[serde(default)]
    pub pause_before_switchover: bool,
    /// What a failed probe means.
    #[serde(default)]
    pub on_failed_probe: OnFailedProbe,
    /// Which attempt this is, from 1.
    #[serde(default = "one")]
    pub attempt: u32,
    /// Further attempts that are allowed.
    #[serde(default)]
    pub retries_left: u32,
    /// When the next attempt begins, while it waits for that.
    #[serde(default)]
    pub retry_at_unix_ms: Option<u64>,
    /// Attempts that failed before this one.
    #[serde(default)]
    pub failures: Vec<FailedAttempt>,
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
    /// The machine has moved, and is not as it should be there: a probe or a digest failed.
    #[serde(default)]
    pub alarm: Option<String>,
    /// The migration that brings it back because of that.
    #[serde(default)]
    pub returned_by: Option<String>,
    /// The machine was taken back because an operator said that the destination is gone. Until that host says what became of this attempt
    /// there, it is asked: it may have run the machine too.
    #[serde(default)]
    pub taken_back: Option<String>,
    /// The report, at the source once ended.
    pub report: Option<Report>,
}

fn one() -> u32 {
    1
}

impl Migration {
    /// A migration that begins now, in this host's part of it.
    pub fn new(id: &str, machine: &str, side: MigrationSide, source: &str, destination: &str) -> Self {
        let stage = match side {
            MigrationSide::Source => MigrationStage::Queued,
            MigrationSide::Destination => MigrationStage::Transferring,
        };
        Self {
            id: id.to_owned(),
            machine: machine.to_owned(),
            source: source.to_owned(),
            destination: destination.to_owned(),
            side,
            stage,
            trigger: Trigger::default(),
            limits: MigrationLimits::default(),
            pause_before_switchover: false,
            on_failed_probe: OnFailedProbe::default(),
            attempt: 1,
            retries_left: 0,
            retry_at_unix_ms: None,
            failures: Vec::new(),
            started_unix_ms: unix_ms(),
            ended_unix_ms: None,
            progress: None,
            error: None,
            warning: None,
            alarm: None,
            taken_back: None,
            returned_by: None,
            report: None,
        }
    }

    /// Id of the present attempt: what the destination and the VMMs know it by. An id is settled once and for all, so every
    /// attempt has its own.
    pub fn attempt_id(&self) -> String {
        if self.attempt <= 1 { self.id.clone() } else { format!("{}-{}", self.id, self.attempt) }
    }

    /// What the audit log calls it.
    pub fn object(&self) -> String {
        format!("machine:{} migration:{}", self.machine, self.id)
    }

    /// In post-copy with a lost link, where it may be given up.
    pub fn hangs(&self) -> bool {
        let hanging = |progress: &MigrationStatus| {
            progress.phase == vmm::api::Phase::Postcopy && progress.committed && progress.error.is_some()
        };
        let under_way = matches!(self.stage, MigrationStage::Transferring | MigrationStage::Verifying);
        under_way && self.progress.as_ref().is_some_and(hanging)
    }
}
