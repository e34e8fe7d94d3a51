//! What every phase at the destination knows.

use std::sync::Arc;
use std::time::Duration;

use crate::control::Control;
use crate::error::MigrationError;
use crate::guest::DestinationGuest;
use crate::transport::TransportError;
use crate::transport::stop::Stop;
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

/// What every phase knows.
pub(super) struct Context {
    pub(super) guest: Arc<dyn DestinationGuest>,
    pub(super) options: DestinationOptions,
    pub(super) control: Control,
    pub(super) stop: Stop,
}

/// Turns the source's own words into an error of their own kind.
pub(super) fn by_peer(error: TransportError) -> MigrationError {
    MigrationError::by_peer("source", error)
}
