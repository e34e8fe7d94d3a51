//! Blocking client of the VMM's API, used by the host daemon.
//!
//! One connection a request, as the server wants it. Every call ends: connecting, writing and reading together have a
//! deadline, and an answer longer than [`MAX_ANSWER_BYTES`] is refused.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{
    BalloonInfo, BalloonTarget, ChangedLimits, DirtyRate, DirtyRateRequest, DiskSize, MachineDigest, MachineInfo,
    Metrics, MigrationStatus, Problem, Receiving, Save, Settle,
};
use crate::config::{ReceiveConfig, SendConfig};

/// Longest answer that is read: a migration report with many rounds stays well below it.
pub const MAX_ANSWER_BYTES: usize = 4 << 20;

/// How long a call may take unless [`Client::with_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Saving and hashing read all memory: these calls get this much time for each of [`DEFAULT_TIMEOUT`]'s seconds.
const LONG_CALL_FACTOR: u32 = 30;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("cannot connect to the VMM at {socket}: is headroom-vmm running with --api-socket {socket}?")]
    Connect {
        /// The socket's path.
        socket: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection broke or the deadline passed.
    #[error("{method} {path} to the VMM at {socket} got no complete answer within {timeout:?}")]
    Transfer {
        /// Request method.
        method: &'static str,
        /// Request path.
        path: &'static str,
        /// The socket's path.
        socket: PathBuf,
        /// Deadline of the call.
        timeout: Duration,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The answer is not what the API promises: another program, or another version.
    #[error("the VMM at {socket} answered {method} {path} with something else than its API says: {detail}")]
    Answer {
        /// Request method.
        method: &'static str,
        /// Request path.
        path: &'static str,
        /// The socket's path.
        socket: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The VMM refused, and said why.
    #[error("{}", .0.detail)]
    Refused(Problem),
}

impl ClientError {
    /// HTTP status of a refusal.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused(problem) => Some(problem.status),
            _ => None,
        }
    }
}

/// A client of one VMM. Holds no connection.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

struct Call<'a> {
    client: &'a Client,
    method: &'static str,
    path: &'static str,
    timeout: Duration,
}

