//! Results as JSON, as a table for the terminal and as a document.

use std::fmt::Write as _;

use migration::report::{Outcome as End, Report};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cpu::HostCpu;
use crate::limits::Limits;
use crate::link::Link;
use crate::median::median;
use crate::plot::{Pair, Panel, svg};
use crate::scenario::{DOWNTIME_LIMIT_MS, FILLED_MIB, MEMORY_MIB, Scenario};
use crate::startup::Startup;

/// One run of ours.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// The source's report.
    #[serde(flatten)]
    pub report: Report,
    /// What the hosts spent on it.
    pub cpu: HostCpu,
    /// What the guest noticed.
    pub guest: GuestView,
}

/// The guest's own view of a move.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct GuestView {
    /// MiB per second that the sweeper wrote before the move; 0 if it does not sweep.
    pub sweep_mib_per_second_before: f64,
    /// From the start of the move to its end.
    pub sweep_mib_per_second_while_moving: f64,
    /// Longest time by which its main loop came late, up to the end of the move.
    pub longest_stall_ms: f64,
}

impl GuestView {
    /// The share of its own rate that the sweeper kept; `None` if it does not sweep.
    fn kept(&self) -> Option<f64> {
        (self.sweep_mib_per_second_before > 0.0)
            .then(|| self.sweep_mib_per_second_while_moving / self.sweep_mib_per_second_before)
    }
}

/// One run of the peer.
#[derive(Clone, Debug, Serialize)]
pub struct PeerRun {
    /// Total migration time as the peer reports it.
    pub total_ms: f64,
    /// Downtime as the peer reports it.
    pub downtime_ms: f64,
    /// Longest silence that the observer saw.
    pub network_gap_ms: f64,
    /// What the hosts spent on it.
    pub cpu: HostCpu,
    /// What the guest noticed.
    pub guest: GuestView,
}

/// All runs of the peer.
#[derive(Clone, Debug, Serialize)]
pub struct PeerOutcome {
    /// `qemu`.
    pub name: &'static str,
    /// As it says of itself.
    pub version: String,
    /// Single runs.
    pub runs: Vec<PeerRun>,
}

/// Ours divided by the peer's, medians.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ratio {
    /// Of total time.
    pub total: f64,
    /// Of the network gap.
    pub gap: f64,
}

/// One scenario.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Which.
    pub scenario: Scenario,
    /// Between the hosts.
    pub link: Link,
    /// The guest's work.
    pub guest: Value,
    /// Our migration reports.
    pub runs: Vec<Run>,
    /// The peer's runs, where it ran.
    pub peer: Option<PeerOutcome>,
    /// Ours against the peer.
    pub ratio: Option<Ratio>,
    /// Limits measured in the same run.
    pub limits: Limits,
}

/// Several scenarios in one file.
#[derive(Serialize)]
pub struct Everything {
    /// Each as it would stand alone.
    pub scenarios: Vec<Outcome>,
    /// An idle machine over different numbers of channels, if that was measured.
    pub channels: Vec<Outcome>,
    /// Start-up, if it was measured.
    pub startup: Option<Startup>,
}

impl Outcome {
    /// Puts the runs together.
    pub fn new(scenario: Scenario, link: Link, runs: Vec<Run>, peer: Option<PeerOutcome>, limits: Limits) -> Self {
        let guest =
            json!({"memory_mib": MEMORY_MIB, "filled_mib": FILLED_MIB, "vcpus": 1, "workload": scenario.workload()});
        let mut outcome = Self { scenario, link, guest, runs, peer, ratio: None, limits };
        outcome.ratio = outcome.peer.as_ref().map(|peer| Ratio {
            total: outcome.total_ms() / median(peer.runs.iter().map(|run| run.total_ms)),
            gap: outcome.gap_ms() / median(peer.runs.iter().map(|run| run.network_gap_ms)),
        });
        outcome
    }

    /// Whether a run did not do what was promised.
    pub fn broken(&self) -> bool {
        self.runs.iter().map(|run| &run.report).any(|run| {
            run.outcome != End::Completed
                || run.verification.memory_digest_ok == Some(false)
                || run.verification.disk_digest_ok == Some(false)
        })
    }

    fn total_ms(&self) -> f64 {
        median(self.runs.iter().map(|run| run.report.total_ms))
    }

    fn downtime_ms(&self) -> f64 {
        median(self.runs.iter().map(|run| run.report.downtime_ms.total))
    }

