//! The end that gives the machine away.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::control::Control;
use crate::guest::SourceGuest;
use crate::policy::Limits;
use crate::report::{Downtime, Mode, Outcome, Report, Trigger};
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

/// Migrates `guest` and returns when it is over. Never panics on what the peer sends; the outcome is in the report:
///
/// * [`Outcome::Completed`]: the machine runs at the destination; here it stays paused and fenced.
/// * [`Outcome::Failed`], [`Outcome::Cancelled`]: it runs here as before, `reason` says why.
/// * [`Outcome::InDoubt`]: Commit was sent and not answered; here it stays paused and fenced.
pub fn run(guest: Arc<dyn SourceGuest>, options: SourceOptions, control: &Control) -> Report {
    let _ = (guest, control);
    Report {
        id: options.id,
        machine: String::new(),
        source: options.source_host,
        destination: options.destination_host,
        mode: Mode::Precopy,
        outcome: Outcome::Failed,
        reason: "not yet".to_owned(),
        total_ms: 0.0,
        downtime_ms: Downtime::default(),
        network_gap_ms: None,
        rounds: Vec::new(),
        memory: Default::default(),
        disk: Default::default(),
        postcopy: None,
        throttle_percent_max: 0,
        streams: options.limits.streams,
        tls: Default::default(),
        verification: Default::default(),
        trigger: options.trigger,
    }
}
