//! The VMM's API: HTTP/1.1 and JSON on a unix socket, one request a connection.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `GET /v1/machine` | | [`MachineInfo`] |
//! | `PUT /v1/machine/pause` | | [`MachineInfo`] |
//! | `PUT /v1/machine/resume` | | [`MachineInfo`]; 409 while fenced |
//! | `PUT /v1/machine/shut-down` | | 202 [`MachineInfo`]; the guest is asked by Ctrl-Alt-Del, and 409 if it would not notice |
//! | `PUT /v1/machine/save` | `{"path": DIR}` | [`MachineInfo`]; the machine must be paused |
//! | `GET /v1/machine/digest` | | [`MachineDigest`]; the machine must be paused or fenced |
//! | `PUT /v1/machine/dirty-rate` | [`DirtyRateRequest`] | [`DirtyRate`], once the interval is over; one at a time |
//! | `PUT /v1/machine/quit` | | 204, then the process ends |
//! | `PUT /v1/machine/disk` | [`DiskSize`] | [`DiskSize`]; 409 while a migration is under way |
//! | `GET /v1/metrics` | | [`Metrics`] |
//! | `GET /v1/balloon` | | [`BalloonInfo`]; 404 if the machine has none |
//! | `PUT /v1/balloon` | [`BalloonTarget`] | [`BalloonInfo`] |
//! | `PUT /v1/migration/receive` | [`crate::config::ReceiveConfig`] | [`Receiving`] |
//! | `PUT /v1/migration/send` | [`crate::config::SendConfig`] | 202 [`MigrationStatus`]; runs in the background |
//! | `GET /v1/migration` | | [`MigrationStatus`]; 404 if there was none |
//! | `DELETE /v1/migration` | | 202 [`MigrationStatus`]; 409 once Commit was sent |
//! | `PUT /v1/migration/limits` | [`ChangedLimits`] | [`MigrationStatus`]; at the source, while it runs |
//! | `PUT /v1/migration/continue` | | [`MigrationStatus`]; lets a migration switch over that was held back |
//! | `PUT /v1/migration/abandon` | | 202 [`MigrationStatus`]; gives up a post-copy whose link is lost |
//! | `PUT /v1/migration/settle` | [`Settle`] | [`MachineInfo`]; only while in doubt |
//!
//! Errors are RFC 9457 problem documents ([`Problem`]).

pub mod client;
mod dirty_rate;
mod route;
pub mod server;

use std::net::SocketAddr;
use std::path::PathBuf;

use migration::report::Report;
use serde::{Deserialize, Serialize};

pub use crate::config::DirtyTracking;
pub use crate::device::virtio::balloon::Statistics;
pub use dirty_rate::{DirtyLook, DirtyRate, DirtyRateRequest, DirtyRateSource};

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Waits for a migration to arrive.
    Incoming,
    /// vCPUs run.
    Running,
    /// vCPUs are stopped and can be resumed.
    Paused,
    /// Given away: must not run here.
    Fenced,
    /// The guest shut down or failed; `reason` says which.
    Stopped,
}

/// `GET /v1/machine`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: MachineState,
    /// Why it stopped.
    pub reason: Option<String>,
    /// Process id of the VMM.
    pub pid: u32,
    /// Version of the VMM.
    pub version: String,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// From the start of the process to the first entry of a vCPU.
    pub first_instruction_us: Option<u64>,
    /// Its disks as the guest knows them; none until a machine is here.
    #[serde(default)]
    pub disks: Vec<DiskSize>,
    /// How its written pages are recorded: `log` or `ring`; `null` until a machine is here.
    #[serde(default)]
    pub dirty_tracking: Option<DirtyTracking>,
    /// Why it has no dirty rings, if they were wanted.
    #[serde(default)]
    pub dirty_tracking_reason: Option<String>,
}

/// `GET /v1/metrics`: counters since the start; whoever samples takes differences.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Processor time of the vCPU threads in microseconds.
    pub vcpu_us: u64,
    /// Processor time of the whole process in microseconds.
    pub process_us: u64,
    /// Guest RAM that is populated on the host.
    pub memory_resident_bytes: u64,
    /// Memory of the VMM itself beyond guest RAM.
    pub overhead_bytes: u64,
    /// Read from disks.
    pub disk_read_bytes: u64,
    /// Written to disks.
    pub disk_write_bytes: u64,
    /// Received by the guest.
    pub net_receive_bytes: u64,
    /// Sent by the guest.
    pub net_transmit_bytes: u64,
    /// How often the guest said that it has announced itself on a network, as it is asked to when it has arrived.
    #[serde(default)]
    pub net_announcements: u64,
    /// Exits from guest mode.
    pub exits: u64,
    /// Time in microseconds for which vCPUs were held by migrations, over all vCPUs.
    #[serde(default)]
    pub vcpu_held_us: u64,
}

