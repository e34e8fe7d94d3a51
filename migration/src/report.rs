//! The report of one migration, as it is printed, stored and scripted against.
//!
//! Field names and units are a contract (`--json`, the API, the audit log): they may be added to, never renamed. Every value
//! is measured; what was not measured is `null` and not zero.

use serde::{Deserialize, Serialize};

/// How memory was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Rounds while the guest runs, then stop-and-copy.
    Precopy,
    /// The guest runs at the destination before its memory is there.
    Postcopy,
    /// Pre-copy that fell over to post-copy.
    Hybrid,
    /// Handed over on the same host.
    Local,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The machine runs at the destination.
    Completed,
    /// It runs at the source as before; `reason` says why.
    Failed,
    /// As `Failed`, by the operator's wish.
    Cancelled,
    /// Commit was sent and not answered: fenced at the source until the daemons have settled it.
    InDoubt,
}

/// Why it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TriggerKind {
    /// An operator asked.
    #[default]
    Manual,
    /// A forecast of contention.
    Forecast,
    /// A scheduled event.
    Event,
    /// The host is being drained.
    Drain,
    /// A declared probe failed after a migration, and the operator wanted the machine back then.
    Return,
}

/// Parts of the downtime in milliseconds, in the order in which they happen; `total` spans from the stop of the last vCPU at
/// the source to the start of the first one at the destination.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Downtime {
    /// Stopping vCPUs and devices.
    pub pause: f64,
    /// The last dirty pages.
    pub final_pages: f64,
    /// The last dirty blocks, on stable storage at the destination.
    pub final_blocks: f64,
    /// Saving, sending and restoring state.
    pub state: f64,
    /// Prepared, fence, Commit.
    pub commit: f64,
    /// Starting the vCPUs at the destination.
    pub resume: f64,
    /// All of it, measured at the source from the pause to the answer of the resumed destination, less that answer's way.
    pub total: f64,
}

/// One pass over dirty memory.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Round {
    /// Pages looked at in this round.
    pub pages: u64,
    /// Bytes put on the wire for them.
    pub bytes: u64,
    /// Pages of them that were all zeroes: sent as such, or not at all if the destination has nothing else there.
    pub zero_pages: u64,
    /// Duration.
    pub ms: f64,
    /// Pages that the guest dirtied meanwhile.
    pub dirty_pages_after: u64,
}

/// Totals for memory.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct MemoryTotals {
    /// On the wire, before TLS.
    pub bytes_sent: u64,
    /// Pages of the machine.
    pub pages_total: u64,
    /// Pages known to be zero without being sent.
    pub pages_zero: u64,
    /// Pages sent again as what differed from what the destination held.
    #[serde(default)]
    pub pages_delta: u64,
    /// Over the time in which pages were sent.
    pub throughput_bytes_per_second: f64,
}

/// Totals for disks.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct DiskTotals {
    /// On the wire, before TLS.
    pub bytes_sent: u64,
    /// Holes and zero blocks that were not sent.
    pub bytes_skipped: u64,
    /// Blocks that an earlier attempt had left at the destination and that were not sent again.
    #[serde(default)]
    pub bytes_reused: u64,
    /// Passes over dirty blocks.
    pub rounds: u64,
    /// Blocks that were mirrored as the guest wrote them.
    pub mirrored: u64,
}

/// What post-copy did.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct PostcopyTotals {
    /// Pages and blocks that the guest waited for.
    pub faults: u64,
    /// Median time in microseconds from the fault's arrival at the destination's fault thread to the guest's waking.
    pub fault_us_p50: f64,
    /// 99th percentile.
    pub fault_us_p99: f64,
    /// Pages pushed in the background.
    pub pushed_pages: u64,
    /// Reconnects after a cut link.
    pub recoveries: u64,
}

/// A vCPU that was held so that it dirtied less.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct ThrottledVcpu {
    /// Its number.
    pub vcpu: u16,
    /// Largest share of its time for which it was to be held.
    pub percent_max: u8,
    /// For how long it was held, all in all.
    pub held_ms: f64,
}

/// The session that carried it.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TlsInfo {
    /// For example `TLSv1_3`.
    pub version: String,
    /// For example `TLS13_AES_256_GCM_SHA384`.
    pub cipher: String,
}

/// One probe after arrival.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// What was asked, for example `ping 10.0.0.5` or `tcp 10.0.0.5:7`.
    pub name: String,
    /// Whether it was answered as declared.
    pub ok: bool,
    /// How long that took, or what went wrong.
    pub detail: String,
}

