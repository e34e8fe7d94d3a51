//! `headroom migrate` and `headroom migration`.

use std::io::Write;
use std::time::Duration;

use clap::{Args, Subcommand};
use migration::policy::MigrationMode;
use migration::report::{Report, Trigger};

use super::Failure;
use super::output::{Output, Table, bytes, duration, or_dash, word};
use crate::api::types::{MigrateRequest, Migration, MigrationLimits, MigrationStage};
use crate::client::Client;
use crate::clock::utc;

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
}

/// Which machine goes where, and what that may cost.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code 4: it was waited for and did not complete; the machine runs at its source as before."
)]
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
    /// Memory channels, 1 to 16.
    #[arg(long)]
    streams: Option<u16>,
    /// Give up after so many seconds.
    #[arg(long, value_name = "S")]
    timeout: Option<u64>,
    /// precopy, postcopy (after one round), or hybrid: post-copy if pre-copy does not converge.
    #[arg(long, value_parser = mode)]
    mode: Option<MigrationMode>,
    /// If it does not converge, accept a longer downtime instead of giving up.
    #[arg(long)]
    force: bool,
    /// Test mode: compare full images of both stopped machines before Commit.
    #[arg(long)]
    compare_full: bool,
}

fn mode(text: &str) -> Result<MigrationMode, String> {
    serde_json::from_value(text.into()).map_err(|_| "precopy, postcopy and hybrid are possible".to_owned())
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
            force_switchover: self.force || own.force_switchover,
            compare_full: self.compare_full || own.compare_full,
            ..own.clone()
        };
        (limits != *own).then_some(limits)
    }
}

pub(super) async fn start(client: &Client, output: &Output, start: Start) -> Result<(), Failure> {
    let own = client.machine(&start.machine).await?.limits;
    let request =
        MigrateRequest { destination: start.to.clone(), limits: start.limits(&own), trigger: Trigger::default() };
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
            eprint!("\r\x1b[2K{}", progress(one));
            let _ = std::io::stderr().flush();
        }
    });
    let ended = ended.await;
    if live {
        eprint!("\r\x1b[2K");
    }
    let ended = ended?;
    output.print(&ended, details)?;
    if ended.stage == MigrationStage::Completed {
        let failed = failed_checks(&ended);
        if failed.is_empty() {
            return Ok(());
        }
        let text = format!("{} runs on {}, but: {}", ended.machine, ended.destination, failed.join("; "));
        return Err(Failure::Probe(text));
    }
    let why = ended.error.unwrap_or_else(|| word(ended.stage));
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
    }
    Ok(())
}

/// What was checked after the arrival and is not as it should be.
fn failed_checks(migration: &Migration) -> Vec<String> {
    let Some(report) = &migration.report else { return migration.error.clone().into_iter().collect() };
    let checked = &report.verification;
    let digest = |ok: Option<bool>, what: &str| (ok == Some(false)).then(|| format!("the digests of {what} differ"));
    let probes =
        checked.probes.iter().filter(|probe| !probe.ok).map(|probe| format!("{}: {}", probe.name, probe.detail));
    let digests = [digest(checked.memory_digest_ok, "memory"), digest(checked.disk_digest_ok, "the disks")];
    digests.into_iter().flatten().chain(probes).chain(migration.error.clone()).collect()
}

/// One line: phase, how much, how fast, how long.
fn progress(migration: &Migration) -> String {
    let mut line =
        format!("{} {} -> {}  {}", migration.machine, migration.source, migration.destination, word(migration.stage));
    if let Some(progress) = &migration.progress {
        line.push_str(&format!(
            "  {} round {}  {} sent, {} left, {}/s, dirtied {}/s",
            word(progress.phase),
            progress.round,
            bytes(progress.bytes_done as f64),
            bytes(progress.bytes_remaining as f64),
            bytes(progress.bytes_per_second),
            bytes(progress.dirty_bytes_per_second),
        ));
        if let Some(remaining) = progress.expected_remaining_ms {
            line.push_str(&format!(", about {}", duration(remaining)));
        }
    }
    line
}

fn table(migrations: &[Migration]) -> String {
    let mut table = Table::new(&["ID", "MACHINE", "FROM", "TO", "STAGE", "STARTED", "TOTAL", "DOWNTIME"]);
    for one in migrations {
        let report = one.report.as_ref();
        table.row(vec![
            one.id.clone(),
            one.machine.clone(),
            one.source.clone(),
            one.destination.clone(),
            word(one.stage),
            utc(one.started_unix_ms),
            or_dash(report.map(|report| duration(report.total_ms))),
            or_dash(report.map(|report| format!("{:.1} ms", report.downtime_ms.total))),
        ]);
    }
    table.text("no migrations yet; `headroom migrate MACHINE --to HOST` starts one")
}

fn details(one: &Migration) -> String {
    let mut text = format!(
        "migration {}\nmachine   {} from {} to {}\nstage     {}\nstarted   {} UTC\n",
        one.id,
        one.machine,
        one.source,
        one.destination,
        word(one.stage),
        utc(one.started_unix_ms)
    );
    if let Some(error) = &one.error {
        text.push_str(&format!("error     {error}\n"));
    }
    if let Some(warning) = &one.warning {
        text.push_str(&format!("warning   {warning}\n"));
    }
    if one.progress.is_some() {
        text.push_str(&format!("progress  {}\n", progress(one)));
    }
    if let Some(report) = &one.report {
        text.push_str(&report_lines(report));
    }
    text
}

fn report_lines(report: &Report) -> String {
    let downtime = &report.downtime_ms;
    let ok = |checked: Option<bool>| match checked {
        Some(true) => "equal",
        Some(false) => "DIFFERENT",
        None => "not compared",
    };
    let mut text = format!(
        "outcome   {}{}\ntotal     {}\ndowntime  {:.1} ms (pause {:.1}, pages {:.1}, blocks {:.1}, state {:.1}, commit {:.1}, resume {:.1})\n",
        word(report.outcome),
        if report.reason.is_empty() { String::new() } else { format!(": {}", report.reason) },
        duration(report.total_ms),
        downtime.total,
        downtime.pause,
        downtime.final_pages,
        downtime.final_blocks,
        downtime.state,
        downtime.commit,
        downtime.resume,
    );
    text.push_str(&format!(
        "memory    {} sent in {} rounds, {} of {} pages zero, {}/s\ndisk      {} sent, {} skipped\n",
        bytes(report.memory.bytes_sent as f64),
        report.rounds.len(),
        report.memory.pages_zero,
        report.memory.pages_total,
        bytes(report.memory.throughput_bytes_per_second),
        bytes(report.disk.bytes_sent as f64),
        bytes(report.disk.bytes_skipped as f64),
    ));
    text.push_str(&format!(
        "digests   memory {} ({} pages), disk {} ({} blocks)\ntls       {} {}\n",
        ok(report.verification.memory_digest_ok),
        report.verification.pages_checked,
        ok(report.verification.disk_digest_ok),
        report.verification.blocks_checked,
        report.tls.version,
        report.tls.cipher,
    ));
    for probe in &report.verification.probes {
        text.push_str(&format!(
            "probe     {} {}: {}\n",
            if probe.ok { "ok  " } else { "FAIL" },
            probe.name,
            probe.detail
        ));
    }
    text
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
            force: false,
            compare_full: false,
        };
        assert_eq!(start.limits(&own), None);
        start.bandwidth = Some(100);
        let limits = start.limits(&own).unwrap();
        assert_eq!((limits.downtime_ms, limits.bandwidth_bytes_per_second), (30, Some(100 << 20)));
    }
}
