//! The guest is stopped: the last pages and blocks, state, Prepared, fence, Commit.
//!
//! ```text
//! source                                     destination
//!   pause, collect what is still dirty
//!   last round on all data channels ───────>   stores, flushes; acknowledges each channel
//!   save state          State ─────────────>   waits for every channel's last marker, restores
//!         <──────────────────────── Prepared
//!   (nobody can cancel from here on)
//!   fence               Commit ────────────>   resumes, announces
//!         <───────────────────────── Resumed
//! ```
//!
//! Saving the state and its way to the destination overlap with the last round; nothing waits for an acknowledgement that
//! the destination does not itself wait for.

use std::time::{Duration, Instant, SystemTime};

use super::context::{Context, Sent, by_peer};
use super::link::{Failed, Link, PATIENCE, reason_of, told_by};
use super::postcopy::{Entry, Postcopy, SILENCE};
use super::round::{Dirty, note, wait_round};
use super::verify::{Verify, send_images};
use crate::error::{Doing, MigrationError};
use crate::guest::{BLOCK_BYTES, PAGE_BYTES};
use crate::report::Outcome;
use crate::transport::TransportError;
use crate::wire::WireError;
use crate::wire::message::Message;

/// If the switchover takes so much longer than expected or allowed, the guest is let go again before Commit ...
const PAUSE_FACTOR: u32 = 4;
/// ... but not sooner than this.
const PAUSE_LEAST: Duration = Duration::from_secs(2);
/// For Commit to be answered.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// For the destination to compare full images (test mode).
const COMPARE_TIMEOUT: Duration = Duration::from_secs(600);

/// The guest can be stopped.
pub(super) struct Switchover {
    link: Link,
    sent: Sent,
    plan: Option<Plan>,
}

/// How the machine is to be handed over.
pub(super) struct Plan {
    /// What the destination lacks and has not been told of.
    pub(super) dirty: Dirty,
    /// Number of the last round.
    pub(super) round: u32,
    /// How long the guest is expected to be stopped.
    pub(super) estimate: Duration,
    /// What is dirty follows after the resume.
    pub(super) postcopy: Option<Entry>,
}

/// Commit was sent.
pub(super) struct Committed {
    link: Link,
    sent: Sent,
    paused_at: Instant,
    committing_since: Instant,
}

