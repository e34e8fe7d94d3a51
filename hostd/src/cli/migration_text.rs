//! Migrations for people, within 80 columns.

use super::output::{Table, bytes, duration, or_dash, word};
use crate::api::types::{Migration, MigrationStage, MigrationStatus, Phase};
use crate::clock::{unix_ms, utc};
use crate::words::{digests, downtime_parts, rates};
use migration::report::Report;

/// What was checked after the arrival and is not as it should be.
pub(super) fn failed_checks(migration: &Migration) -> Vec<String> {
    let Some(report) = &migration.report else { return migration.error.clone().into_iter().collect() };
    let checked = &report.verification;
    let digest = |ok: Option<bool>, what: &str| (ok == Some(false)).then(|| format!("the digests of {what} differ"));
    let probes =
        checked.probes.iter().filter(|probe| !probe.ok).map(|probe| format!("{}: {}", probe.name, probe.detail));
    let digests = [digest(checked.memory_digest_ok, "memory"), digest(checked.disk_digest_ok, "the disks")];
    digests.into_iter().flatten().chain(probes).chain(migration.error.clone()).collect()
}

/// What it is doing, in one or two words.
fn state(migration: &Migration) -> String {
    match (&migration.progress, migration.stage) {
        (Some(progress), MigrationStage::Transferring) if progress.waiting => "waits to continue".to_owned(),
        (Some(progress), MigrationStage::Transferring | MigrationStage::Verifying) => match progress.phase {
            Phase::Precopy => format!("pre-copy round {}", progress.round),
            Phase::Postcopy if progress.error.is_some() => "post-copy, link lost".to_owned(),
            Phase::Postcopy => "post-copy".to_owned(),
            phase => word(phase),
        },
        (_, stage) => word(stage),
    }
}

/// A quantity in few characters: what is redrawn several times a second is not read to the last digit.
fn short(value: f64) -> String {
    let text = bytes(value);
    match text.split_once(' ') {
        Some((number, unit)) if number.len() > 4 => format!("{:.0} {unit}", number.parse::<f64>().unwrap_or_default()),
        _ => text,
    }
}

/// How much is left, how fast, how long: the part of the progress that changes all the time.
fn amounts(progress: &MigrationStatus) -> String {
    let mut text = format!("{} left at {}/s", short(progress.bytes_remaining as f64), short(progress.bytes_per_second));
    if progress.phase == Phase::Precopy && progress.dirty_bytes_per_second >= 1.0 {
        text.push_str(&format!(", dirty {}/s", short(progress.dirty_bytes_per_second)));
    }
    if progress.throttle_percent > 0 {
        text.push_str(&format!(", throttled {} %", progress.throttle_percent));
    }
    match expected_ms(progress) {
        Some(ms) if ms >= 120_000.0 => text.push_str(&format!(", ~{:.0} min", ms / 60_000.0)),
        Some(ms) => text.push_str(&format!(", ~{:.0} s", (ms / 1000.0).ceil())),
        None => {}
    }
    text
}

/// When the switchover is expected, or in post-copy the end, in milliseconds.
fn expected_ms(progress: &MigrationStatus) -> Option<f64> {
    match progress.phase {
        Phase::Postcopy if progress.bytes_per_second > 0.0 => {
            Some(progress.bytes_remaining as f64 / progress.bytes_per_second * 1e3)
        }
        _ => progress.expected_remaining_ms,
    }
}

/// One line: phase, how much, how fast, how long.
pub(super) fn progress(migration: &Migration) -> String {
    let mut line = format!("{}: {}", migration.machine, state(migration));
    if let Some(at) = migration.retry_at_unix_ms {
        line.push_str(&format!(", attempt {} in {}", migration.attempt, duration(at.saturating_sub(unix_ms()) as f64)));
    }
    if let Some(progress) = migration.progress.as_ref().filter(|progress| moves(progress)) {
        line.push_str(&format!(", {}", amounts(progress)));
    }
    line
}

/// Whether bytes are on their way, so that rates mean something.
fn moves(progress: &MigrationStatus) -> bool {
    matches!(progress.phase, Phase::Precopy | Phase::Switchover | Phase::Postcopy)
}

