//! A small blocking client of the guest's control port, for tests, the demo and daemons.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::protocol::message::{Reply, Request, Settings, Status, Topic};

/// How long one request may take, retries included, unless [`Client::set_deadline`] says otherwise.
pub const DEADLINE: Duration = Duration::from_secs(2);

/// Time after which an unanswered datagram is sent again. Requests may be repeated: they say what shall be, not what to
/// add.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// Largest reply that is read, in bytes.
const REPLY_BYTES_MAX: usize = 16 * 1024;

/// Why a request has no status for an answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed.
    #[error("cannot {action} the guest at {address}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// The guest's control address.
        address: SocketAddr,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Nothing came back in time.
    #[error("no answer from the guest at {address} within {} ms: is it running, and is there a route to it?", waited.as_millis())]
    Timeout {
        /// The guest's control address.
        address: SocketAddr,
        /// How long was waited.
        waited: Duration,
    },
    /// The guest refused the request.
    #[error("the guest at {address} refused the request: {message}")]
    Refused {
        /// The guest's control address.
        address: SocketAddr,
        /// The guest's words.
        message: String,
    },
    /// What came back is no reply.
    #[error("the answer from {address} is not a reply of the guest (is it another program's port?)")]
    Malformed {
        /// The guest's control address.
        address: SocketAddr,
        /// Where it stops making sense.
        #[source]
        source: serde_json::Error,
    },
}

#[derive(Debug)]
enum Channel {
    Udp(UdpSocket),
    Tcp(BufReader<TcpStream>),
}

/// A connection to one guest's control port.
///
/// ```no_run
/// use headroom_guest::{Client, Settings};
/// let mut client = Client::connect("10.0.0.2:9000".parse()?)?;
/// client.set(Settings { sweep_mib: Some(64), sweep_mib_per_second: Some(100), ..Settings::default() })?;
/// assert_eq!(client.status()?.sweep_errors, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    address: SocketAddr,
    deadline: Duration,
    next_id: u64,
}

impl Client {
    /// A client over UDP: works through a migration, repeats lost requests.
    ///
    /// # Errors
    /// [`ClientError::Socket`] when no local socket can be made or the address cannot be reached.
    pub fn connect(address: SocketAddr) -> Result<Self, ClientError> {
        let local: SocketAddr = match address {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(local)
            .and_then(|socket| socket.connect(address).map(|()| socket))
            .map_err(|source| ClientError::Socket { action: "open a UDP socket to", address, source })?;
        Ok(Self { channel: Channel::Udp(socket), address, deadline: DEADLINE, next_id: 1 })
    }

    /// A client over one TCP connection.
    ///
    /// # Errors
    /// [`ClientError::Socket`] when the guest does not accept the connection within [`DEADLINE`].
    pub fn connect_tcp(address: SocketAddr) -> Result<Self, ClientError> {
        let stream = TcpStream::connect_timeout(&address, DEADLINE)
            .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
            .map_err(|source| ClientError::Socket { action: "connect to", address, source })?;
        Ok(Self { channel: Channel::Tcp(BufReader::new(stream)), address, deadline: DEADLINE, next_id: 1 })
    }

    /// Sets how long one request may take, retries included.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// What the guest is doing.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.request(Request { get: Some(Topic::Status), ..Request::default() })
    }

    /// Changes what the guest does; the answer is its status after the change.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn set(&mut self, settings: Settings) -> Result<Status, ClientError> {
        self.request(Request { set: Some(settings), ..Request::default() })
    }

    /// Sends a request and waits for its answer. Its `id` is overwritten.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn request(&mut self, mut request: Request) -> Result<Status, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        request.id = Some(id);
        let address = self.address;
        let text = serde_json::to_string(&request).map_err(|source| ClientError::Malformed { address, source })?;
        let until = Instant::now() + self.deadline;
        loop {
            let answer = match &mut self.channel {
                Channel::Udp(socket) => exchange_datagram(socket, address, &text, until),
                Channel::Tcp(stream) => exchange_line(stream, address, &text, until),
            }?;
            let Some(answer) = answer else {
                return Err(ClientError::Timeout { address, waited: self.deadline });
            };
            match serde_json::from_slice(&answer).map_err(|source| ClientError::Malformed { address, source })? {
                Reply::Error { error } => return Err(ClientError::Refused { address, message: error }),
                Reply::Status(status) if status.id == Some(id) => return Ok(status),
                // The late answer to an earlier request that was given up or repeated.
                Reply::Status(_) => {}
            }
        }
    }
}

/// Sends the datagram, again and again, until one comes back or the time is over (`None`).
fn exchange_datagram(
    socket: &UdpSocket,
    address: SocketAddr,
    text: &str,
    until: Instant,
) -> Result<Option<Vec<u8>>, ClientError> {
    let failed = |action| move |source| ClientError::Socket { action, address, source };
    let mut buffer = vec![0; REPLY_BYTES_MAX];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        match socket.send(text.as_bytes()) {
            Ok(_) => {}
            // The ICMP error of an earlier datagram: the guest is not up yet.
            Err(error) if is_passing(error.kind()) => {}
            Err(source) => return Err(failed("send to")(source)),
        }
        let wait = left.min(RETRY_AFTER);
        let retry_at = Instant::now() + wait;
        socket.set_read_timeout(Some(wait)).map_err(failed("set up the socket to"))?;
        match socket.recv(&mut buffer) {
            Ok(bytes) => {
                buffer.truncate(bytes);
                return Ok(Some(buffer));
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) if is_passing(error.kind()) => {
                // Nothing to read until the network changes: keep the pace of the retries.
                std::thread::sleep(retry_at.saturating_duration_since(Instant::now()));
            }
            Err(source) => return Err(failed("receive from")(source)),
        }
    }
}

/// Errors that a network in motion causes and that a retry may get past.
fn is_passing(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::Interrupted
    )
}

/// Sends one line and reads one, or `None` when the time is over.
fn exchange_line(
    stream: &mut BufReader<TcpStream>,
    address: SocketAddr,
    text: &str,
    until: Instant,
) -> Result<Option<Vec<u8>>, ClientError> {
    let failed = |action| move |source| ClientError::Socket { action, address, source };
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Ok(None);
    }
    stream.get_mut().write_all(format!("{text}\n").as_bytes()).map_err(failed("send to"))?;
    stream.get_ref().set_read_timeout(Some(left)).map_err(failed("set up the connection to"))?;
    let mut line = Vec::new();
    match stream.take(REPLY_BYTES_MAX as u64).read_until(b'\n', &mut line) {
        Ok(0) => Err(failed("receive from")(ErrorKind::UnexpectedEof.into())),
        Ok(_) => Ok(Some(line)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
        Err(source) => Err(failed("receive from")(source)),
    }
}