impl Client {
    /// A client of the VMM that listens on `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), timeout: DEFAULT_TIMEOUT }
    }

    /// Another deadline for each call.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What the machine is doing.
    pub fn machine(&self) -> Result<MachineInfo, ClientError> {
        self.call("GET", "/v1/machine").json(&())
    }

    /// Stops the vCPUs, then the devices.
    pub fn pause(&self) -> Result<MachineInfo, ClientError> {
        self.call("PUT", "/v1/machine/pause").json(&())
    }

    /// Lets the machine run again; refused with 409 while it is fenced.
    pub fn resume(&self) -> Result<MachineInfo, ClientError> {
        self.call("PUT", "/v1/machine/resume").json(&())
    }

    /// Asks the guest to shut down; refused with 409 if it does not listen, or while a migration is under way.
    pub fn ask_to_shut_down(&self) -> Result<MachineInfo, ClientError> {
        self.call("PUT", "/v1/machine/shut-down").json(&())
    }

    /// Writes the paused machine to a new directory.
    pub fn save(&self, path: impl Into<PathBuf>) -> Result<MachineInfo, ClientError> {
        self.call("PUT", "/v1/machine/save").long().json(&Save { path: path.into() })
    }

    /// Hashes memory and disks of the stopped machine.
    pub fn digest(&self) -> Result<MachineDigest, ClientError> {
        self.call("GET", "/v1/machine/digest").long().json(&())
    }

    /// Estimates how fast the machine dirties its memory; takes the interval that is asked for.
    pub fn dirty_rate(&self, request: &DirtyRateRequest) -> Result<DirtyRate, ClientError> {
        let mut call = self.call("PUT", "/v1/machine/dirty-rate");
        call.timeout = call.timeout.saturating_add(Duration::from_millis(request.interval_ms));
        call.json(request)
    }

    /// Makes a disk larger; refused with 409 while a migration is under way.
    pub fn resize_disk(&self, size: &DiskSize) -> Result<DiskSize, ClientError> {
        self.call("PUT", "/v1/machine/disk").json(size)
    }

    /// Ends the VMM.
    pub fn quit(&self) -> Result<(), ClientError> {
        self.call("PUT", "/v1/machine/quit").raw(None).map(drop)
    }

    /// Counters.
    pub fn metrics(&self) -> Result<Metrics, ClientError> {
        self.call("GET", "/v1/metrics").json(&())
    }

    /// What was given back through the balloon, and what the guest says of its memory.
    pub fn balloon(&self) -> Result<BalloonInfo, ClientError> {
        self.call("GET", "/v1/balloon").json(&())
    }

    /// Asks the guest to give memory back, or to take it.
    pub fn inflate(&self, target_mib: u64) -> Result<BalloonInfo, ClientError> {
        self.call("PUT", "/v1/balloon").json(&BalloonTarget { target_mib })
    }

    /// Listens for a migration to arrive.
    pub fn receive(&self, config: &ReceiveConfig) -> Result<Receiving, ClientError> {
        self.call("PUT", "/v1/migration/receive").json(config)
    }

    /// Starts to send the machine.
    pub fn send(&self, config: &SendConfig) -> Result<MigrationStatus, ClientError> {
        self.call("PUT", "/v1/migration/send").json(config)
    }

    /// Progress or result of the last migration; `None` if there was none.
    pub fn migration(&self) -> Result<Option<MigrationStatus>, ClientError> {
        match self.call("GET", "/v1/migration").json(&()) {
            Ok(status) => Ok(Some(status)),
            Err(error) if error.status() == Some(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Cancels the migration; refused with 409 once Commit was sent.
    pub fn cancel_migration(&self) -> Result<MigrationStatus, ClientError> {
        self.call("DELETE", "/v1/migration").json(&())
    }

    /// Changes limits of a migration that leaves from here.
    pub fn change_limits(&self, limits: &ChangedLimits) -> Result<MigrationStatus, ClientError> {
        self.call("PUT", "/v1/migration/limits").json(limits)
    }

    /// Lets a migration switch over that was held back.
    pub fn continue_migration(&self) -> Result<MigrationStatus, ClientError> {
        self.call("PUT", "/v1/migration/continue").json(&())
    }

    /// Gives up a post-copy whose link is lost: what the destination lacks is lost with it.
    pub fn abandon_migration(&self) -> Result<MigrationStatus, ClientError> {
        self.call("PUT", "/v1/migration/abandon").json(&())
    }

    /// Tells a machine in doubt what the daemons have agreed on.
    pub fn settle(&self, settle: Settle) -> Result<MachineInfo, ClientError> {
        self.call("PUT", "/v1/migration/settle").json(&settle)
    }

    fn call(&self, method: &'static str, path: &'static str) -> Call<'_> {
        Call { client: self, method, path, timeout: self.timeout }
    }
}

impl Call<'_> {
    fn long(mut self) -> Self {
        self.timeout = self.timeout.saturating_mul(LONG_CALL_FACTOR);
        self
    }

    /// Sends `body` (`()` is none) and parses the answer.
    fn json<B: Serialize, A: DeserializeOwned>(&self, body: &B) -> Result<A, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.answer_error(format!("request body: {error}")))?;
        let answer = self.raw((body != b"null").then_some(body))?;
        serde_json::from_slice(&answer).map_err(|error| self.answer_error(error.to_string()))
    }

    fn raw(&self, body: Option<Vec<u8>>) -> Result<Vec<u8>, ClientError> {
        let socket = &self.client.socket;
        let mut stream =
            UnixStream::connect(socket).map_err(|source| ClientError::Connect { socket: socket.clone(), source })?;
        let answer = self.transfer(&mut stream, &body.unwrap_or_default()).map_err(|source| ClientError::Transfer {
            method: self.method,
            path: self.path,
            socket: socket.clone(),
            timeout: self.timeout,
            source,
        })?;
        self.parse(&answer)
    }

    fn transfer(&self, stream: &mut UnixStream, body: &[u8]) -> io::Result<Vec<u8>> {
        let deadline = Instant::now() + self.timeout;
        let left = || {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() { Err(io::Error::from(io::ErrorKind::TimedOut)) } else { Ok(Some(left)) }
        };
        let head = format!(
            "{} {} HTTP/1.1\r\nHost: vmm\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.method,
            self.path,
            body.len()
        );
        stream.set_write_timeout(left()?)?;
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        let mut answer = Vec::with_capacity(1024);
        let mut chunk = [0; 4096];
        loop {
            stream.set_read_timeout(left()?)?;
            match stream.read(&mut chunk) {
                Ok(0) => return Ok(answer),
                Ok(count) if answer.len() + count > MAX_ANSWER_BYTES => {
                    return Err(io::Error::other(format!("the answer is longer than {MAX_ANSWER_BYTES} bytes")));
                }
                Ok(count) => answer.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn parse(&self, answer: &[u8]) -> Result<Vec<u8>, ClientError> {
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut response = httparse::Response::new(&mut headers);
        let (head, status) = match (response.parse(answer), response.code) {
            (Ok(httparse::Status::Complete(head)), Some(status)) => (head, status),
            (Ok(_), _) => return Err(self.answer_error("the answer's head is cut short".into())),
            (Err(error), _) => return Err(self.answer_error(format!("not HTTP: {error}"))),
        };
        let length = response
            .headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case("content-length"))
            .and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse::<usize>().ok())
            .unwrap_or(0);
        let body = &answer[head..];
        if body.len() != length {
            return Err(self.answer_error(format!("{} of {length} bytes of the body arrived", body.len())));
        }
        if (200..300).contains(&status) {
            return Ok(body.to_vec());
        }
        match serde_json::from_slice(body) {
            Ok(problem) => Err(ClientError::Refused(problem)),
            Err(error) => Err(self.answer_error(format!("status {status} without a problem document: {error}"))),
        }
    }

    fn answer_error(&self, detail: String) -> ClientError {
        ClientError::Answer { method: self.method, path: self.path, socket: self.client.socket.clone(), detail }
    }
}
