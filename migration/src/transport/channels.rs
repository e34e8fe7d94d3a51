//! Frames over TLS sessions; those with pages and blocks are in `payload`.

mod payload;

use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::TransportError;
use super::pack::{Packer, Packing, Unpacked};
use super::stop::Stop;
use super::stream::TlsStream;
use crate::report::TlsInfo;
use crate::wire::WireError;
use crate::wire::frame::{self, Digests, HEADER_BYTES, Header, Kind, PageRun, Subject};
use crate::wire::handshake::{self, Hello, MAGIC, Role, Welcome};
use crate::wire::message::{MAX_TEXT, Message, sanitised};
use crate::wire::version::{DELTA, FEATURES, LZ4, NEWEST, OLDEST};

pub use payload::PageSink;

/// Longest hello, welcome, or refusal of one.
pub const MAX_HELLO: u64 = 8 << 10;

/// Plain bytes that are encrypted before they are written out together; twice and four times as much were no faster.
const BATCH_BYTES: usize = 64 << 10;

/// One TLS session that carries frames; see [`Role`] for what.
pub struct Channel {
    stream: TlsStream,
    role: Role,
    sent: u64,
    received: u64,
    scratch: Vec<u8>,
    runs: Vec<PageRun>,
    /// Frames with much data may be compressed.
    packer: Option<Packer>,
    unpacked: Unpacked,
}

/// What came on a channel; pages and blocks are handed to a sink instead.
#[derive(Debug)]
pub enum Incoming {
    /// A message.
    Message(Message),
    /// A page frame, whose data is to be read with [`Channel::read_pages`].
    Pages {
        /// Of the whole payload.
        length: u32,
    },
    /// A block frame.
    Block {
        /// Of the whole payload.
        length: u32,
    },
    /// Digests.
    Digests(Digests),
}

impl Incoming {
    /// Its name, for messages about it.
    pub fn name(&self) -> &'static str {
        match self {
            Incoming::Message(message) => message.name(),
            Incoming::Pages { .. } => "page frame",
            Incoming::Block { .. } => "block frame",
            Incoming::Digests(_) => "digest frame",
        }
    }
}

impl Channel {
    /// Frames over a session whose handshake is done.
    pub fn new(stream: TlsStream, role: Role) -> Self {
        let (scratch, runs) = (Vec::new(), Vec::new());
        Self { stream, role, sent: 0, received: 0, scratch, runs, packer: None, unpacked: Unpacked::default() }
    }

    /// The session below, to say something on it that is not a frame.
    #[cfg(any(test, feature = "testing"))]
    pub fn into_stream(self) -> TlsStream {
        self.stream
    }

    /// The same, to go on with frames afterwards.
    #[cfg(any(test, feature = "testing"))]
    pub fn stream_mut(&mut self) -> &mut TlsStream {
        &mut self.stream
    }

    /// How many frames were sent: the sequence number of the next one.
    #[cfg(any(test, feature = "testing"))]
    pub fn frames_sent(&self) -> u64 {
        self.sent
    }

    /// The same channel, now that its role is proved; from here on there is no deadline.
    #[must_use]
    pub fn into_role(mut self, role: Role) -> Self {
        self.role = role;
        self.stream.set_deadline(None);
        self
    }

    /// What it is for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The TLS session.
    pub fn info(&self) -> TlsInfo {
        self.stream.info()
    }

    /// See [`TlsStream::set_patience`].
    pub fn set_patience(&mut self, patience: Duration) {
        self.stream.set_patience(patience);
    }

