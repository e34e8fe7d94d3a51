//! The end that gives the machine away.
//!
//! ```text
//!                                             ┌──> Postcopy ──┐
//!  Handshake ──> Precopy ──> Switchover ──> Committed ──────> Verify ──> (Completed)
//!      │            │            │              │   └──────────────> (InDoubt: no answer, stays fenced)
//!      └────────────┴────────────┴──> abort     └── "did not run" ─> unfence, abort
//!                                       └─────────────────────────────> (Failed | Cancelled: runs here)
//! ```
//!
//! Each state owns what its phase may touch and is consumed by the step to the next one: nothing can send pages before the
//! handshake or after Commit, because there is nothing to send them with. The way back out of a state hands over what
//! must be told or cut off ([`Failed`]).

mod abort;
mod connect;
mod disk;
mod hints;
mod memory;
mod mirroring;
mod postcopy;
mod postcopy_board;
mod postcopy_session;
mod precopy;
mod reuse;
mod switchover;
mod throttling;
mod verify;
mod workers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::control::{Control, Phase};
use crate::error::MigrationError;
use crate::guest::{MachineLayout, SourceGuest};
use crate::page::delta::Copies;
use crate::page::{Digests, SharedBitmap};
use crate::policy::Limits;
use crate::report::{Outcome, Report, Trigger};
use crate::transport::channels::Channel;
use crate::transport::stream::Stop;
use crate::transport::tls::Identity;
pub(crate) use verify::differences;
use workers::Workers;

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

/// Migrates `guest` and returns when it is over. Never panics on what the peer sends; the outcome is in the report:
///
/// * [`Outcome::Completed`]: the machine runs at the destination; here it stays paused and fenced.
/// * [`Outcome::Failed`], [`Outcome::Cancelled`]: it runs here as before, `reason` says why.
/// * [`Outcome::InDoubt`]: Commit was sent and not answered; here it stays paused and fenced.
pub fn run(guest: Arc<dyn SourceGuest>, options: SourceOptions, control: &Control) -> Report {
    let span = tracing::info_span!("migration", id = %options.id, role = "source");
    let _entered = span.enter();
    let mut context = Context::new(guest, options, control);
    let mut state = State::Handshake;
    while !matches!(state, State::Ended) {
        state = match state.step(&mut context) {
            Ok(next) => next,
            Err(failed) => {
                abort::abort(&mut context, failed);
                State::Ended
            }
        };
    }
    context.release_guest();
    context.report.warnings = context.guest.warnings();
    control.set_phase(Phase::Ended);
    tracing::info!(outcome = ?context.report.outcome, reason = %context.report.reason, total_ms = context.report.total_ms, "ended");
    std::mem::replace(&mut context.report, Report::new("", "", ""))
}

/// What every phase knows.
struct Context {
    guest: Arc<dyn SourceGuest>,
    options: SourceOptions,
    control: Control,
    stop: Stop,
    report: Report,
    started: Instant,
    held: Held,
    throttling: throttling::Throttling,
    mirroring: mirroring::Mirroring,
    /// What has been done to the machine and must be undone if the migration fails.
    done: Done,
}

/// How long the operator held the switchover back: counts for no limit.
#[derive(Default)]
struct Held {
    since: Option<Instant>,
    time: Duration,
    rounds: u32,
}

#[derive(Default)]
struct Done {
    tracking: bool,
    /// The guest was asked for free pages.
    hinting: bool,
    paused: bool,
    /// The guest is stopped, and must not be for longer than this before Commit.
    pause_limit: Option<Instant>,
    fenced: bool,
}

impl Context {
    fn new(guest: Arc<dyn SourceGuest>, options: SourceOptions, control: &Control) -> Self {
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
            throttling: throttling::Throttling::default(),
            mirroring: mirroring::Mirroring::default(),
            done: Done::default(),
        }
    }

    /// Time since the start, without that in which the operator held it back.
    fn spent(&self) -> Duration {
        let held = self.held.time + self.held.since.map_or(Duration::ZERO, |since| since.elapsed());
        self.started.elapsed().saturating_sub(held)
    }

    /// Fails if somebody has cancelled.
    fn check_cancelled(&self) -> Result<(), MigrationError> {
        if self.control.is_cancelled() { Err(MigrationError::Cancelled) } else { Ok(()) }
    }
}

/// The connection to the destination, once it is ready to receive.
struct Link {
    control: Channel,
    workers: Workers,
    round_trip: Duration,
    /// When the destination was last heard of on the control channel.
    heard: Instant,
    features: Vec<String>,
    /// Post-copy has begun.
    postcopy: Option<postcopy::Running>,
}

/// What the destination holds.
struct Sent {
    layout: MachineLayout,
    /// Pages that were last sent with data; all others are zeroes there.
    held: Arc<SharedBitmap>,
    /// Copies of pages as they were last sent.
    copies: Arc<Copies>,
    /// Pages that were left out because the guest does not use them, and has not written since.
    skipped: hints::Skipped,
    /// Digests of the blocks as they were last sent.
    disks: Vec<Arc<Digests>>,
}

/// Where the migration is, and what that phase owns.
enum State {
    Handshake,
    Precopy(Box<precopy::Precopy>),
    Switchover(Box<switchover::Switchover>),
    Committed(Box<switchover::Committed>),
    Postcopy(Box<postcopy::Postcopy>),
    Verify(Box<verify::Verify>),
    Ended,
}

/// A phase that did not come to its end, and the link to be told about it, if there is one.
struct Failed {
    error: MigrationError,
    link: Option<Link>,
    /// Commit may have reached the destination, and it has not said that it did not run the machine.
    in_doubt: bool,
}

impl Failed {
    fn new(error: MigrationError, link: Option<Link>) -> Box<Self> {
        Box::new(Self { error, link, in_doubt: false })
    }
}

impl State {
    fn step(self, context: &mut Context) -> Result<State, Box<Failed>> {
        match self {
            State::Handshake => {
                context.control.set_phase(Phase::Handshake);
                connect::connect(context).map(|phase| State::Precopy(Box::new(phase)))
            }
            State::Precopy(phase) => {
                context.control.set_phase(Phase::Precopy);
                phase.run(context).map(|phase| State::Switchover(Box::new(phase)))
            }
            State::Switchover(phase) => {
                context.control.set_phase(Phase::Switchover);
                phase.run(context).map(|phase| State::Committed(Box::new(phase)))
            }
            State::Committed(phase) => phase.run(context),
            State::Postcopy(phase) => {
                context.control.set_phase(Phase::Postcopy);
                phase.run(context).map(|phase| State::Verify(Box::new(phase)))
            }
            State::Verify(phase) => {
                context.control.set_phase(Phase::Verify);
                phase.run(context);
                context.report.outcome = Outcome::Completed;
                Ok(State::Ended)
            }
            State::Ended => Ok(State::Ended),
        }
    }
}