    fn gap_ms(&self) -> f64 {
        median(self.runs.iter().filter_map(|run| run.report.network_gap_ms))
    }

    fn row(&self) -> [String; 8] {
        let peer = |value: fn(&PeerRun) -> f64| {
            self.peer.as_ref().map_or("-".to_owned(), |peer| format!("{:.1}", median(peer.runs.iter().map(value))))
        };
        let ratio =
            |value: fn(&Ratio) -> f64| self.ratio.as_ref().map_or("-".to_owned(), |r| format!("{:.2}", value(r)));
        [
            format!("{:?}", self.scenario).to_lowercase(),
            format!("{:.0}", self.total_ms()),
            peer(|run| run.total_ms),
            ratio(|ratio| ratio.total),
            format!("{:.1}", self.downtime_ms()),
            format!("{:.1}", self.gap_ms()),
            peer(|run| run.network_gap_ms),
            ratio(|ratio| ratio.gap),
        ]
    }
}

const HEAD: [&str; 8] = ["scenario", "total ms", "peer ms", "ratio", "downtime ms", "gap ms", "peer gap ms", "ratio"];

/// The table, in Markdown that also reads well on a terminal.
pub fn table(everything: &Everything, limits: &Limits) -> String {
    let Everything { scenarios: outcomes, channels, startup } = everything;
    let mut text = String::new();
    if !outcomes.is_empty() {
        let rows: Vec<[String; 8]> = outcomes.iter().map(Outcome::row).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0).max(HEAD[column].len());
        let line = |cells: [&str; 8]| {
            let cells: Vec<String> = (0..8).map(|column| format!("{:>1$}", cells[column], width(column))).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        text += &line(HEAD);
        text += &format!(
            "|{}|\n",
            (0..8).map(|column| format!("{}:", "-".repeat(width(column) + 1))).collect::<Vec<_>>().join("|")
        );
        for row in &rows {
            text += &line(std::array::from_fn(|column| row[column].as_str()));
        }
        text.push('\n');
    }
    if let Some(startup) = startup {
        let _ = writeln!(
            text,
            "Start of the process to the first guest instruction: {:.1} ms (median)",
            startup.first_instruction_ms
        );
        let (booted, arrived) = (startup.overhead_mib, startup.overhead_after_arrival_mib);
        let _ = writeln!(
            text,
            "Resident memory beyond guest RAM: {booted:.1} MiB after a boot, {arrived:.1} MiB after an arrival (medians)\n"
        );
    }
    for outcome in outcomes {
        text += &guest_line(outcome);
    }
    let gigabytes = |rate: f64| rate / 1e9;
    let _ = writeln!(
        text,
        "Limits on this machine, in GB/s: memory copy {:.1}, loopback TCP {:.2}, TLS 1.3 on one core {:.1} encrypting and {:.1} decrypting",
        gigabytes(limits.memory_copy_bytes_per_second),
        gigabytes(limits.loopback_tcp_bytes_per_second),
        gigabytes(limits.tls_encrypt_bytes_per_second),
        gigabytes(limits.tls_decrypt_bytes_per_second),
    );
    let _ = writeln!(
        text,
        "One TLS stream over loopback, a thread at each end: {:.2}{}",
        gigabytes(limits.tls_loopback_bytes_per_second),
        limits
            .userfaultfd_copy_bytes_per_second
            .map_or_else(String::new, |rate| format!("; userfaultfd copies into fresh memory: {:.2}", gigabytes(rate)))
    );
    let measured = if channels.is_empty() { outcomes } else { channels };
    for outcome in measured.iter().filter(|outcome| outcome.scenario == Scenario::Idle) {
        let rate = median(outcome.runs.iter().map(|run| run.report.memory.throughput_bytes_per_second));
        let streams = outcome.runs.first().map_or(0, |run| run.report.streams);
        let _ = writeln!(
            text,
            "An idle machine's memory over {streams} channel{}: {:.2}, which is {:.2} times that stream",
            if streams == 1 { "" } else { "s" },
            gigabytes(rate),
            rate / limits.tls_loopback_bytes_per_second
        );
    }
    if let (Some(read), Some(write)) = (limits.disk_read_bytes_per_second, limits.disk_write_bytes_per_second) {
        let _ = writeln!(
            text,
            "fio, 64 KiB direct, 32 in flight, in GB/s: {:.2} reading, {:.2} writing",
            gigabytes(read),
            gigabytes(write)
        );
    }
    if let Some(fault) = limits.fault_us {
        let trip = limits.tls_round_trip_us;
        let _ = writeln!(
            text,
            "A bare userfaultfd fault {fault:.0} us, a page over TLS on loopback {trip:.0} us (medians)"
        );
        let faults: Vec<(f64, f64, u64)> = outcomes
            .iter()
            .flat_map(|outcome| &outcome.runs)
            .filter_map(|run| run.report.postcopy.as_ref())
            .map(|post| (post.fault_us_p50, post.fault_us_p99, post.faults))
            .collect();
        if !faults.is_empty() {
            let (p50, p99) = (median(faults.iter().map(|f| f.0)), median(faults.iter().map(|f| f.1)));
            let _ = writeln!(
                text,
                "A fault of the guest in post-copy: p50 {p50:.0} us, p99 {p99:.0} us (medians of runs with {} faults in all): p50 is {:.1} times those two together",
                faults.iter().map(|f| f.2).sum::<u64>(),
                p50 / (fault + trip)
            );
        }
    }
    text
}