/// How long ago, in one unit.
fn ago(at_unix_ms: u64) -> String {
    let seconds = unix_ms().saturating_sub(at_unix_ms) / 1000;
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

pub(super) fn table(migrations: &[Migration]) -> String {
    let mut table = Table::new(&["ID", "MACHINE", "FROM", "TO", "STAGE", "STARTED", "TOTAL", "DOWN"]);
    for one in migrations {
        let report = one.report.as_ref().filter(|_| one.stage == MigrationStage::Completed);
        let alarm = if one.alarm.is_some() { " (!)" } else { "" };
        table.row(vec![
            one.id.clone(),
            one.machine.clone(),
            one.source.clone(),
            one.destination.clone(),
            format!("{}{alarm}", word(one.stage)),
            ago(one.started_unix_ms),
            or_dash(report.map(|report| duration(report.total_ms))),
            or_dash(report.map(|report| format!("{:.1} ms", report.downtime_ms.total))),
        ]);
    }
    let mut text = table.text("no migrations yet; `headroom migrate MACHINE --to HOST` starts one");
    for one in migrations.iter().filter(|one| !one.stage.ended() && one.progress.is_some()) {
        text.push_str(&progress(one));
        text.push('\n');
    }
    if migrations.iter().any(|one| one.alarm.is_some()) {
        text.push_str("(!) a check after the arrival failed: `headroom migration show ID`\n");
    }
    text
}

pub(super) fn details(one: &Migration) -> String {
    let mut text = format!(
        "migration {}\nmachine   {} from {} to {}\nstage     {}\nstarted   {} UTC\n",
        one.id,
        one.machine,
        one.source,
        one.destination,
        word(one.stage),
        utc(one.started_unix_ms)
    );
    for (at, failure) in one.failures.iter().enumerate() {
        text.push_str(&format!("attempt {} failed {}: {}\n", at + 1, ago(failure.at_unix_ms), failure.error));
    }
    if !one.stage.ended() && (one.attempt > 1 || one.retries_left > 0) {
        let more = if one.retries_left == 1 { "1 more".to_owned() } else { format!("{} more", one.retries_left) };
        text.push_str(&format!("attempt   {}, {more} allowed\n", one.attempt));
    }
    for (what, words) in [("alarm", &one.alarm), ("error", &one.error), ("warning", &one.warning)] {
        if let Some(words) = words {
            text.push_str(&format!("{what:<10}{words}\n"));
        }
    }
    if one.taken_back.is_some() {
        text.push_str(&format!(
            "settled   by an operator; host {} is asked until it says whether it has run the machine too\n",
            one.destination
        ));
    }
    if let Some(back) = &one.returned_by {
        text.push_str(&format!("returned  by {back}\n"));
    }
    if let Some(progress) = &one.progress {
        text.push_str(&progress_lines(one, progress));
    }
    if let Some(report) = &one.report {
        text.push_str(&report_lines(report));
    }
    text
}

fn progress_lines(one: &Migration, progress: &MigrationStatus) -> String {
    let mut text = format!("phase     {}\n", state(one));
    if moves(progress) {
        let limit = progress.bandwidth_bytes_per_second.map(|limit| format!(" of {}/s allowed", bytes(limit as f64)));
        text.push_str(&format!(
            "progress  {} sent, {} left{}\nrate      {}/s{}, guest writes {}/s\nexpected  {}\n",
            bytes(progress.bytes_done as f64),
            bytes(progress.bytes_remaining as f64),
            if progress.phase == Phase::Precopy { " of this round" } else { "" },
            bytes(progress.bytes_per_second),
            limit.unwrap_or_default(),
            bytes(progress.dirty_bytes_per_second),
            match (expected_ms(progress).map(|ms| format!("about {}", duration(ms))), progress.phase) {
                (Some(time), Phase::Precopy) => format!("{time} to the switchover"),
                (Some(time), _) => format!("{time} to the end"),
                (None, Phase::Precopy) if progress.waiting => "when you continue it".to_owned(),
                (None, Phase::Precopy) => "not at this rate: the guest writes as fast as it is sent".to_owned(),
                (None, _) => "-".to_owned(),
            },
        ));
    }
    if progress.throttle_percent > 0 {
        text.push_str(&format!("throttled vCPUs are held for up to {} % of their time\n", progress.throttle_percent));
    }
    if progress.waiting {
        text.push_str(&format!("waits     for `headroom migration continue {}`\n", one.id));
    }
    if let Some(note) = &progress.error {
        text.push_str(&format!("note      {note}\n"));
    }
    if one.hangs() {
        text.push_str(&format!("          `headroom migration abandon {}` gives the machine up\n", one.id));
    }
    text
}

/// What is told only if there is some.
fn counted(number: u64, what: &str) -> String {
    if number == 0 { String::new() } else { format!(", {number} {what}") }
}

fn report_lines(report: &Report) -> String {
    let downtime = &report.downtime_ms;
    let mut text = format!(
        "outcome   {}{}\ntotal     {}\ndowntime  {:.1} ms: {}\n",
        word(report.outcome),
        if report.reason.is_empty() { String::new() } else { format!(": {}", report.reason) },
        duration(report.total_ms),
        downtime.total,
        downtime_parts(downtime).join(" "),
    );
    text.push_str(&format!(
        "memory    {} sent in {} rounds, {} of {} pages zero{}, {}/s\ndisk      {} sent, {} skipped{}{}\n",
        bytes(report.memory.bytes_sent as f64),
        report.rounds.len(),
        report.memory.pages_zero,
        report.memory.pages_total,
        counted(report.memory.pages_delta, "sent again as what differed"),
        bytes(report.memory.throughput_bytes_per_second),
        bytes(report.disk.bytes_sent as f64),
        bytes(report.disk.bytes_skipped as f64),
        match report.disk.bytes_reused {
            0 => String::new(),
            reused => format!(", {} there from an earlier attempt", bytes(reused as f64)),
        },
        counted(report.disk.mirrored, "blocks sent while the guest's writes waited for that"),
    ));
    for one in &report.throttled {
        text.push_str(&format!(
            "throttled vCPU {}: up to {} % of its time, {} in all\n",
            one.vcpu,
            one.percent_max,
            duration(one.held_ms)
        ));
    }
    text.push_str(&format!(
        "digests   {}\ntls       {} {}\n",
        digests(&report.verification),
        report.tls.version,
        report.tls.cipher,
    ));
    for warning in &report.warnings {
        text.push_str(&format!("warning   {warning}\n"));
    }
    if let Some(rates) = rates(&report.verification.rates) {
        text.push_str(&format!("guest     {rates}\n"));
    }
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
    use crate::api::types::MigrationSide;

    fn running() -> Migration {
        let status = MigrationStatus {
            id: "mig-0123456789ab".into(),
            phase: Phase::Precopy,
            committed: false,
            round: 12,
            bytes_done: 900 << 30,
            bytes_remaining: 100 << 30,
            bytes_per_second: 999.9 * 1_048_576.0,
            dirty_bytes_per_second: 500.0 * 1_048_576.0,
            throttle_percent: 0,
            waiting: false,
            lost: false,
            bandwidth_bytes_per_second: Some(1 << 30),
            expected_remaining_ms: Some(3_599_000.0),
            report: None,
            error: None,
        };
        Migration {
            stage: MigrationStage::Transferring,
            progress: Some(status),
            started_unix_ms: unix_ms(),
            ..Migration::new("mig-0123456789ab", "web-1", MigrationSide::Source, "a1", "b1")
        }
    }

    #[test]
    fn what_changes_fits_into_eighty_columns() {
        let one = running();
        for text in [progress(&one), table(std::slice::from_ref(&one)), details(&one)] {
            for line in text.lines() {
                assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
            }
        }
    }

    #[test]
    fn rate_rest_and_time_are_there() {
        let text = details(&running());
        for part in [
            "pre-copy round 12",
            "100.0 GiB left",
            "999.9 MiB/s of 1.0 GiB/s allowed",
            "guest writes 500.0 MiB/s",
            "59 min 59 s",
        ] {
            assert!(text.contains(part), "{part} is missing:\n{text}");
        }
        let mut held = running();
        held.progress.as_mut().unwrap().waiting = true;
        held.progress.as_mut().unwrap().expected_remaining_ms = None;
        assert!(details(&held).contains("headroom migration continue mig-0123456789ab"), "{}", details(&held));
    }
}
