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
mod context;
mod dial;
mod disk;
mod hints;
mod job;
mod link;
mod memory;
mod mirroring;
mod postcopy;
mod postcopy_board;
mod postcopy_session;
mod precopy;
mod reuse;
mod round;
mod switchover;
mod throttling;
mod verify;
mod workers;

use std::sync::Arc;

use context::Context;
pub use context::SourceOptions;
use link::Failed;
use switchover::Next;
pub(crate) use verify::differences;

use crate::control::{Control, Phase};
use crate::guest::SourceGuest;
use crate::report::{Outcome, Report};

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
            State::Committed(phase) => Ok(match phase.run(context)? {
                Next::Postcopy(phase) => State::Postcopy(phase),
                Next::Verify(phase) => State::Verify(phase),
            }),
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
