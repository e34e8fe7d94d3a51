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
mod disk;
mod listen;
mod memory;
mod postcopy;
mod postcopy_board;
mod postcopy_session;
mod receive;
mod resume;
mod reuse;
mod verify;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use crate::control::{Control, Phase};
use crate::error::MigrationError;
use crate::guest::{DestinationGuest, MachineLayout};
use crate::report::Verification;
use crate::transport::stream::Stop;
use crate::transport::tls::Identity;

/// What the destination needs to know of one migration.
#[derive(Clone, Debug)]
pub struct DestinationOptions {
    /// Migration id; a source that names another one is refused.
    pub id: String,
    /// One-time token that the source has to prove.
    pub token: [u8; 32],
    /// Name that the source's certificate must carry.
    pub source_host: String,
    /// Name of this host, which its certificate carries.
    pub destination_host: String,
    /// This host's certificate and the authority.
    pub identity: Identity,
    /// How long to wait for the source's first proper connection.
    pub deadline: Duration,
    /// How long to wait for the source to reconnect if the link is lost in post-copy. After that the machine, which runs here
    /// and lacks a part of itself, is stopped for good.
    pub recover: Duration,
    /// The images of the disks are those of an earlier attempt: what they hold is not sent again if it is still right. They may hold
    /// anything; what is wrong is overwritten.
    pub reuse: bool,
}

/// The machine arrived and runs here.
#[derive(Clone, Debug)]
pub struct Received {
    /// What was received.
    pub layout: MachineLayout,
    /// From the arrival of Commit until the guest ran.
    pub resume: Duration,
    /// What was checked after the resume, as far as the source stayed for it.
    pub verification: Verification,
    /// Why the verification is not complete or not good, if so. The machine runs here all the same.
    pub warning: Option<String>,
}

/// Why no machine arrived, or not all of it. In every case it does not run here.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The link was lost, or either end gave up, before Commit arrived: the machine never ran here.
    #[error("the machine was not taken over and does not run here: {reason}")]
    NotCommitted {
        /// What happened instead, and what to do.
        reason: String,
    },
    /// It ran here by post-copy, and a part of it will never arrive: it was stopped, and not discarded.
    #[error("the machine was taken over, but not all of it arrived: {reason}")]
    Lost {
        /// What is missing and why, and what to do.
        reason: String,
    },
}

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

/// What every phase knows.
struct Context {
    guest: Arc<dyn DestinationGuest>,
    options: DestinationOptions,
    control: Control,
    stop: Stop,
}

/// Where the migration is, and what that phase owns.
enum State {
    Handshake(TcpListener),
    Precopy(Box<receive::Precopy>),
    Switchover(Box<resume::Switchover>),
    Committed(Box<resume::Committed>),
    Postcopy(Box<postcopy::Postcopy>),
    Verify(Box<verify::Verify>),
    Ended(Box<Received>),
}

/// A phase that did not come to its end, and the link to be told about it, if there is one.
struct Failed {
    error: MigrationError,
    link: Option<receive::Link>,
}

impl Failed {
    fn new(error: impl Into<MigrationError>, link: Option<receive::Link>) -> Box<Self> {
        Box::new(Self { error: error.into(), link })
    }
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
            State::Committed(phase) => phase.run(context),
            State::Verify(phase) => {
                context.control.set_phase(Phase::Verify);
                Ok(State::Ended(Box::new(phase.run(context))))
            }
            // Post-copy has no way back and is taken in `run`.
            state @ (State::Postcopy(_) | State::Ended(_)) => Ok(state),
        }
    }
}
