//! `headroom migrate` and `headroom migration`.

use std::time::Duration;

use clap::{Args, Subcommand};
use migration::policy::MigrationMode;

use super::Failure;
use super::migration_text::{details, failed_checks, progress, table};
use super::output::{Output, bytes, word};
use crate::api::types::{ChangedLimits, MigrateRequest, Migration, MigrationLimits, MigrationStage, OnFailedProbe};
use crate::client::Client;

/// How long `headroom migrate` without `--watch` waits for what the destination says.
const REPLY_PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List migrations from and to this host, the newest first.
    #[command(visible_alias = "ls")]
    List,
    /// Show one migration with its report.
    Show {
        /// Migration.
        id: String,
    },
    /// Cancel a migration that is under way; the machine goes on at its source.
    Cancel {
        /// Migration.
        id: String,
    },
    /// Let a migration switch over that was started with --pause-before-switchover.
    Continue {
        /// Migration.
        id: String,
    },
    /// Change what a migration may cost while it runs.
    Limit(Limit),
    /// Run a machine here again that is in doubt, because its destination died at the moment of the switchover and will never
    /// say whether it ran it. Make sure first that it is powered off or fenced, and that its disks are not used: if it comes
    /// back with the machine, the machine runs twice.
    TakeBack {
        /// Migration.
        id: String,
        /// Your word that the destination is gone for good.
        #[arg(long, required = true)]
        destination_is_gone: bool,
    },
    /// Give up a post-copy whose link is lost: the machine is stopped for good, and what only the other host has of its memory
    /// is lost. Its disks stay at the source as they were at the switchover.
    Abandon {
        /// Migration.
        id: String,
    },
}

/// Other limits for a migration that is under way; what is not given stays as it is.
#[derive(Debug, Args)]
pub(super) struct Limit {
    /// Migration.
    id: String,
    /// Bandwidth limit in MiB per second; `none` lifts it (the host's own limit still holds).
    #[arg(long, value_name = "MIB/S", value_parser = rate, required_unless_present_any = ["downtime", "throttle"])]
    bandwidth: Option<Rate>,
    /// Longest downtime that the switchover may be expected to take.
    #[arg(long, value_name = "MS")]
    downtime: Option<u64>,
    /// Hold vCPUs that dirty memory for up to this share of their time if it does not converge; 0 lets them go.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=99))]
    throttle: Option<u8>,
}

/// A bandwidth: a number of MiB per second, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate(pub(super) Option<u64>);

/// Reads a bandwidth in MiB per second.
pub(super) fn rate(text: &str) -> Result<Rate, String> {
    if text == "none" {
        return Ok(Rate(None));
    }
    let mib: u64 = text.parse().map_err(|_| "give MiB per second as a whole number, or `none`".to_owned())?;
    mib.checked_mul(1 << 20)
        .filter(|rate| *rate > 0)
        .map(|rate| Rate(Some(rate)))
        .ok_or_else(|| "1 and more are possible".to_owned())
}

