//! Post-copy: the machine runs at the destination, and this end gives it what it still lacks.
//!
//! ```text
//! Precopy ──(does not converge, or asked for)──> list of what is dirty, channels of a session ─> Switchover
//! Switchover: pause, what became dirty since, State ─> session begins ─> Prepared, fence, Commit
//!                                                          │
//!                          ┌─> Postcopy: demands, pushes ──┴─> Complete ─> Verify
//!                          └── link lost: reconnect, list of what is still missing
//! ```
//!
//! After Commit there is no way back, and this process holds the only copy of what the destination lacks: so nothing but
//! the destination's word that it has everything, or the operator's wish, ends this phase.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::context::{Context, Sent, by_peer};
use super::dial::{data_roles, open, open_all};
use super::link::{Failed, Link, reason_of, told_by};
pub(super) use super::postcopy_session::SILENCE;
use super::postcopy_session::{Channels, Running, Session, Work};
use super::round::Dirty;
use super::verify::Verify;
use crate::error::MigrationError;
use crate::policy::MigrationMode;
use crate::report::{Mode, Outcome, PostcopyTotals};
use crate::transport::TransportError;
use crate::transport::channels::Channel;
use crate::transport::tcp::TICK;
use crate::transport::tls::Connector;
use crate::wire::WireError;
use crate::wire::handshake::Role;
use crate::wire::message::{Message, PostcopyFigures};
use crate::wire::missing::MissingList;

/// For the destination to forget what is dirty and to attach the session's channels.
const READY_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two attempts to reconnect: at first, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));
/// How long the destination's port may refuse connections. Its listener lives in the process that runs the machine, so that
/// process is gone, or has never got Commit: nobody will ever answer. A link that is merely lost never ends it: the
/// destination may be waiting for what only this process has.
const REFUSED: Duration = Duration::from_secs(30);

/// The destination is ready to go by post-copy; the guest still runs here.
pub(super) struct Entry {
    channels: Channels,
    /// What the destination was told so far.
    told: MissingList,
}

impl Dirty {
    fn into_list(self) -> MissingList {
        MissingList { pages: self.memory, disks: self.disks }
    }
}

/// Tells the destination what will come again, and opens the channels of the first session, while the guest still runs.
pub(super) fn enter(context: &mut Context, link: &mut Link, dirty: Dirty) -> Result<Entry, MigrationError> {
    context.report.mode = match context.options.limits.mode {
        MigrationMode::Postcopy => Mode::Postcopy,
        _ => Mode::Hybrid,
    };
    let told = dirty.into_list();
    link.control.send(&Message::PostcopyPrepare)?;
    send_list(&mut link.control, &told)?;
    let connector = Connector::new(&context.options.identity, &context.options.destination_host)?;
    let fault = told_by(&mut link.control, open(context, &connector, Role::Fault))?.0;
    let pushing = told_by(&mut link.control, pushing(context, &connector, &told))?;
    link.control.set_deadline(Some(Instant::now() + READY_TIMEOUT));
    match link.control.receive("waiting for the destination to prepare for post-copy").map_err(by_peer)? {
        Message::PostcopyReady => {}
        other => return Err(WireError::Unexpected { found: other.name(), expected: "PostcopyReady" }.into()),
    }
    link.control.set_deadline(None);
    link.heard = Instant::now();
    Ok(Entry { channels: Channels { fault, pushing }, told })
}

impl Entry {
    /// The guest is stopped, and `dirty` became so since: completes the list and begins to answer and to push.
    pub(super) fn begin(
        self,
        context: &Context,
        link: &mut Link,
        sent: &Sent,
        dirty: Dirty,
    ) -> Result<(), MigrationError> {
        let mut owed = dirty.into_list();
        owed.subtract(&self.told);
        send_list(&mut link.control, &owed).map_err(|error| reason_of(&mut link.control, error))?;
        owed.union(&self.told);
        context.control.set_round(context.report.rounds.len() as u32, owed.bytes());
        let work = Work::new(context, sent, owed);
        link.postcopy = Some(Running { session: Session::start(&work, self.channels)?, work });
        Ok(())
    }
}

fn send_list(channel: &mut Channel, list: &MissingList) -> Result<(), MigrationError> {
    for message in list.messages() {
        channel.queue(&message)?;
    }
    Ok(channel.flush()?)
}

fn pushing(context: &Context, connector: &Connector, list: &MissingList) -> Result<Vec<Channel>, MigrationError> {
    let roles = data_roles(context.options.limits.streams, !list.disks.is_empty());
    Ok(open_all(context, connector, &roles)?.into_iter().map(|(channel, _)| channel).collect())
}

/// Commit was sent.
pub(super) struct Postcopy {
    link: Link,
    sent: Sent,
    session: Option<Session>,
    work: Arc<Work>,
    /// The answer to Commit was lost; when the guest was stopped.
    unanswered: Option<(MigrationError, Instant)>,
    recoveries: u64,
}

impl Postcopy {
    pub(super) fn new(link: Link, sent: Sent, running: Running, unanswered: Option<(MigrationError, Instant)>) -> Self {
        let Running { session, work } = running;
        work.commit();
        Self { link, sent, session: Some(session), work, unanswered, recoveries: 0 }
    }

