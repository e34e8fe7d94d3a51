//! What daemons say to each other, as JSON over mutual TLS under `/v1/peer`.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `GET /v1/peer/summary` | | [`PeerSummary`] |
//! | `POST /v1/peer/migrations` | [`ReserveRequest`] | [`Reservation`]; the destination is ready to receive |
//! | `GET /v1/peer/migrations/{id}` | | the peer's [`Migration`](crate::api::types::Migration) |
//! | `POST /v1/peer/migrations/{id}/settle` | | [`Settlement`], by the destination; final |
//! | `POST /v1/peer/migrations/{id}/verify` | | [`Verified`], by the destination |
//! | `POST /v1/peer/migrate` | [`MigrateOrder`] | the migration, started; by the machine's host |

use std::net::SocketAddr;

use migration::report::{GuestRates, Probe, Trigger};
use serde::{Deserialize, Serialize};

use crate::api::types::{Event, HostSummary, MigrationLimits, OnFailedProbe, PoolView, Usage};
use crate::machine::MachineRecord;
use crate::machine::shared::Proof;
use crate::metrics::cpu::CpuFeatures;

/// What a host tells of itself, once an interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerSummary {
    /// Its pool.
    pub pool: String,
    /// The host and its machines.
    pub host: HostSummary,
    /// How it sees its own pool.
    pub pool_view: Option<PoolView>,
    /// Events that were declared on it.
    pub events: Vec<Event>,
}

/// "May I send you this machine?"
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReserveRequest {
    /// Migration id.
    pub id: String,
    /// The machine; paths, taps and process in it mean nothing at the destination.
    pub machine: MachineRecord,
    /// What it uses now.
    pub usage: Option<Usage>,
    /// Processor of the source.
    pub cpu: CpuFeatures,
    /// Why.
    pub trigger: Trigger,
    /// The destination gives up if nothing has been committed after so many seconds.
    pub deadline_s: u64,
    /// What a failed probe means: the destination is the one that can move the machine back.
    #[serde(default)]
    pub on_failed_probe: OnFailedProbe,
    /// How its disks on shared storage are recognised.
    #[serde(flatten)]
    pub proof: Proof,
}

/// "Yes: send it there."
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Reservation {
    /// Where the destination's VMM listens.
    pub address: SocketAddr,
    /// One-time secret, hexadecimal, 32 bytes.
    pub token: String,
    /// What speaks against the move, by the destination's own forecast.
    #[serde(default)]
    pub warning: Option<String>,
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Reservation({})", self.address)
    }
}

/// Where a machine runs after a migration whose Commit was not answered. All answers are final: a destination that has
/// said `never` has made sure of it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Settlement {
    /// The destination runs it, or ran it.
    Runs,
    /// The destination never ran it and never will.
    Never,
    /// The destination ran it in post-copy, a part of it never arrived, and it is stopped there for good.
    Lost,
}

/// What the declared probes found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    /// In the order of their declaration.
    pub probes: Vec<Probe>,
    /// The migration that brings the machine back because one failed.
    #[serde(default)]
    pub returned_by: Option<String>,
    /// What the guest does there.
    #[serde(default)]
    pub rates: Option<GuestRates>,
}

/// The planner of a pool to the host of a machine: "move it".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrateOrder {
    /// Machine.
    pub machine: String,
    /// Host to move it to.
    pub destination: String,
    /// What it may cost; without it the machine's own limits.
    pub limits: Option<MigrationLimits>,
    /// Why.
    pub trigger: Trigger,
}