/// What the guest noticed, if it sweeps.
fn guest_line(outcome: &Outcome) -> String {
    let view = |views: Vec<GuestView>| {
        let kept: Vec<f64> = views.iter().filter_map(GuestView::kept).collect();
        let stall = median(views.iter().map(|view| view.longest_stall_ms));
        (!kept.is_empty()).then(|| format!("{:.0} %, longest stall {stall:.1} ms", median(kept.into_iter()) * 1e2))
    };
    let Some(ours) = view(outcome.runs.iter().map(|run| run.guest).collect()) else { return String::new() };
    let name = format!("{:?}", outcome.scenario).to_lowercase();
    let peer = outcome.peer.as_ref().and_then(|peer| view(peer.runs.iter().map(|run| run.guest).collect()));
    let peer = peer.map_or_else(String::new, |peer| format!(" (peer: {peer})"));
    format!("The guest of {name} kept of its own rate while it moved: {ours}{peer}\n")
}

/// The medians as a picture.
pub fn picture(outcomes: &[Outcome]) -> String {
    let pairs = |ours: fn(&Outcome) -> f64, peer: fn(&PeerRun) -> f64| {
        let pair = |outcome: &Outcome| Pair {
            name: format!("{:?}", outcome.scenario).to_lowercase(),
            ours: ours(outcome),
            peer: outcome.peer.as_ref().map(|other| median(other.runs.iter().map(peer))),
        };
        outcomes.iter().map(pair).collect()
    };
    let panels = [
        Panel { title: "total time, ms", pairs: pairs(Outcome::total_ms, |run| run.total_ms) },
        Panel {
            title: "longest silence of the guest on the network, ms",
            pairs: pairs(Outcome::gap_ms, |run| run.network_gap_ms),
        },
    ];
    let peer = outcomes.iter().find_map(|outcome| outcome.peer.as_ref());
    svg(&panels, peer.map_or("", |peer| &peer.version))
}

/// The day in UTC, as the system's own `date` says it.
fn today() -> String {
    let output = std::process::Command::new("date").args(["-u", "+%Y-%m-%d"]).output();
    output.map_or_else(|_| "a day unknown".to_owned(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// The table with what a reader needs to judge it.
pub fn document(everything: &Everything, limits: &Limits, picture: &str) -> String {
    let outcomes = if everything.scenarios.is_empty() { &everything.channels } else { &everything.scenarios };
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown CPU").to_owned();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let peer = outcomes.iter().find_map(|outcome| outcome.peer.as_ref()).map_or_else(
        || "No peer ran.".to_owned(),
        |peer| {
            format!("The peer is {}, plain TCP, on its machine type `microvm` with the same guest image and the same limit on downtime ({DOWNTIME_LIMIT_MS} ms).", peer.version)
        },
    );
    format!(
        "# Benchmarks\n\nWritten by `make bench`. Guest: {MEMORY_MIB} MiB, one vCPU, {FILLED_MIB} MiB filled. Ours moves memory (and the disk, where the \
         scenario has one) over mutual TLS 1.3. {peer} Both run in turn, medians of {} runs. `gap` is the longest silence that an \
         observer outside the hosts saw at 1,000 echo requests a second.{}\n\nMachine: {cores} cores, {model}, Linux {}, on {}.\n\n![ours and the peer's]({picture})\n\n{}",
        outcomes.first().map_or(0, |outcome| outcome.runs.len()),
        outcomes.first().map_or_else(String::new, |outcome| outcome.link.words()),
        kernel.trim(),
        today(),
        table(everything, limits),
    )
}
