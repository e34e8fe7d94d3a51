//! The result of the demo: as JSON for scripts, and as a summary for people.

use migration::report::{Downtime, Report};
use serde::Serialize;

use super::observer::{TcpSummary, UdpSummary};
use super::promise::{Oracle, Promise};
use super::reactive::{Demand, Replay, Threshold};
use super::screen::{Line, Style};
use crate::api::types::Plan;
use crate::words::{digests, downtime_parts};

/// What `--json FILE` writes.
#[derive(Clone, Debug, Serialize)]
pub struct DemoReport {
    /// Version of this program.
    pub version: &'static str,
    /// Every promise was kept.
    pub ok: bool,
    /// From the command to the end, in seconds.
    pub seconds: f64,
    /// Hosts, machines, pools.
    pub hosts: usize,
    /// Machines.
    pub machines: usize,
    /// Capacity of the busy pool in cores.
    pub capacity_cores: f64,
    /// CPU quotas of the hosts are enforced; else why not.
    pub quota_enforced: bool,
    /// See [`DemoReport::quota_enforced`].
    pub quota_reason: Option<String>,
    /// The planner's decision.
    pub plan: Option<Plan>,
    /// All its decisions, the first one first, those without a move included.
    pub plans: Vec<Plan>,
    /// Its migration, with the network gap as the observer saw it.
    pub migration: Option<Report>,
    /// Every migration that left the busy pool, the first one first.
    pub migrations: Vec<Report>,
    /// When the migration ended, in seconds since the start of the load.
    pub migrated_at_s: Option<f64>,
    /// From the end of the migration to the contention that did not come.
    pub lead_time_s: Option<f64>,
    /// UDP in the window of the move.
    pub udp: Option<UdpSummary>,
    /// TCP over the whole time.
    pub tcp: Option<TcpSummary>,
    /// What the guests found in their own memory and disks.
    pub oracles: Vec<Oracle>,
    /// A plain threshold on the same demand.
    pub reactive: ReactiveReport,
    /// Highest load of the busy pool that was measured, as a share of its capacity.
    pub peak_share: f64,
    /// Demand of the machines that began in the busy pool.
    pub demand: Vec<Demand>,
    /// Load of the busy pool.
    pub load: Vec<Demand>,
    /// The promises.
    pub promises: Vec<Promise>,
}

/// A plain threshold on the same demand.
#[derive(Clone, Debug, Serialize)]
pub struct ReactiveReport {
    /// The threshold.
    pub threshold: Threshold,
    /// How long its migration was taken to be.
    pub migration_s: f64,
    /// What it would have suffered.
    pub replay: Replay,
}

impl DemoReport {
    /// The summary.
    pub fn lines(&self) -> Vec<Line> {
        let mut lines = vec![Line::new(), Line::new().add(Style::Bold, " Summary")];
        lines.push(row(
            "in all",
            format!("{:.0} s, {} hosts in two pools, {} machines", self.seconds, self.hosts, self.machines),
        ));
        if let Some(reason) = &self.quota_reason {
            lines.push(row("quotas", format!("NOT enforced on this machine: {reason}")));
        }
        if let Some(plan) = &self.plan {
            lines.push(row("plan", format!("score {:.2} within {:.0} s", plan.score, plan.horizon_s)));
            lines.extend(plan.reasons.first().map(|reason| row("why", reason.clone())));
        }
        if let Some(migration) = &self.migration {
            lines.extend(migration_lines(migration));
        }
        lines.extend(self.network_lines());
        lines.push(self.lead_line());
        lines.push(self.reactive_line());
        lines.push(Line::new());
        lines.extend(self.promises.iter().map(promise_line));
        lines
    }

    fn lead_line(&self) -> Line {
        let peak = format!("pool at {:.0} % at most", self.peak_share * 100.0);
        match (self.migrated_at_s, self.reactive.replay.contention_at_s, self.lead_time_s) {
            (Some(done), Some(full), Some(lead)) => {
                row("lead time", format!("{lead:.1} s (moved at {done:.1} s, full at {full:.1} s without it; {peak})"))
            }
            _ => row("lead time", format!("unknown: there was no migration or no contention ({peak})")),
        }
    }

    fn reactive_line(&self) -> Line {
        let replay = &self.reactive.replay;
        let least = if replay.cut_short { "at least " } else { "" };
        let share = self.reactive.threshold.share * 100.0;
        row(
            "reactive",
            format!("a threshold at {share:.0} % would have had {least}{:.1} s of contention", replay.violation_s),
        )
    }

    fn network_lines(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        if let Some(udp) = &self.udp {
            lines.push(row(
                "outside",
                format!(
                    "silent for {} at the switchover and {:.1} ms at most, {} of {} requests lost, rtt {:.2} ms",
                    udp.downtime_gap_ms.map_or_else(|| "?".into(), |gap| format!("{gap:.1} ms")),
                    udp.gap_ms,
                    udp.lost,
                    udp.sent,
                    udp.rtt_p50_us / 1e3
                ),
            ));
        }
        if let Some(tcp) = &self.tcp {
            let state = if tcp.complete() { "alive, all" } else { "BROKEN," };
            lines.push(row("TCP", format!("{state} {} bytes checked", tcp.bytes_echoed)));
        }
        lines
    }
}

fn migration_lines(migration: &Report) -> Vec<Line> {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let (memory, disk) = (&migration.memory, &migration.disk);
    vec![
        row(
            "move",
            format!(
                "{} {} -> {}: {:.2} s in all, {}",
                migration.machine,
                migration.source,
                migration.destination,
                migration.total_ms / 1e3,
                migration.tls.version
            ),
        ),
        row("downtime", downtime_in_words(&migration.downtime_ms)),
        row(
            "memory",
            format!(
                "{} of {} pages zero, {:.0} MiB sent in {} rounds, {:.0} MB/s",
                memory.pages_zero,
                memory.pages_total,
                mib(memory.bytes_sent),
                migration.rounds.len(),
                memory.throughput_bytes_per_second / 1e6
            ),
        ),
        row(
            "disk",
            format!(
                "{:.0} MiB sent, {:.0} MiB skipped, {} rounds",
                mib(disk.bytes_sent),
                mib(disk.bytes_skipped),
                disk.rounds
            ),
        ),
        row("digests", digests(&migration.verification)),
    ]
}

fn downtime_in_words(downtime: &Downtime) -> String {
    format!("{:.1} ms = {}", downtime.total, downtime_parts(downtime).join(" + "))
}

fn row(name: &str, text: String) -> Line {
    Line::new().add(Style::Dim, format!(" {name:<10}")).text(text)
}

fn promise_line(promise: &Promise) -> Line {
    let (style, mark) = if promise.kept { (Style::Good, " kept   ") } else { (Style::Bad, " BROKEN ") };
    Line::new().add(style, mark).text(promise.promise).add(Style::Dim, format!(": {}", promise.measured))
}
