//! One migration of this process, running in a thread of its own.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use migration::control::{self, Control, TooLate};
use migration::destination::{DestinationOptions, Received};
use migration::policy::Limits;
use migration::report::{Outcome, Report};
use migration::source::SourceOptions;
use migration::throttle::PERCENT_MAX;
use migration::transport::tls::Identity;

use super::destination::Place;
use super::{Arrival, Departure, chain};
use crate::api::{ChangedLimits, MigrationStatus, Phase};
use crate::config::{MachineConfig, MigrationLimits, ReceiveConfig, SendConfig, TlsIdentity};
use crate::vm::Machine;

/// Longest migration id or host name: that of a DNS name.
const MAX_NAME_BYTES: usize = 253;

/// A migration cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The token.
    #[error("token must be 64 hexadecimal digits (32 bytes)")]
    Token,
    /// A name.
    #[error("{field} must have 1 to {MAX_NAME_BYTES} printable ASCII characters")]
    Name {
        /// Which one.
        field: &'static str,
    },
    /// A limit out of range.
    #[error("{field} is {value}: {range} are possible")]
    Limit {
        /// Which one.
        field: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        range: &'static str,
    },
    /// The address to listen on.
    #[error(
        "cannot listen on {address} for the migration: choose a free port (0 lets the kernel choose) and an address of this host"
    )]
    Listen {
        /// The configured address.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The file that tells whether the machine has run here.
    #[error("cannot make {path}, which is to tell whether the machine has run here: free space, or correct its folder")]
    Mark {
        /// As configured.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The thread.
    #[error("cannot start the migration's thread: raise the limit of processes")]
    Thread(#[source] std::io::Error),
}

/// How it ended.
#[derive(Clone, Debug)]
pub enum Ended {
    /// At the source.
    Sent(Box<Report>),
    /// At the destination, which runs the machine now.
    Received(Box<Received>),
    /// At the destination, which does not.
    NotReceived(String),
}

/// A migration that runs or has ended.
pub struct Job {
    id: String,
    leaves: bool,
    control: Control,
    ended: Arc<Mutex<Option<Ended>>>,
    settled: AtomicBool,
}

impl Job {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether the machine leaves from here.
    pub fn leaves(&self) -> bool {
        self.leaves
    }

    /// Changes limits while it runs.
    ///
    /// # Errors
    ///
    /// [`JobError::Limit`] if one is out of range; nothing is changed then.
    pub fn change_limits(&self, limits: &ChangedLimits) -> Result<(), JobError> {
        check_bandwidth(limits.bandwidth_bytes_per_second.flatten())?;
        limits.throttle_max_percent.map_or(Ok(()), check_throttle)?;
        if let Some(downtime_ms) = limits.downtime_ms {
            check_downtime(downtime_ms)?;
            self.control.set_downtime(Duration::from_millis(downtime_ms));
        }
        if let Some(bandwidth) = limits.bandwidth_bytes_per_second {
            self.control.set_bandwidth(bandwidth);
        }
        if let Some(percent) = limits.throttle_max_percent {
            self.control.set_throttle_limit(percent);
        }
        Ok(())
    }

    /// Lets it switch over, if it was held back.
    pub fn proceed(&self) {
        self.control.release();
    }

    /// The daemons have agreed where the machine runs: the doubt is over.
    pub fn settle(&self) {
        self.settled.store(true, Ordering::Release);
    }

    /// Starts to send `machine`.
    ///
    /// # Errors
    ///
    /// [`JobError`] if a value is out of range.
    pub fn send(machine: Arc<Machine>, config: SendConfig) -> Result<Self, JobError> {
        check_names(&config.id, &config.source_host, &config.destination_host)?;
        let mut options = SourceOptions {
            id: config.id.clone(),
            address: config.address,
            token: token(&config.token)?,
            source_host: config.source_host,
            destination_host: config.destination_host,
            identity: identity(config.tls),
            limits: limits(&config.limits)?,
            trigger: config.trigger,
        };
        let control = Control::new();
        // Set before it can be changed, and not once more by a thread that begins later.
        control.set_bandwidth(options.limits.bandwidth_bytes_per_second.take());
        if config.pause_before_switchover {
            control.hold();
        }
        Self::start(config.id, true, control, move |control| {
            let report = migration::source::run(Arc::new(Departure(machine)), options, control);
            tracing::info!(outcome = ?report.outcome, total_ms = report.total_ms, reason = %report.reason, "migration ended");
            Ended::Sent(Box::new(report))
        })
    }

    /// Listens for a machine; returns the job and the address.
    ///
    /// # Errors
    ///
    /// [`JobError`] if a value is out of range, or the address cannot be listened on.
    pub fn receive(
        machine: MachineConfig,
        place: Place,
        config: ReceiveConfig,
    ) -> Result<(Self, SocketAddr), JobError> {
        check_names(&config.id, &config.source_host, &config.destination_host)?;
        check("deadline_s", config.deadline_s, 1..=86_400, "1 to 86400")?;
        check("recover_s", config.recover_s, 1..=604_800, "1 to 604800")?;
        let options = DestinationOptions {
            id: config.id.clone(),
            token: token(&config.token)?,
            source_host: config.source_host,
            destination_host: config.destination_host,
            identity: identity(config.tls),
            deadline: Duration::from_secs(config.deadline_s),
            recover: Duration::from_secs(config.recover_s),
            reuse: config.reuse_disks,
        };
        let fail = |source| JobError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        let mark = config.mark.map(|path| make_mark(&path).map_err(|source| JobError::Mark { path, source }));
        let mark = mark.transpose()?;
        let job = Self::start(config.id, false, Control::new(), move |control| {
            let guest = Arc::new(Arrival::new(machine, place, mark));
            match migration::destination::run(guest, listener, options, control) {
                Ok(received) => {
                    tracing::info!(verification = ?received.verification, warning = ?received.warning, "machine arrived");
                    Ended::Received(Box::new(received))
                }
                Err(error) => {
                    let text = chain(&error);
                    tracing::warn!(error = %text, "no machine arrived");
                    Ended::NotReceived(text)
                }
            }
        })?;
        Ok((job, address))
    }

    fn start(
        id: String,
        leaves: bool,
        control: Control,
        work: impl FnOnce(&Control) -> Ended + Send + 'static,
    ) -> Result<Self, JobError> {
        let name = if leaves { "migrate-out" } else { "migrate-in" };
        let (ended, settled) = (Arc::default(), AtomicBool::new(false));
        let job = Self { id, leaves, control: control.clone(), ended: Arc::clone(&ended), settled };
        let run = move || {
            let result = work(&control);
            *ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        };
        std::thread::Builder::new().name(name.into()).spawn(run).map_err(JobError::Thread)?;
        Ok(job)
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<Ended> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// True if Commit was sent and nobody knows whether it arrived.
    pub fn in_doubt(&self) -> bool {
        let doubtful = matches!(self.ended(), Some(Ended::Sent(report)) if report.outcome == Outcome::InDoubt);
        doubtful && !self.settled.load(Ordering::Acquire)
    }

    /// Asks it to end.
    ///
    /// # Errors
    ///
    /// [`TooLate`] once Commit was sent.
    pub fn cancel(&self) -> Result<(), TooLate> {
        self.control.cancel()
    }

    /// Gives up a post-copy whose link is lost; see [`Control::abandon`].
    pub fn abandon(&self) {
        self.control.abandon();
    }

    /// Progress or result.
    pub fn status(&self) -> MigrationStatus {
        let status = self.control.status();
        let (mut report, mut error, mut lost) = (None, status.note, false);
        let ended = self.ended();
        let phase = if ended.is_some() { Phase::Ended } else { phase(status.phase) };
        match ended {
            Some(Ended::Sent(sent)) => {
                error = (sent.outcome != Outcome::Completed).then(|| sent.reason.clone());
                report = Some(*sent);
            }
            Some(Ended::Received(received)) => error = received.warning,
            Some(Ended::NotReceived(text)) => (error, lost) = (Some(text), status.committed),
            None => {}
        }
        MigrationStatus {
            id: self.id.clone(),
            phase,
            committed: status.committed,
            round: status.round,
            bytes_done: status.bytes_done,
            bytes_remaining: status.bytes_remaining,
            bytes_per_second: status.bytes_per_second,
            dirty_bytes_per_second: status.dirty_bytes_per_second,
            throttle_percent: status.throttle_percent,
            waiting: status.waiting,
            lost,
            bandwidth_bytes_per_second: self.control.bandwidth(),
            expected_remaining_ms: status.expected_remaining.map(|time| time.as_secs_f64() * 1e3),
            report,
            error,
        }
    }
}

fn phase(phase: control::Phase) -> Phase {
    match phase {
        control::Phase::Handshake => Phase::Handshake,
        control::Phase::Precopy => Phase::Precopy,
        control::Phase::Switchover => Phase::Switchover,
        control::Phase::Committed => Phase::Committed,
        control::Phase::Postcopy => Phase::Postcopy,
        // The engine is done, and its thread about to say how.
        control::Phase::Verify | control::Phase::Ended => Phase::Verify,
    }
}

fn identity(tls: TlsIdentity) -> Identity {
    Identity { ca_pem: tls.ca_pem, certificate_pem: tls.certificate_pem, key_pem: tls.key_pem }
}

/// An empty mark, whose name outlives a loss of power: what is written to it later does with one flush.
fn make_mark(path: &Path) -> std::io::Result<File> {
    let mark = File::create(path)?;
    if let Some(folder) = path.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(mark)
}

fn token(text: &str) -> Result<[u8; 32], JobError> {
    let mut token = [0; 32];
    let digits = text.as_bytes();
    if digits.len() != 2 * token.len() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(JobError::Token);
    }
    for (byte, pair) in token.iter_mut().zip(digits.chunks(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16).unwrap_or(0) as u8;
        *byte = digit(pair[0]) << 4 | digit(pair[1]);
    }
    Ok(token)
}

fn check_names(id: &str, source_host: &str, destination_host: &str) -> Result<(), JobError> {
    for (field, name) in [("id", id), ("source_host", source_host), ("destination_host", destination_host)] {
        if !(1..=MAX_NAME_BYTES).contains(&name.len()) || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(JobError::Name { field });
        }
    }
    Ok(())
}

fn check(field: &'static str, value: u64, valid: RangeInclusive<u64>, range: &'static str) -> Result<(), JobError> {
    if valid.contains(&value) { Ok(()) } else { Err(JobError::Limit { field, value, range }) }
}

fn check_downtime(ms: u64) -> Result<(), JobError> {
    check("limits.downtime_ms", ms, 1..=600_000, "1 to 600000")
}

fn check_bandwidth(rate: Option<u64>) -> Result<(), JobError> {
    rate.map_or(Ok(()), |rate| {
        check("limits.bandwidth_bytes_per_second", rate, 4096..=u64::MAX, "null or at least 4096")
    })
}

fn check_throttle(percent: u8) -> Result<(), JobError> {
    check("limits.throttle_max_percent", percent.into(), 0..=PERCENT_MAX.into(), "0 to 99")
}

fn limits(limits: &MigrationLimits) -> Result<Limits, JobError> {
    let streams = limits.streams;
    check_downtime(limits.downtime_ms)?;
    check("limits.streams", streams.into(), 1..=Limits::MAX_STREAMS.into(), "1 to 16")?;
    check("limits.max_rounds", limits.max_rounds.into(), 1..=10_000, "1 to 10000")?;
    check("limits.timeout_s", limits.timeout_s, 1..=604_800, "1 to 604800")?;
    check_bandwidth(limits.bandwidth_bytes_per_second)?;
    check_throttle(limits.throttle_max_percent)?;
    Ok(Limits {
        downtime: Duration::from_millis(limits.downtime_ms),
        bandwidth_bytes_per_second: limits.bandwidth_bytes_per_second,
        streams,
        max_rounds: limits.max_rounds,
        timeout: Duration::from_secs(limits.timeout_s),
        force_switchover: limits.force_switchover,
        compare_full: limits.compare_full,
        mode: limits.mode,
        throttle_max_percent: limits.throttle_max_percent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_32_bytes_in_hexadecimal() {
        assert_eq!(token(&"0aF1".repeat(16)).unwrap()[..3], [0x0a, 0xf1, 0x0a]);
        for bad in ["", "00", &"0g".repeat(32), &"00".repeat(33), &"é".repeat(32)] {
            assert!(matches!(token(bad), Err(JobError::Token)), "{bad}");
        }
    }

    #[test]
    fn names_are_bounded() {
        assert!(check_names("m1", "a.example", "b").is_ok());
        for (id, host) in [("", "b"), ("m1", "b\nc"), ("m1", &*"x".repeat(254))] {
            assert!(matches!(check_names(id, "a", host), Err(JobError::Name { .. })));
        }
    }

    #[test]
    fn limits_out_of_range_are_named() {
        assert!(limits(&MigrationLimits::default()).is_ok());
        let bad = MigrationLimits { streams: 17, ..Default::default() };
        let text = limits(&bad).unwrap_err().to_string();
        assert_eq!(text, "limits.streams is 17: 1 to 16 are possible");
        assert!(limits(&MigrationLimits { bandwidth_bytes_per_second: Some(1), ..Default::default() }).is_err());
        assert!(limits(&MigrationLimits { throttle_max_percent: 100, ..Default::default() }).is_err());
        assert!(limits(&MigrationLimits { downtime_ms: 0, ..Default::default() }).is_err());
    }
}
