//! The end that receives the machine.
//!
//! ```text
//!                                             ┌──> Postcopy ──┐ ─> Lost: a part will never arrive
//!  Handshake ──> Precopy ──> Switchover ──> Committed ──────> Verify ──> Received
//!      │            │            │              │
//!      └────────────┴────────────┴──────────────┴─> abort: discard, NotCommitted
//!                                               (Committed only if the machine could not be started: it did not run)
//! ```
//!
//! The same phases as at the source, with the same names. The machine is started in one place only, on a Commit that was
//! received over the control channel; every other way out of the states discards it.

mod abort;
mod arrivals;
mod context;
mod disk;
mod door;
mod link;
mod listen;
mod memory;
mod outcome;
mod postcopy;
mod postcopy_board;
mod postcopy_session;
mod precopy;
mod reuse;
mod supervise;
mod switchover;
mod verify;

use std::net::TcpListener;
use std::sync::Arc;

use context::Context;
pub use context::DestinationOptions;
use link::Failed;
pub use outcome::{DestinationError, Received};
use switchover::Next;

use crate::control::{Control, Phase};
use crate::guest::DestinationGuest;
use crate::transport::stop::Stop;

/// Waits on `listener` for the source that knows the token, receives the machine and runs it.
///
/// # Errors
///
/// See [`DestinationError`]: whatever it says, the machine does not run here.
pub fn run(
    guest: Arc<dyn DestinationGuest>,
    listener: TcpListener,
    options: DestinationOptions,
    control: &Control,
) -> Result<Received, DestinationError> {
    let span = tracing::info_span!("migration", id = %options.id, role = "destination");
    let _entered = span.enter();
    let mut context = Context { guest, stop: Stop::new(control), control: control.clone(), options };
    let mut state = State::Handshake(listener);
    let result = loop {
        state = match state.step(&mut context) {
            Ok(State::Ended(received)) => break Ok(*received),
            Ok(next) => next,
            Err(failed) => break Err(abort::abort(&context, *failed)),
        };
        if let State::Postcopy(phase) = state {
            control.set_phase(Phase::Postcopy);
            state = match phase.run() {
                Ok(phase) => State::Verify(Box::new(phase)),
                Err(lost) => break Err(lost),
            };
        }
    };
    context.stop.raise();
    control.set_phase(Phase::Ended);
    result
}

/// Where the migration is, and what that phase owns.
enum State {
    Handshake(TcpListener),
    Precopy(Box<precopy::Precopy>),
    Switchover(Box<switchover::Switchover>),
    Committed(Box<switchover::Committed>),
    Postcopy(Box<postcopy::Postcopy>),
    Verify(Box<verify::Verify>),
    Ended(Box<Received>),
}

impl State {
    fn step(self, context: &mut Context) -> Result<State, Box<Failed>> {
        match self {
            State::Handshake(listener) => {
                context.control.set_phase(Phase::Handshake);
                listen::listen(context, listener).map(|phase| State::Precopy(Box::new(phase)))
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
            State::Verify(phase) => {
                context.control.set_phase(Phase::Verify);
                Ok(State::Ended(Box::new(phase.run(context))))
            }
            // Post-copy has no way back and is taken in `run`.
            state @ (State::Postcopy(_) | State::Ended(_)) => Ok(state),
        }
    }
}
