//! The connection to the destination, and what it says of its end.

use std::time::{Duration, Instant};

use super::context::by_peer;
use super::postcopy_session::Running;
use super::workers::Workers;
use crate::error::MigrationError;
use crate::transport::TransportError;
use crate::transport::channels::Channel;
use crate::wire::WireError;
use crate::wire::message::Message;

/// For any other answer on the control channel.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
/// For a destination that broke its data channels to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The connection to the destination, once it is ready to receive.
pub(super) struct Link {
    pub(super) control: Channel,
    pub(super) workers: Workers,
    pub(super) round_trip: Duration,
    /// When the destination was last heard of on the control channel.
    pub(super) heard: Instant,
    pub(super) features: Vec<String>,
    /// Post-copy has begun.
    pub(super) postcopy: Option<Running>,
}

/// A phase that did not come to its end, and the link to be told about it, if there is one.
pub(super) struct Failed {
    pub(super) error: MigrationError,
    pub(super) link: Option<Link>,
    /// Commit may have reached the destination, and it has not said that it did not run the machine.
    pub(super) in_doubt: bool,
}

impl Failed {
    pub(super) fn new(error: MigrationError, link: Option<Link>) -> Box<Self> {
        Box::new(Self { error, link, in_doubt: false })
    }
}

/// If a data channel fails because the destination has given up, it says why on the control channel.
pub(super) fn told_by<T>(control: &mut Channel, result: Result<T, MigrationError>) -> Result<T, MigrationError> {
    match result {
        Err(MigrationError::Transport(error)) if error.is_link() || matches!(error, TransportError::Connect { .. }) => {
            Err(reason_of(control, error.into()))
        }
        other => other,
    }
}

/// The destination's own reason, if it has given up and said so; else `otherwise`.
pub(super) fn reason_of(control: &mut Channel, otherwise: MigrationError) -> MigrationError {
    control.set_deadline(Some(Instant::now() + LAST_WORDS));
    loop {
        match control.receive("asking what happened") {
            Err(error @ TransportError::Aborted { .. }) => return by_peer(error),
            Err(_) => return otherwise,
            Ok(_) => {}
        }
    }
}

/// One round trip; also shows the destination that this end is alive.
pub(super) fn ping(control: &mut Channel, nonce: u64) -> Result<Duration, MigrationError> {
    let start = Instant::now();
    control.send(&Message::Ping { nonce }).map_err(by_peer)?;
    match control.receive("waiting for an answer of the destination").map_err(by_peer)? {
        Message::Pong { nonce: answer } if answer == nonce => Ok(start.elapsed()),
        other => Err(WireError::Unexpected { found: other.name(), expected: "Pong" }.into()),
    }
}
