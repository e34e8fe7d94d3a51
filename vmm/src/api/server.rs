//! HTTP/1.1 over a unix socket: one request a connection, everything bounded.
//!
//! A client has [`DEADLINE`] for its whole request; head and body have a largest size; at most [`MAX_CONNECTIONS`] are served
//! at a time. Requests that take long (saving, hashing) occupy one connection and nothing else.

use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::Problem;
use super::route::{self, After, Answer};
use crate::service::Service;

/// A client must have sent its request by then, and must take the answer within as long again.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// Longest request line with headers.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// Longest body: two certificate chains and a key fit well.
const MAX_BODY_BYTES: usize = 256 << 10;
/// Connections served at a time.
const MAX_CONNECTIONS: usize = 16;
/// Its deepest path builds a machine's digest.
const STACK_BYTES: usize = 256 << 10;

/// The API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another process listens there.
    #[error("another process listens on the API socket {0}: choose another path, or end that process")]
    InUse(PathBuf),
    /// Something that is no socket is there.
    #[error("{0} exists and is not a socket: choose another path for the API socket")]
    NotASocket(PathBuf),
    /// Binding failed.
    #[error(
        "cannot listen on the API socket {path}: check that the directory exists and is writable (a path has at most 107 bytes)"
    )]
    Bind {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor is not a listening socket.
    #[error("descriptor {fd} is not a listening unix socket: pass one that the parent has bound and listens on")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The thread.
    #[error("cannot start the API's thread: raise the limit of processes")]
    Thread(#[source] io::Error),
}

/// The listening socket; removed from the file system when dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: Option<PathBuf>,
}

impl Socket {
    /// Listens on `path`, for its owner only. A socket that a dead process left behind is replaced.
    ///
    /// # Errors
    ///
    /// [`ServerError`] with cause and remedy.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        use std::os::unix::fs::FileTypeExt;
        if let Ok(metadata) = std::fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                return Err(ServerError::NotASocket(path.to_owned()));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(ServerError::InUse(path.to_owned()));
            }
            let _ = std::fs::remove_file(path);
        }
        let fail = |source| ServerError::Bind { path: path.to_owned(), source };
        // Bound under a mask, so that the socket is never open to others, not even for a moment.
        let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        nix::sys::stat::umask(mask);
        let listener = listener.map_err(fail)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
        Ok(Self { listener, path: Some(path.to_owned()) })
    }

    /// Takes over a listening socket that the parent left open.
    ///
    /// # Errors
    ///
    /// [`ServerError::Descriptor`] if it is not one.
    pub fn inherited(fd: RawFd) -> Result<Self, ServerError> {
        let fail = |source| ServerError::Descriptor { fd, source };
        // SAFETY: only asks about a number; what it is not is told by errno.
        if fd < 3 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(fail(io::Error::from_raw_os_error(libc::EBADF)));
        }
        // SAFETY: the descriptor is open and was given to this process for this purpose: nobody else here uses it.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        let listening = nix::sys::socket::getsockopt(&owned, nix::sys::socket::sockopt::AcceptConn);
        match listening {
            Ok(true) => Ok(Self { listener: UnixListener::from(owned), path: None }),
            Ok(false) => Err(fail(io::Error::from_raw_os_error(libc::EINVAL))),
            Err(error) => Err(fail(error.into())),
        }
    }

    /// Serves requests in threads of their own until the process ends. Returns a guard that removes the socket.
    ///
    /// # Errors
    ///
    /// [`ServerError::Thread`].
    pub fn serve(self, service: Arc<Service>) -> Result<SocketFile, ServerError> {
        let file = SocketFile(self.path);
        let listener = self.listener;
        std::thread::Builder::new()
            .name("api".into())
            .stack_size(STACK_BYTES)
            .spawn(move || accept(&listener, &service))
            .map_err(ServerError::Thread)?;
        Ok(file)
    }
}

/// The socket's name in the file system.
#[derive(Debug)]
pub struct SocketFile(Option<PathBuf>);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn accept(listener: &UnixListener, service: &Arc<Service>) {
    let active = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors: those of the current clients come back soon.
                tracing::warn!(%error, "cannot accept an API connection");
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if active.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
            active.fetch_sub(1, Ordering::AcqRel);
            let answer = Answer::problem(503, format!("{MAX_CONNECTIONS} requests are being served: try again"));
            let _ = send(&stream, &answer);
            continue;
        }
        let (service, count) = (Arc::clone(service), Arc::clone(&active));
        let spawned = std::thread::Builder::new().name("api-request".into()).stack_size(STACK_BYTES).spawn(move || {
            serve(&stream, &service);
            count.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = spawned {
            active.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "cannot start a thread for an API request");
        }
    }
}

