//! The JSON of the control port: one [`Request`] in, one [`Reply`] out.

extern crate alloc;

use alloc::string::String;

use serde::{Deserialize, Serialize};

use super::workload::Workload;

/// What a client asks. Both parts are optional; the answer is always the status after they were done.
///
/// ```json
/// {"set": {"sweep_mib": 64, "sweep_mib_per_second": 100}}
/// {"get": "status"}
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Request {
    /// Comes back in the reply, so that a client can tell a late answer from the one it waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// What to change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub set: Option<Settings>,
    /// What to report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub get: Option<Topic>,
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Topic {
    /// The [`Status`].
    Status,
}

/// Changes to a running guest; what is absent stays as it is. Units and ranges are those of [`Workload`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// See [`Workload::sweep_mib`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sweep_mib: Option<u32>,
    /// See [`Workload::sweep_mib_per_second`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sweep_mib_per_second: Option<u32>,
    /// See [`Workload::disk_mib`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<u32>,
    /// See [`Workload::disk_mib_per_second`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_mib_per_second: Option<u32>,
    /// See [`Workload::cpu_percent`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<u8>,
    /// See [`Workload::heartbeat_ms`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_ms: Option<u32>,
    /// See [`Workload::fill_mib`]: what is no longer wanted is free at once, what is added is filled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fill_mib: Option<u32>,
    /// See [`Workload::churn_mib`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub churn_mib: Option<u32>,
    /// See [`Workload::churn_mib_per_second`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub churn_mib_per_second: Option<u32>,
    /// Starts a new measurement of [`Status::longest_stall_us`].
    #[serde(skip_serializing_if = "is_false")]
    pub reset_stall: bool,
    /// Reads the whole filled area once and compares it ([`Status::fill_pages_checked`], [`Status::fill_errors`]).
    #[serde(skip_serializing_if = "is_false")]
    pub verify_fill: bool,
    /// Switches the machine off, right after the answer: i8042 reset, else a triple fault.
    #[serde(skip_serializing_if = "is_false")]
    pub power_off: bool,
}

// The signature is serde's.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(flag: &bool) -> bool {
    !flag
}

impl Settings {
    /// The changes that make a running guest do what `workload` says, as far as it can be changed while it runs.
    #[must_use]
    pub fn of(workload: &Workload) -> Self {
        Self {
            sweep_mib: Some(workload.sweep_mib),
            sweep_mib_per_second: Some(workload.sweep_mib_per_second),
            disk_mib: Some(workload.disk_mib),
            disk_mib_per_second: Some(workload.disk_mib_per_second),
            cpu_percent: Some(workload.cpu_percent),
            heartbeat_ms: Some(workload.heartbeat_ms),
            fill_mib: Some(workload.fill_mib),
            churn_mib: Some(workload.churn_mib),
            churn_mib_per_second: Some(workload.churn_mib_per_second),
            ..Self::default()
        }
    }

    /// Writes the changes into `workload`, cut to the ranges that it documents.
    pub fn apply(&self, workload: &mut Workload) {
        fn change<T: Copy>(field: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *field = value;
            }
        }
        change(&mut workload.sweep_mib, self.sweep_mib);
        change(&mut workload.sweep_mib_per_second, self.sweep_mib_per_second);
        change(&mut workload.disk_mib, self.disk_mib);
        change(&mut workload.disk_mib_per_second, self.disk_mib_per_second);
        change(&mut workload.cpu_percent, self.cpu_percent);
        change(&mut workload.heartbeat_ms, self.heartbeat_ms);
        change(&mut workload.fill_mib, self.fill_mib);
        change(&mut workload.churn_mib, self.churn_mib);
        change(&mut workload.churn_mib_per_second, self.churn_mib_per_second);
        workload.clamp();
    }
}

/// What the guest knows about itself. Counters start at 0 at boot and travel with the machine when it is migrated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The `id` of the request that this answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Whether the boot is over: the memory is filled and the workload runs.
    pub ready: bool,
    /// Heartbeats so far.
    pub heartbeat: u64,
    /// Milliseconds since boot on the guest's clock.
    pub uptime_ms: u64,
    /// The pass over the sweep area that is being made, from 1.
    pub sweep_step: u64,
    /// Pages whose content was checked before they were written.
    pub sweep_pages_checked: u64,
    /// Pages that did not hold what the sweeper left there: lost, stale and torn ones.
    pub sweep_errors: u64,
    /// Of these, pages without any record of the sweeper.
    pub sweep_lost: u64,
    /// Of these, pages that hold one whole older (or foreign) record.
    pub sweep_stale: u64,
    /// Of these, pages whose records disagree or are damaged.
    pub sweep_torn: u64,
    /// Measured rate of the sweeper over about the last second, in MiB/s.
    pub sweep_mib_per_second: u32,
    /// Sequence number of the last write to the disk that was issued, from 1.
    pub disk_sequence: u64,
    /// Blocks of 4 KiB written, and the write completed.
    pub disk_blocks_written: u64,
    /// Blocks of 4 KiB read back and compared.
    pub disk_blocks_checked: u64,
    /// Flushes that completed.
    pub disk_flushes: u64,
    /// Everything that went wrong with the disk: blocks with wrong content and requests that failed.
    pub disk_errors: u64,
    /// Of these, requests that the device refused or failed.
    pub disk_io_errors: u64,
    /// Measured rate of the disk writer over about the last second, in MiB/s.
    pub disk_mib_per_second: u32,
    /// Measured share of the last second in which the vCPU was not idle, in per cent of the guest's clock.
    pub cpu_percent: u8,
    /// Units of arithmetic done for [`Workload::cpu_percent`]; their rate falls when the host is short of processor.
    pub work_units: u64,
    /// Pages of 4 KiB filled.
    pub fill_pages: u64,
    /// Filled pages that were read and compared ([`Settings::verify_fill`]).
    pub fill_pages_checked: u64,
    /// Filled pages that did not hold what was written.
    pub fill_errors: u64,
    /// Pages of memory that comes and goes that were compared before they were let go.
    pub churn_pages_checked: u64,
    /// Of these, pages that did not hold what was written.
    pub churn_errors: u64,
    /// Memory that nobody needs, in MiB.
    pub free_mib: u32,
    /// Of this, what the host has back (or never had to give).
    pub given_mib: u32,
    /// Memory in the balloon, in MiB.
    pub balloon_mib: u32,
    /// Frames received.
    pub network_received: u64,
    /// Frames sent.
    pub network_sent: u64,
    /// Longest time in microseconds by which a pass of the main loop came late, since boot or the last
    /// [`Settings::reset_stall`]: the guest's own view of a blackout. Time that the guest chose to sleep does not count.
    pub longest_stall_us: u64,
    /// What the guest is doing now; sizes are cut to the memory and disk there are.
    pub workload: Workload,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
// Made one at a time and sent at once.
#[allow(clippy::large_enum_variant)]
pub enum Reply {
    /// The request was not understood and nothing was changed.
    Error {
        /// What is wrong with it.
        error: String,
    },
    /// The request was done.
    Status(Status),
}
