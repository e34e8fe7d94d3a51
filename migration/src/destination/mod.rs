//! The end that receives the machine.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use crate::control::Control;
use crate::guest::{DestinationGuest, MachineLayout};
use crate::report::Verification;
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
}

/// The machine arrived and runs here.
#[derive(Clone, Debug)]
pub struct Received {
    /// What was received.
    pub layout: MachineLayout,
    /// What was checked after the resume, as far as the source stayed for it.
    pub verification: Verification,
    /// Why the verification is not complete, if it is not. The machine runs here all the same.
    pub warning: Option<String>,
}

/// Why no machine arrived. In every case it does not run here and `discard` was called.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The link was lost, or the source gave up, before Commit arrived: the machine never ran here.
    #[error("no Commit arrived, so the machine was not started here: {reason}")]
    NotCommitted {
        /// What happened instead.
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
    let _ = (listener, options, control);
    guest.discard();
    Err(DestinationError::NotCommitted { reason: "not yet".to_owned() })
}