/// Which machine goes where, and what that may cost.
#[derive(Debug, Args)]
#[command(after_help = "Exit code 4: it was waited for and did not complete; the message says where the machine is.")]
pub(super) struct Start {
    /// Machine.
    machine: String,
    /// Host to move it to; `headroom host` lists the peers.
    #[arg(long, value_name = "HOST")]
    to: String,
    /// Wait for the end, with a live line on a terminal.
    #[arg(long, short)]
    watch: bool,
    /// Longest downtime that the switchover may be expected to take.
    #[arg(long, value_name = "MS")]
    downtime: Option<u64>,
    /// Bandwidth limit in MiB per second.
    #[arg(long, value_name = "MIB/S")]
    bandwidth: Option<u64>,
    /// Memory channels, each a core at both hosts, 1 to 16 [default: the machine's own limit, 2 unless set]
    #[arg(long)]
    streams: Option<u16>,
    /// Give up after so many seconds.
    #[arg(long, value_name = "S")]
    timeout: Option<u64>,
    /// precopy, postcopy (after one round), or hybrid: post-copy if pre-copy does not converge.
    #[arg(long, value_parser = mode)]
    mode: Option<MigrationMode>,
    /// If pre-copy does not converge, hold vCPUs that dirty memory for up to this share of their time; 0 holds none [default:
    /// the machine's own limit, 0 unless set]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=99))]
    throttle: Option<u8>,
    /// If it does not converge, accept a longer downtime instead of giving up.
    #[arg(long)]
    force: bool,
    /// When it is ready, keep the guest running and wait for `headroom migration continue`.
    #[arg(long)]
    pause_before_switchover: bool,
    /// Try again up to so often after a failure that may be gone the next time: a lost link, a busy or restarted host.
    #[arg(long, value_name = "N")]
    retries: Option<u32>,
    /// If a declared probe fails at the destination: `alarm`, or `return` to move the machine back as well, once.
    #[arg(long, value_name = "WHAT", value_parser = on_failed_probe)]
    on_failed_probe: Option<OnFailedProbe>,
    /// Test mode: compare full images of both stopped machines before Commit.
    #[arg(long)]
    compare_full: bool,
}

fn mode(text: &str) -> Result<MigrationMode, String> {
    serde_json::from_value(text.into()).map_err(|_| "precopy, postcopy and hybrid are possible".to_owned())
}

fn on_failed_probe(text: &str) -> Result<OnFailedProbe, String> {
    serde_json::from_value(text.into()).map_err(|_| "alarm and return are possible".to_owned())
}

impl Start {
    /// The machine's own limits with what was given here in their place; `None` if nothing was.
    fn limits(&self, own: &MigrationLimits) -> Option<MigrationLimits> {
        let limits = MigrationLimits {
            downtime_ms: self.downtime.unwrap_or(own.downtime_ms),
            bandwidth_bytes_per_second: self.bandwidth.map(|mib| mib << 20).or(own.bandwidth_bytes_per_second),
            streams: self.streams.unwrap_or(own.streams),
            timeout_s: self.timeout.unwrap_or(own.timeout_s),
            mode: self.mode.unwrap_or(own.mode),
            throttle_max_percent: self.throttle.unwrap_or(own.throttle_max_percent),
            force_switchover: self.force || own.force_switchover,
            compare_full: self.compare_full || own.compare_full,
            ..own.clone()
        };
        (limits != *own).then_some(limits)
    }
}

pub(super) async fn start(client: &Client, output: &Output, start: Start) -> Result<(), Failure> {
    let own = client.machine(&start.machine).await?.limits;
    let request = MigrateRequest {
        destination: start.to.clone(),
        limits: start.limits(&own),
        pause_before_switchover: start.pause_before_switchover,
        retries: start.retries,
        on_failed_probe: start.on_failed_probe,
        ..MigrateRequest::default()
    };
    let migration = client.migrate(&start.machine, &request).await?;
    if !start.watch {
        let begun = begun(client, migration).await?;
        if let Some(why) = begun.error.as_ref().filter(|_| begun.stage.ended()) {
            return Err(Failure::NotMoved(format!("{} was not moved: {why}", start.machine)));
        }
        if let Some(warning) = &begun.warning {
            eprintln!("headroom: warning: {warning}");
        }
        output.print(&begun, |one| {
            format!("{} started; `headroom migration show {}` shows how it goes", one.id, one.id)
        })?;
        return Ok(());
    }
    let live = output.live();
    let ended = client.wait_migration(&migration.id, Duration::from_secs(u64::from(u32::MAX)), |one| {
        if live {
            output.redraw(&progress(one));
        }
    });
    let ended = ended.await;
    if live {
        output.redraw("");
    }
    let ended = ended?;
    output.print(&ended, details)?;
    if ended.stage == MigrationStage::Completed {
        let failed = failed_checks(&ended);
        if failed.is_empty() {
            return Ok(());
        }
        let back = ended.returned_by.as_ref().map(|id| format!("; {id} moves it back")).unwrap_or_default();
        let text = format!("{} runs on {}, but: {}{back}", ended.machine, ended.destination, failed.join("; "));
        return Err(Failure::Probe(text));
    }
    let why = ended.error.unwrap_or_else(|| word(ended.stage));
    if ended.stage == MigrationStage::Lost {
        return Err(Failure::NotMoved(format!("{}: {why}", start.machine)));
    }
    Err(Failure::NotMoved(format!("{} was not moved: {why}", start.machine)))
}

