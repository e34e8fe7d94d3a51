//! What every phase at the source knows and may use.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::control::Control;
use crate::error::MigrationError;
use crate::guest::{MachineLayout, SourceGuest};
use crate::mirror::Bell;
use crate::page::delta::Copies;
use crate::page::{Digests, SharedBitmap};
use crate::policy::Limits;
use crate::report::{Report, Trigger};
use crate::transport::TransportError;
use crate::transport::stop::Stop;
use crate::transport::tls::Identity;

/// What the source needs to know of one migration.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// Migration id, unique over the hosts; the destination was told the same.
    pub id: String,
    /// Where the destination listens.
    pub address: SocketAddr,
    /// One-time token, known to both ends; never sent itself.
    pub token: [u8; 32],
    /// Name of this host, which its certificate carries.
    pub source_host: String,
    /// Name that the destination's certificate must carry.
    pub destination_host: String,
    /// This host's certificate and the authority.
    pub identity: Identity,
    /// What the operator allows.
    pub limits: Limits,
    /// Why it was started; copied into the report.
    pub trigger: Trigger,
}

/// What every phase knows.
pub(super) struct Context {
    pub(super) guest: Arc<dyn SourceGuest>,
    pub(super) options: SourceOptions,
    pub(super) control: Control,
    pub(super) stop: Stop,
    pub(super) report: Report,
    pub(super) started: Instant,
    pub(super) held: Held,
    pub(super) throttling: Throttling,
    pub(super) mirroring: Mirroring,
    /// What has been done to the machine and must be undone if the migration fails.
    pub(super) done: Done,
}

/// How long the operator held the switchover back: counts for no limit.
#[derive(Default)]
pub(super) struct Held {
    pub(super) since: Option<Instant>,
    pub(super) time: Duration,
    pub(super) rounds: u32,
}

#[derive(Default)]
pub(super) struct Done {
    pub(super) tracking: bool,
    /// The guest was asked for free pages.
    pub(super) hinting: bool,
    pub(super) paused: bool,
    /// The guest is stopped, and must not be for longer than this before Commit.
    pub(super) pause_limit: Option<Instant>,
    pub(super) fenced: bool,
}

impl Context {
    pub(super) fn new(guest: Arc<dyn SourceGuest>, options: SourceOptions, control: &Control) -> Self {
        let mut report = Report::new(&options.id, &options.source_host, &options.destination_host);
        report.streams = options.limits.streams;
        report.trigger = options.trigger.clone();
        if control.bandwidth().is_none() {
            control.set_bandwidth(options.limits.bandwidth_bytes_per_second);
        }
        Self {
            guest,
            stop: Stop::new(control),
            control: control.clone(),
            options,
            report,
            started: Instant::now(),
            held: Held::default(),
            throttling: Throttling::default(),
            mirroring: Mirroring::default(),
            done: Done::default(),
        }
    }

    /// Time since the start, without that in which the operator held it back.
    pub(super) fn spent(&self) -> Duration {
        let held = self.held.time + self.held.since.map_or(Duration::ZERO, |since| since.elapsed());
        self.started.elapsed().saturating_sub(held)
    }

    /// Fails if somebody has cancelled.
    pub(super) fn check_cancelled(&self) -> Result<(), MigrationError> {
        if self.control.is_cancelled() { Err(MigrationError::Cancelled) } else { Ok(()) }
    }
}

/// What the destination holds.
pub(super) struct Sent {
    pub(super) layout: MachineLayout,
    /// Pages that were last sent with data; all others are zeroes there.
    pub(super) held: Arc<SharedBitmap>,
    /// Copies of pages as they were last sent.
    pub(super) copies: Arc<Copies>,
    /// Pages that were left out because the guest does not use them, and has not written since.
    pub(super) skipped: Skipped,
    /// Digests of the blocks as they were last sent.
    pub(super) disks: Vec<Arc<Digests>>,
}

/// What was left out, and not written since: the destination holds zeroes for it.
pub(super) type Skipped = Arc<SharedBitmap>;

/// What was done to the vCPUs.
#[derive(Debug, Default)]
pub(super) struct Throttling {
    /// In force now; empty if nothing is.
    pub(super) percent: Vec<u8>,
    /// How long each had been held when the first was.
    pub(super) before: Option<Vec<Duration>>,
    /// The machine cannot be throttled.
    pub(super) refused: bool,
}

impl Throttling {
    /// The share in force for each of the vCPUs.
    pub(super) fn percent(&self, vcpus: u16) -> Vec<u8> {
        let mut percent = self.percent.clone();
        percent.resize(vcpus.into(), 0);
        percent
    }
}

/// Whether writes are mirrored.
#[derive(Clone, Debug, Default)]
pub(super) enum Mirroring {
    /// They are not.
    #[default]
    Off,
    /// They are; the bell is rung by whoever writes.
    On(Arc<Bell>),
    /// This machine cannot do that.
    Refused,
}

/// Turns the peer's own words into an error of their own kind.
pub(super) fn by_peer(error: TransportError) -> MigrationError {
    MigrationError::by_peer("destination", error)
}