    /// See [`TlsStream::set_deadline`].
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.stream.set_deadline(deadline);
    }

    /// See [`TlsStream::set_stop`].
    pub fn set_stop(&mut self, stop: Stop) {
        self.stream.set_stop(stop);
    }

    /// See [`TlsStream::stop`].
    pub fn stop(&self) -> &Stop {
        self.stream.stop()
    }

    /// See [`TlsStream::socket`].
    ///
    /// # Errors
    ///
    /// [`TransportError::Io`].
    pub fn socket(&self) -> Result<TcpStream, TransportError> {
        self.stream.socket()
    }

    /// See [`TlsStream::has_input`].
    pub fn has_input(&self) -> bool {
        self.stream.has_input()
    }

    /// See [`TlsStream::close`].
    pub fn close(&mut self) {
        self.stream.close();
    }

    /// See [`TlsStream::linger`].
    pub fn linger(self, at_most: Duration) {
        self.stream.linger(at_most);
    }

    /// As the source: introduces this channel and waits for the welcome.
    ///
    /// # Errors
    ///
    /// [`TransportError`], with the destination's reason if it refuses.
    pub fn introduce(
        stream: TlsStream,
        token: &[u8; 32],
        id: &str,
        role: Role,
    ) -> Result<(Self, Welcome), TransportError> {
        let session = stream.session_key();
        let hello = Hello {
            magic: MAGIC,
            versions: (OLDEST, NEWEST),
            features: FEATURES.iter().map(|&name| name.to_owned()).collect(),
            id: id.to_owned(),
            role,
            proof: *handshake::proof(token, &session, id, role).as_bytes(),
            extension: Vec::new(),
        };
        let mut channel = Self::new(stream, role);
        // A refusal of our certificate arrives only now: in TLS 1.3 the client is done before the server has looked at it.
        // It may also have closed already, and then what it said is still to be read.
        let sent = channel.send(&Message::Hello(hello));
        match (channel.receive_within(MAX_HELLO, "waiting for the destination's welcome"), sent) {
            (Ok(Message::Welcome(welcome)), _) if (OLDEST..=NEWEST).contains(&welcome.version) => {
                let has = |feature| welcome.features.iter().any(|name| name == feature);
                let packing = match role {
                    Role::Memory(_) | Role::Disk => Some(Packing::Measured),
                    Role::Fault => Some(Packing::Never),
                    Role::Control => None,
                };
                channel.packer = packing.filter(|_| has(LZ4)).map(|packing| Packer::new(packing, has(DELTA)));
                Ok((channel, welcome))
            }
            (Ok(other), _) => Err(WireError::Unexpected { found: other.name(), expected: "Welcome" }.into()),
            (Err(error), Ok(())) => Err(error),
            (Err(received), Err(sent)) => Err(if received.is_link() { sent } else { received }),
        }
    }

    fn header(&mut self, kind: Kind, length: usize) -> Result<[u8; HEADER_BYTES], WireError> {
        if length as u64 > kind.cap() {
            return Err(WireError::TooLong { kind: kind.name(), length: length as u64, cap: kind.cap() });
        }
        let header = Header { kind, length: length as u32, sequence: self.sent };
        self.sent += 1;
        Ok(header.encode())
    }

    /// Sends a message at once.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn send(&mut self, message: &Message) -> Result<(), TransportError> {
        self.queue(message)?;
        self.stream.flush()
    }

    /// Puts a message behind what is queued; it leaves with the next flush.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn queue(&mut self, message: &Message) -> Result<(), TransportError> {
        let payload = message.encode()?;
        let mut frame = self.header(Kind::Message, payload.len())?.to_vec();
        frame.extend_from_slice(&payload);
        self.stream.queue(&frame)?;
        Ok(())
    }

    /// Writes out what is queued.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn flush(&mut self) -> Result<(), TransportError> {
        self.stream.flush()
    }

    /// Sends digests of consecutive pages or blocks; written out when a batch is full.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn send_digests(&mut self, subject: Subject, first: u64, values: &[u64]) -> Result<(), TransportError> {
        let mut payload = Vec::with_capacity(frame::DIGEST_HEADER_BYTES + values.len() * 8);
        Digests::encode(subject, first, values.iter().copied(), &mut payload);
        let header = self.header(Kind::Digests, payload.len())?;
        self.stream.queue(&header)?;
        if self.stream.queue(&payload)? >= BATCH_BYTES {
            self.stream.flush()?;
        }
        Ok(())
    }

    fn next_header(&mut self, doing: &'static str) -> Result<Header, TransportError> {
        let mut bytes = [0; HEADER_BYTES];
        self.stream.read_exact(&mut bytes, doing)?;
        let header = Header::decode(&bytes)?;
        if header.sequence != self.received {
            return Err(WireError::Sequence { expected: self.received, found: header.sequence }.into());
        }
        self.received += 1;
        Ok(header)
    }

    fn payload(&mut self, length: u32, doing: &'static str) -> Result<&[u8], TransportError> {
        self.scratch.clear();
        // The cap is large for the sake of state payloads. Memory is taken as bytes arrive, not as they are announced.
        let mut left = length as usize;
        while left > 0 {
            let chunk = self.stream.fill(doing)?;
            let take = chunk.len().min(left);
            self.scratch.extend_from_slice(&chunk[..take]);
            self.stream.consume(take);
            left -= take;
        }
        Ok(&self.scratch)
    }

    /// The next frame of any kind.
    ///
    /// # Errors
    ///
    /// [`TransportError`]; an abort of the peer is [`TransportError::Aborted`].
    pub fn next(&mut self, doing: &'static str) -> Result<Incoming, TransportError> {
        let header = self.next_header(doing)?;
        match header.kind {
            Kind::Message => self.message(header.length, doing).map(Incoming::Message),
            Kind::Pages => Ok(Incoming::Pages { length: header.length }),
            Kind::Block => Ok(Incoming::Block { length: header.length }),
            Kind::Digests => Ok(Incoming::Digests(Digests::decode(self.payload(header.length, doing)?)?)),
            Kind::Packed => self.unpack(header.length, doing),
        }
    }

    /// The next message; no other kind of frame is accepted.
    ///
    /// # Errors
    ///
    /// As [`Channel::next`].
    pub fn receive(&mut self, doing: &'static str) -> Result<Message, TransportError> {
        self.receive_within(Kind::Message.cap(), doing)
    }

    /// The next message, of at most `cap` bytes.
    ///
    /// # Errors
    ///
    /// As [`Channel::next`].
    pub fn receive_within(&mut self, cap: u64, doing: &'static str) -> Result<Message, TransportError> {
        let header = self.next_header(doing)?;
        if header.kind != Kind::Message {
            return Err(WireError::Unexpected { found: header.kind.name(), expected: "a message" }.into());
        }
        if u64::from(header.length) > cap {
            return Err(WireError::TooLong { kind: "message", length: header.length.into(), cap }.into());
        }
        self.message(header.length, doing)
    }

    fn message(&mut self, length: u32, doing: &'static str) -> Result<Message, TransportError> {
        match Message::decode(self.payload(length, doing)?)? {
            Message::Abort { reason } => Err(TransportError::Aborted { reason: sanitised(&reason) }),
            message => Ok(message),
        }
    }

    /// Tells the peer that this end has given up, as far as it still listens.
    pub fn abort(&mut self, reason: &str) {
        let mut end = reason.len().min(MAX_TEXT);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        self.set_patience(Duration::from_millis(500));
        if let Err(error) = self.send(&Message::Abort { reason: reason[..end].to_owned() }) {
            tracing::debug!(%error, role = %self.role, "the peer was not told");
        }
    }
}