/// `GET /v1/balloon`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonInfo {
    /// What the guest is asked to give back.
    pub target_bytes: u64,
    /// What it says it has given back. It takes time, and a guest without memory to spare gives less.
    pub actual_bytes: u64,
    /// Given back through the balloon since this process started, each time anew.
    pub inflated_bytes: u64,
    /// The same by reports of free pages.
    pub reported_bytes: u64,
    /// Named to migrations as free.
    pub hinted_bytes: u64,
    /// The guest's own figures, from when they were asked for the last time; this question asks for new ones.
    pub statistics: Statistics,
}

/// Body of `PUT /v1/balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonTarget {
    /// MiB that the guest is asked to give back; 0 returns all of them to it.
    pub target_mib: u64,
}

/// Body and answer of `PUT /v1/machine/disk`, and a part of [`MachineInfo`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSize {
    /// Which disk.
    pub id: String,
    /// Its size in bytes: a multiple of 512, no fewer than it has.
    pub bytes: u64,
}

/// `GET /v1/machine/digest`: BLAKE3 in hexadecimal over all RAM and over each disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDigest {
    /// Over all pages in order.
    pub memory: String,
    /// Over each disk in order.
    pub disks: Vec<String>,
}

/// Body of `PUT /v1/machine/save`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Save {
    /// Directory, made by this call; must not exist.
    pub path: PathBuf,
}

/// Answer of `PUT /v1/migration/receive`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receiving {
    /// Where the source shall connect to.
    pub address: SocketAddr,
}

/// Phase of a migration, the same words on both sides, in order of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Destination: listening. Source: connecting, versions, layout.
    Handshake,
    /// Disk and memory rounds while the guest runs.
    Precopy,
    /// The guest is stopped.
    Switchover,
    /// Commit was sent or received.
    Committed,
    /// The destination runs, and the rest of it follows.
    Postcopy,
    /// The destination runs; digests and probes.
    Verify,
    /// Ended; the outcome is in the report.
    Ended,
}

/// `GET /v1/migration`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Migration id.
    pub id: String,
    /// Where it is.
    pub phase: Phase,
    /// True once the destination runs the machine, or may run it.
    pub committed: bool,
    /// Current round of memory.
    pub round: u32,
    /// Bytes sent or received.
    pub bytes_done: u64,
    /// Bytes of memory and disk left in this pass.
    pub bytes_remaining: u64,
    /// Rate over the last second.
    pub bytes_per_second: f64,
    /// Rate at which the guest dirties memory.
    pub dirty_bytes_per_second: f64,
    /// Largest share of its time, in per cent, for which a vCPU is held now so that it dirties less.
    #[serde(default)]
    pub throttle_percent: u8,
    /// It could switch over and was told to wait for `PUT /v1/migration/continue`.
    #[serde(default)]
    pub waiting: bool,
    /// It arrived by post-copy, lost a part of itself, and is stopped here for good; `error` says what is missing.
    #[serde(default)]
    pub lost: bool,
    /// The budget in force, over all channels; `null` is no limit.
    #[serde(default)]
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Expected time to the switchover in milliseconds; `null` if it does not converge at this rate.
    pub expected_remaining_ms: Option<f64>,
    /// Present at the source once ended.
    pub report: Option<Report>,
    /// What went wrong, once ended without success (both sides); before that, what the operator should know now, such as a
    /// lost link in post-copy.
    pub error: Option<String>,
}

/// Body of `PUT /v1/migration/limits`: what is left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangedLimits {
    /// Bytes per second over all channels, at least 4096; `null` lifts the limit.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_second: Option<Option<u64>>,
    /// Longest downtime, in milliseconds, that the switchover may be expected to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// Most of its time, in per cent from 0 to 99, for which a vCPU may be held so that it dirties less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_max_percent: Option<u8>,
}

/// A field that is there, even as `null`, is a value.
fn given<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// Body of `PUT /v1/migration/settle`: what the daemons have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Settle {
    /// The destination runs it: this process may go.
    RunsThere,
    /// The destination never ran it and never will: resume here.
    RunsHere,
}

/// An RFC 9457 problem document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// `about:blank`, or a URN that names the kind of problem.
    #[serde(rename = "type")]
    pub kind: String,
    /// A short summary of the kind.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// Cause and remedy.
    pub detail: String,
}