    pub(super) fn run(mut self, context: &mut Context) -> Result<Verify, Box<Failed>> {
        let mut session = self.session.take();
        let (mut lost, mut paused_at) = self.unanswered.take().unzip();
        let (channel, figures) = loop {
            let ended = match (session.take(), lost.take()) {
                (Some(current), None) => match current.wait() {
                    None => {
                        session = Some(current);
                        continue;
                    }
                    Some(Ok(end)) => {
                        current.finish();
                        break end;
                    }
                    Some(Err(error)) => {
                        current.end();
                        error
                    }
                },
                (current, error) => {
                    if let Some(session) = current {
                        session.end();
                    }
                    error.unwrap_or(MigrationError::Bug("post-copy"))
                }
            };
            match reconnect(context, &self.work, ended) {
                Ok(next) => {
                    session = Some(next);
                    if let Some(paused_at) = paused_at.take() {
                        context.report.downtime_ms.total = paused_at.elapsed().as_secs_f64() * 1e3;
                    }
                    self.recoveries += 1;
                }
                Err(error) => {
                    return Err(Box::new(Failed { error, link: Some(self.link), in_doubt: true }));
                }
            }
        };
        self.note(context, &figures);
        self.link.control = channel;
        Ok(Verify::new(self.link, self.sent))
    }

    fn note(&self, context: &mut Context, figures: &PostcopyFigures) {
        let report = &mut context.report;
        report.outcome = Outcome::Completed;
        report.total_ms = context.started.elapsed().as_secs_f64() * 1e3;
        report.memory.bytes_sent += self.work.memory_bytes.load(Ordering::Relaxed);
        report.disk.bytes_sent += self.work.disk_bytes.load(Ordering::Relaxed);
        report.postcopy = Some(PostcopyTotals {
            faults: figures.faults,
            fault_us_p50: figures.fault_ns_p50 as f64 / 1e3,
            fault_us_p99: figures.fault_ns_p99 as f64 / 1e3,
            pushed_pages: figures.pushed_pages,
            recoveries: self.recoveries,
        });
        tracing::info!(?figures, recoveries = self.recoveries, "the destination has everything");
    }
}

/// Since when connections were refused without a break.
#[derive(Default)]
struct Refusals(Option<Instant>);

impl Refusals {
    /// Notes how the attempt at `now` failed. True if nobody listens there any more.
    fn note(&mut self, error: &MigrationError, now: Instant) -> bool {
        let refused = matches!(error, MigrationError::Transport(TransportError::Connect { source, .. })
            if source.kind() == std::io::ErrorKind::ConnectionRefused);
        self.0 = refused.then(|| self.0.unwrap_or(now));
        self.0.is_some_and(|since| now.saturating_duration_since(since) >= REFUSED)
    }
}

/// Tries until it works, nobody listens there any more, or the operator gives up.
fn reconnect(context: &Context, work: &Arc<Work>, mut last: MigrationError) -> Result<Session, MigrationError> {
    let (mut pause, mut refusals) = (BACKOFF.0, Refusals::default());
    loop {
        let left = work.board.left_bytes() >> 20;
        context.control.set_note(Some(format!(
            "the link to the destination is lost ({}); it runs the machine and lacks at least {left} MiB of it, which only this \
             process has: reconnecting until it works or the operator abandons the migration",
            last.chain()
        )));
        let next = Instant::now() + pause;
        while Instant::now() < next {
            if context.control.is_abandoned() {
                return Err(MigrationError::Abandoned { last: last.chain() });
            }
            std::thread::sleep(TICK.min(next.saturating_duration_since(Instant::now())));
        }
        pause = (pause * 2).min(BACKOFF.1);
        match attach(context, work) {
            Ok(session) => {
                tracing::info!("post-copy goes on over a new session");
                context.control.set_note(None);
                return Ok(session);
            }
            Err(error) => {
                tracing::warn!(error = %error.chain(), "no new session yet");
                if refusals.note(&error, Instant::now()) {
                    return Err(MigrationError::NobodyListens { last: error.chain() });
                }
                last = error;
            }
        }
    }
}

fn attach(context: &Context, work: &Arc<Work>) -> Result<Session, MigrationError> {
    let connector = Connector::new(&context.options.identity, &context.options.destination_host)?;
    let mut fault = open(context, &connector, Role::Fault)?.0;
    let mut lacks = work.board.nothing();
    while !lacks.take(&fault.receive("waiting for what is still missing").map_err(by_peer)?)? {}
    work.board.restart(&lacks)?;
    context.control.set_round(context.report.rounds.len() as u32, lacks.bytes());
    let pushing = pushing(context, &connector, &lacks)?;
    Session::start(work, Channels { fault, pushing })
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn connect(kind: io::ErrorKind) -> MigrationError {
        TransportError::Connect { address: ([127, 0, 0, 1], 1).into(), source: kind.into() }.into()
    }

    #[test]
    fn only_a_port_that_refuses_without_a_break_is_given_up() {
        let (refused, lost) = (connect(io::ErrorKind::ConnectionRefused), connect(io::ErrorKind::TimedOut));
        let (start, mut refusals) = (Instant::now(), Refusals::default());
        // A cut cable is no reason, however long it takes.
        for hours in 0..24 {
            assert!(!refusals.note(&lost, start + Duration::from_secs(3600 * hours)));
        }
        let start = start + Duration::from_secs(100_000);
        assert!(!refusals.note(&refused, start));
        assert!(!refusals.note(&refused, start + REFUSED / 2));
        assert!(!refusals.note(&lost, start + REFUSED), "it did not refuse, so it may listen");
        assert!(!refusals.note(&refused, start + REFUSED));
        assert!(refusals.note(&refused, start + 2 * REFUSED));
    }
}