fn serve(stream: &UnixStream, service: &Service) {
    let answer = match receive(stream) {
        Ok(request) => route::answer(service, &request.method, &request.path, &request.body),
        Err(Bad::Connection(error)) => {
            tracing::debug!(%error, "an API client went away");
            return;
        }
        Err(Bad::Request(status, detail)) => Answer::problem(status, detail),
    };
    if let Err(error) = send(stream, &answer) {
        tracing::debug!(%error, "an API client did not take its answer");
    }
    if answer.after == After::Quit {
        service.quit();
    }
}

struct Request {
    method: String,
    path: String,
    body: Vec<u8>,
}

enum Bad {
    Connection(io::Error),
    Request(u16, String),
}

impl From<io::Error> for Bad {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Self::Request(408, format!("the request did not arrive within {DEADLINE:?}"))
            }
            _ => Self::Connection(error),
        }
    }
}

fn receive(mut stream: &UnixStream) -> Result<Request, Bad> {
    let deadline = Instant::now() + DEADLINE;
    let mut bytes = Vec::with_capacity(1024);
    let mut more = |bytes: &mut Vec<u8>| -> Result<(), Bad> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk) {
            Ok(0) => Err(Bad::Request(400, "the request ends in its middle".into())),
            Ok(count) => {
                bytes.extend_from_slice(&chunk[..count]);
                Ok(())
            }
            // The process was stopped and continued meanwhile (socket(7): a read with a timeout is not restarted).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    let head = loop {
        more(&mut bytes)?;
        match parse_head(&bytes)? {
            Some(head) => break head,
            None if bytes.len() > MAX_HEAD_BYTES => {
                return Err(Bad::Request(431, format!("request line and headers exceed {MAX_HEAD_BYTES} bytes")));
            }
            None => {}
        }
    };
    if head.body > MAX_BODY_BYTES {
        return Err(Bad::Request(413, format!("the body has {} bytes, at most {MAX_BODY_BYTES} are taken", head.body)));
    }
    while bytes.len() < head.bytes + head.body {
        more(&mut bytes)?;
    }
    let body = bytes[head.bytes..head.bytes + head.body].to_vec();
    Ok(Request { method: head.method, path: head.path, body })
}

struct Head {
    bytes: usize,
    method: String,
    path: String,
    body: usize,
}

fn parse_head(bytes: &[u8]) -> Result<Option<Head>, Bad> {
    let bad = |detail: &str| Bad::Request(400, format!("not an HTTP/1.1 request: {detail}"));
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(bad(&error.to_string())),
    };
    let header = |name: &str| request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
    if header("transfer-encoding").is_some() {
        return Err(Bad::Request(411, "send the body with Content-Length, not in chunks".into()));
    }
    let body = match header("content-length") {
        None => 0,
        Some(header) => std::str::from_utf8(header.value)
            .ok()
            .and_then(|value| value.trim().parse().ok())
            .ok_or_else(|| bad("Content-Length is not a number"))?,
    };
    let (method, path) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
    Ok(Some(Head { bytes: length, method: method.to_owned(), path: path.to_owned(), body }))
}

fn send(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let kind = if answer.status < 400 { "application/json" } else { "application/problem+json" };
    let head = format!(
        "HTTP/1.1 {} {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        answer.status,
        reason(answer.status),
        answer.body.len()
    );
    stream.set_write_timeout(Some(DEADLINE))?;
    stream.write_all(head.as_bytes())?;
    stream.write_all(&answer.body)?;
    stream.shutdown(std::net::Shutdown::Write)
}

/// Serves `data` as a whole request for the fuzz targets, but does not listen for what it says is to be received.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(data: &[u8], service: &Service) {
    let Ok(Some(head)) = parse_head(data) else { return };
    assert!(head.bytes <= data.len());
    let body = &data[head.bytes..];
    let answer = if head.path == "/v1/migration/receive" {
        drop(serde_json::from_slice::<crate::config::ReceiveConfig>(body));
        return;
    } else {
        route::answer(service, &head.method, &head.path, body)
    };
    assert!((200..600).contains(&answer.status));
}

/// Standard phrase of a status (RFC 9110, 15).
pub(super) fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        202 => "Accepted",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        422 => "Unprocessable Content",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

impl Answer {
    /// An error as a problem document (RFC 9457).
    pub(super) fn problem(status: u16, detail: String) -> Self {
        let problem = Problem { kind: "about:blank".into(), title: reason(status).into(), status, detail };
        Self { status, body: serde_json::to_vec(&problem).unwrap_or_default(), after: After::Nothing }
    }
}