/// Waits a moment for the destination's word, so that a refusal or a warning is told at once.
async fn begun(client: &Client, mut migration: Migration) -> Result<Migration, Failure> {
    let deadline = tokio::time::Instant::now() + REPLY_PATIENCE;
    while matches!(migration.stage, MigrationStage::Queued | MigrationStage::Reserving)
        && tokio::time::Instant::now() < deadline
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
        migration = client.migration(&migration.id).await?;
    }
    Ok(migration)
}

pub(super) async fn run(client: &Client, output: &Output, command: Command) -> Result<(), Failure> {
    match command {
        Command::List => output.print(&client.migrations().await?, |migrations| table(migrations))?,
        Command::Show { id } => output.print(&client.migration(&id).await?, details)?,
        Command::Cancel { id } => {
            let migration = client.cancel_migration(&id).await?;
            output.print(&migration, |one| {
                format!("{} is asked to stop; {} stays on {}", one.id, one.machine, one.source)
            })?;
        }
        Command::Continue { id } => {
            let migration = client.continue_migration(&id).await?;
            output
                .print(&migration, |one| format!("{} goes on; {} moves to {}", one.id, one.machine, one.destination))?;
        }
        Command::Limit(Limit { id, bandwidth, downtime, throttle }) => {
            let limits = ChangedLimits {
                bandwidth_bytes_per_second: bandwidth.map(|Rate(rate)| rate),
                downtime_ms: downtime,
                throttle_max_percent: throttle,
            };
            let migration = client.change_limits(&id, &limits).await?;
            output.print(&migration, |one| {
                let limit = one.limits.bandwidth_bytes_per_second;
                let limit = limit.map_or("not limited".to_owned(), |rate| format!("{}/s at most", bytes(rate as f64)));
                let throttle = match one.limits.throttle_max_percent {
                    0 => "no throttling".to_owned(),
                    percent => format!("throttling at most {percent} %"),
                };
                format!("{}: bandwidth {limit}, downtime at most {} ms, {throttle}", one.id, one.limits.downtime_ms)
            })?;
        }
        Command::TakeBack { id, .. } => {
            let migration = client.take_back_migration(&id).await?;
            output.print(&migration, |one| {
                format!("{} is taken back: {} goes on at {}", one.id, one.machine, one.source)
            })?;
        }
        Command::Abandon { id } => {
            let migration = client.abandon_migration(&id).await?;
            output.print(&migration, |one| {
                format!(
                    "{} is given up: {} is stopped on {} and on {}",
                    one.id, one.machine, one.source, one.destination
                )
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_given_changes_the_machines_limits() {
        let own = MigrationLimits { downtime_ms: 30, ..MigrationLimits::default() };
        let mut start = Start {
            machine: "vm1".into(),
            to: "b1".into(),
            watch: false,
            downtime: None,
            bandwidth: None,
            streams: None,
            timeout: None,
            mode: None,
            throttle: None,
            force: false,
            pause_before_switchover: false,
            retries: None,
            on_failed_probe: None,
            compare_full: false,
        };
        assert_eq!(start.limits(&own), None);
        start.bandwidth = Some(100);
        let limits = start.limits(&own).unwrap();
        assert_eq!((limits.downtime_ms, limits.bandwidth_bytes_per_second), (30, Some(100 << 20)));
        assert_eq!(limits.throttle_max_percent, 0);
        start.throttle = Some(70);
        assert_eq!(start.limits(&own).unwrap().throttle_max_percent, 70);
    }
}