/// What follows the answer to Commit.
pub(super) enum Next {
    /// The destination lacks something still.
    Postcopy(Box<Postcopy>),
    Verify(Box<Verify>),
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Switchover {
    pub(super) fn new(link: Link, sent: Sent, plan: Plan) -> Self {
        Self { link, sent, plan: Some(plan) }
    }

    pub(super) fn run(mut self, context: &mut Context) -> Result<Committed, Box<Failed>> {
        let (paused_at, committing_since) = match self.prepare(context) {
            Ok(times) => times,
            Err(error) => return Err(Failed::new(error, Some(self.link))),
        };
        if let Err(error) = self.link.control.send(&Message::Commit)
            && self.link.postcopy.is_none()
        {
            // Some of it may have left: only the destination knows. In post-copy the answer, or its absence, will show.
            return Err(Box::new(Failed { error: error.into(), link: Some(self.link), in_doubt: true }));
        }
        Ok(Committed { link: self.link, sent: self.sent, paused_at, committing_since })
    }

    /// Everything up to the fence. Returns when the pause and when the commit began.
    fn prepare(&mut self, context: &mut Context) -> Result<(Instant, Instant), MigrationError> {
        context.check_cancelled()?;
        let Plan { mut dirty, round, estimate, postcopy } =
            self.plan.take().ok_or(MigrationError::Bug("switchover"))?;
        context.finish_hints();
        context.done.paused = true;
        // Not part of the downtime: vCPUs and network go on.
        context.guest.settle().doing("letting the devices finish what is in flight")?;
        let start = Instant::now();
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        context.report.paused_unix_ms = Some(ms(clock));
        let limits = &context.options.limits;
        let allowed = estimate.max(limits.downtime).saturating_mul(PAUSE_FACTOR).max(PAUSE_LEAST);
        if !limits.compare_full {
            context.done.pause_limit = start.checked_add(allowed);
            self.link.control.set_deadline(context.done.pause_limit);
        }
        context.guest.pause().doing("stopping the guest")?;
        let paused = Instant::now();
        // Until here it was to dirty little. Should it run here again, it runs as it always did.
        context.release_guest();
        dirty.collect(context, &self.sent)?;
        if let Some(entry) = postcopy {
            let rest = std::mem::replace(&mut dirty, Dirty::none(&self.sent));
            entry.begin(context, &mut self.link, &self.sent, rest)?;
        } else {
            let left = dirty.memory.count() * PAGE_BYTES + dirty.blocks() * BLOCK_BYTES;
            context.control.set_round(round, left);
        }
        let job = dirty.into_job(round, true);
        let waiting = self.link.workers.start_round(&job)?;
        let payloads = context.guest.save_state().doing("saving the state of the devices")?;
        let state = Message::State { payloads };
        let shares = if context.options.limits.compare_full {
            let shares = wait_round(context, &mut self.link, waiting)?;
            self.compare(context)?;
            self.send(&state)?;
            shares
        } else {
            self.send(&state)?;
            wait_round(context, &mut self.link, waiting)?
        };
        let prepared = self.prepared()?;

        let downtime = &mut context.report.downtime_ms;
        downtime.pause = ms(paused - start);
        downtime.final_pages = ms(shares.memory_at.saturating_duration_since(paused));
        downtime.final_blocks = ms(shares.disk_at.saturating_duration_since(shares.memory_at.max(paused)));
        downtime.state = ms(prepared.saturating_duration_since(shares.memory_at.max(shares.disk_at)));
        note(context, &job, &shares, shares.memory_at.saturating_duration_since(paused), 0);

        // From here on nobody can cancel.
        if !context.control.commit() {
            return Err(MigrationError::Cancelled);
        }
        context.done.fenced = true;
        context.guest.fence().doing("fencing the machine")?;
        Ok((start, prepared))
    }

    fn send(&mut self, message: &Message) -> Result<(), MigrationError> {
        let sent = self.link.control.send(message);
        sent.map_err(|error| reason_if_link(&mut self.link, error))
    }

    fn prepared(&mut self) -> Result<Instant, MigrationError> {
        match self.link.control.receive("waiting for the destination to be prepared").map_err(by_peer)? {
            Message::Prepared { restore_us } => {
                let now = Instant::now();
                tracing::debug!(restore_us, "prepared");
                Ok(now)
            }
            other => Err(WireError::Unexpected { found: other.name(), expected: "Prepared" }.into()),
        }
    }

    /// Test mode: both stopped images, page by page and block by block.
    fn compare(&mut self, context: &mut Context) -> Result<(), MigrationError> {
        self.send(&Message::CompareFull)?;
        if let Err(error) = send_images(context, &mut self.link, &self.sent) {
            return told_by(&mut self.link.control, Err(error));
        }
        self.link.control.set_patience(COMPARE_TIMEOUT);
        let answer = self.link.control.receive("waiting for the images to be compared").map_err(by_peer)?;
        self.link.control.set_patience(PATIENCE);
        match answer {
            Message::Compared { difference: None } => Ok(()),
            Message::Compared { difference: Some(difference) } => {
                Err(MigrationError::Different { difference: crate::wire::message::sanitised(&difference) })
            }
            other => Err(WireError::Unexpected { found: other.name(), expected: "Compared" }.into()),
        }
    }
}

fn reason_if_link(link: &mut Link, error: TransportError) -> MigrationError {
    if error.is_link() { reason_of(&mut link.control, error.into()) } else { error.into() }
}

impl Committed {
    /// Waits for the answer to Commit.
    pub(super) fn run(mut self, context: &mut Context) -> Result<Next, Box<Failed>> {
        // In post-copy the guest may already wait for pages over a link that is lost: find out soon.
        let timeout = if self.link.postcopy.is_some() { SILENCE } else { COMMIT_TIMEOUT };
        self.link.control.set_patience(timeout);
        self.link.control.set_deadline(Some(Instant::now() + timeout));
        let answer = self.link.control.receive("waiting for the machine to run at the destination");
        let now = Instant::now();
        let resume_us = match answer {
            Ok(Message::Resumed { resume_us }) => resume_us,
            // The destination says that it did not run it and never will.
            Err(error @ TransportError::Aborted { .. }) => return Err(Failed::new(by_peer(error), Some(self.link))),
            Err(error) if error.is_link() && self.link.postcopy.is_some() => {
                return Ok(self.next(Some(error.into())));
            }
            Ok(other) => {
                let error = WireError::Unexpected { found: other.name(), expected: "Resumed" };
                return Err(Box::new(Failed { error: error.into(), link: Some(self.link), in_doubt: true }));
            }
            Err(error) => {
                return Err(Box::new(Failed { error: error.into(), link: Some(self.link), in_doubt: true }));
            }
        };
        let way_back = self.link.round_trip / 2;
        let resume = Duration::from_micros(resume_us);
        let committing = (now - self.committing_since).saturating_sub(way_back);
        let report = &mut context.report;
        report.downtime_ms.resume = ms(resume);
        report.downtime_ms.commit = ms(committing.saturating_sub(resume));
        report.downtime_ms.total = ms((now - self.paused_at).saturating_sub(way_back));
        report.total_ms = ms(now - context.started);
        report.outcome = Outcome::Completed;
        tracing::info!(downtime_ms = report.downtime_ms.total, "the machine runs at the destination");
        Ok(self.next(None))
    }

    /// What follows the answer to Commit, or its loss, if what the destination lacks is still here.
    fn next(mut self, unanswered: Option<MigrationError>) -> Next {
        match self.link.postcopy.take() {
            Some(running) => {
                let unanswered = unanswered.map(|error| (error, self.paused_at));
                Next::Postcopy(Box::new(Postcopy::new(self.link, self.sent, running, unanswered)))
            }
            None => Next::Verify(Box::new(Verify::new(self.link, self.sent))),
        }
    }
}