/// What was checked after the move.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Verification {
    /// Every page that the guest had not overwritten meanwhile had the digest of what was sent; `null` if not checked.
    pub memory_digest_ok: Option<bool>,
    /// The same for blocks.
    pub disk_digest_ok: Option<bool>,
    /// Pages compared.
    pub pages_checked: u64,
    /// Pages that the guest had overwritten before they could be compared.
    pub pages_overwritten: u64,
    /// Blocks compared.
    pub blocks_checked: u64,
    /// Blocks overwritten before they could be compared.
    pub blocks_overwritten: u64,
    /// Declared probes.
    pub probes: Vec<Probe>,
    /// What the guest did before and after; filled in by the hosts.
    #[serde(default)]
    pub rates: Rates,
}

/// What a guest does, by the counters of its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct GuestRates {
    /// Processor time of its vCPUs in cores.
    pub vcpu_cores: f64,
    /// Read from and written to its disks.
    pub disk_bytes_per_second: f64,
    /// Received and sent.
    pub network_bytes_per_second: f64,
}

/// The same at both hosts.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Rates {
    /// At the source, when it was last measured before the migration; `null` if it never was.
    pub before: Option<GuestRates>,
    /// At the destination, over half a second after its arrival; `null` if it could not be measured.
    pub after: Option<GuestRates>,
}

/// Why and with which expectation it was started.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Trigger {
    /// Who or what asked.
    pub kind: TriggerKind,
    /// Contention score at that time.
    pub score: Option<f64>,
    /// Horizon of the forecast in seconds.
    pub horizon_s: Option<f64>,
    /// Expected duration.
    pub predicted_total_ms: Option<f64>,
    /// Expected downtime.
    pub predicted_downtime_ms: Option<f64>,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Migration id, unique over the hosts.
    pub id: String,
    /// Machine name.
    pub machine: String,
    /// Source host.
    pub source: String,
    /// Destination host.
    pub destination: String,
    /// How memory moved.
    pub mode: Mode,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed and what to do, or why it was started.
    pub reason: String,
    /// It failed for a reason that may be gone at the next attempt: a lost link, a peer that went away.
    #[serde(default)]
    pub transient: bool,
    /// From the request to the resumed destination; in post-copy, to the arrival of the last page and block.
    pub total_ms: f64,
    /// When the guest was stopped at the source, in milliseconds of Unix time by that host's clock; `null` if it was not.
    #[serde(default)]
    pub paused_unix_ms: Option<f64>,
    /// Downtime and its parts.
    pub downtime_ms: Downtime,
    /// Longest silence seen by an outside observer, where there was one.
    pub network_gap_ms: Option<f64>,
    /// Memory rounds.
    pub rounds: Vec<Round>,
    /// Memory totals.
    pub memory: MemoryTotals,
    /// Disk totals.
    pub disk: DiskTotals,
    /// Post-copy totals; `null` if there was none.
    pub postcopy: Option<PostcopyTotals>,
    /// Highest throttling applied to a vCPU: the share of its time for which it was held.
    pub throttle_percent_max: u8,
    /// The vCPUs that were throttled.
    #[serde(default)]
    pub throttled: Vec<ThrottledVcpu>,
    /// What the source's machine could not do as it should, so that more was sent than had to be; in words.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Number of memory channels.
    pub streams: u16,
    /// The TLS session.
    pub tls: TlsInfo,
    /// Checks after the move.
    pub verification: Verification,
    /// Why it was started.
    pub trigger: Trigger,
}

impl Report {
    /// A report in which nothing was measured yet: it says `Failed` until somebody knows better.
    pub fn new(id: &str, source: &str, destination: &str) -> Self {
        Self {
            id: id.to_owned(),
            machine: String::new(),
            source: source.to_owned(),
            destination: destination.to_owned(),
            mode: Mode::Precopy,
            outcome: Outcome::Failed,
            reason: String::new(),
            transient: false,
            total_ms: 0.0,
            paused_unix_ms: None,
            downtime_ms: Downtime::default(),
            network_gap_ms: None,
            rounds: Vec::new(),
            memory: MemoryTotals::default(),
            disk: DiskTotals::default(),
            postcopy: None,
            throttle_percent_max: 0,
            throttled: Vec::new(),
            warnings: Vec::new(),
            streams: 0,
            tls: TlsInfo::default(),
            verification: Verification::default(),
            trigger: Trigger::default(),
        }
    }
}
