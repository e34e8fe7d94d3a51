//! Frames over TLS sessions.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::TransportError;
use super::pack::{Packer, Unpacked};
use super::stream::{Stop, TlsStream};
use crate::guest::PAGE_BYTES;
use crate::report::TlsInfo;
use crate::wire::WireError;
use crate::wire::frame::{self, BlockHeader, Digests, HEADER_BYTES, Header, Kind, MAX_RUNS, PageRun, Subject};
use crate::wire::handshake::{self, Hello, MAGIC, Role, Welcome};
use crate::wire::message::{MAX_TEXT, Message, sanitised};
use crate::wire::version::{FEATURES, LZ4, NEWEST, OLDEST};

/// Longest hello, welcome, or refusal of one.
pub const MAX_HELLO: u64 = 8 << 10;

/// Plain bytes that are encrypted before they are written out together. With more, what rustls holds of them grows past the
/// allocator's threshold for giving memory back, and each batch faults its buffers in again: a sixth of this thread's time.
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
        let session = stream.session_key()?;
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
                let packs = matches!(role, Role::Memory(_) | Role::Disk);
                if packs && welcome.features.iter().any(|name| name == LZ4) {
                    channel.packer = Some(Packer::default());
                }
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

    /// The bandwidth limit held the next frame back for so long: the link is slower than it looks.
    pub fn held_back(&mut self, time: Duration) {
        if let Some(packer) = &mut self.packer {
            packer.held_back(time);
        }
    }

    /// Sends a page frame: `data` holds the pages of the runs that are not zero, one after the other. Returns the bytes
    /// put on the wire, before TLS.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn send_pages(&mut self, runs: &[PageRun], data: &[u8]) -> Result<u64, TransportError> {
        debug_assert!(runs.len() <= MAX_RUNS && frame::data_bytes(runs) == data.len() as u64);
        let mut table = std::mem::take(&mut self.scratch);
        table.clear();
        frame::encode_table(runs, &mut table);
        let sent = self.send_payload(Kind::Pages, &table, data);
        self.scratch = table;
        self.stream.flush()?;
        sent
    }

    /// Sends a block frame; written out when a batch is full. Returns the bytes put on the wire, before TLS.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn send_block(&mut self, disk: u16, block: u64, data: &[u8]) -> Result<u64, TransportError> {
        self.send_payload(Kind::Block, &BlockHeader { disk, block }.encode(), data)
    }

    /// Sends a frame with much data, compressed where that pays; written out batch by batch.
    fn send_payload(&mut self, kind: Kind, head: &[u8], data: &[u8]) -> Result<u64, TransportError> {
        let Some(mut packer) = self.packer.take() else { return self.send_parts(kind, head, data) };
        let packed = if data.is_empty() { None } else { packer.pack(kind, &[head, data]) };
        let start = Instant::now();
        let sent = match packed {
            Some((header, packed)) => self.send_parts(Kind::Packed, &header.encode(), packed),
            None => self.send_parts(kind, head, data),
        }?;
        if !data.is_empty() {
            packer.sent(sent as usize, start);
        }
        self.packer = Some(packer);
        Ok(sent)
    }

    fn send_parts(&mut self, kind: Kind, head: &[u8], data: &[u8]) -> Result<u64, TransportError> {
        let header = self.header(kind, head.len() + data.len())?;
        // The head has a record of its own, so that records of page data begin at a page: the receiver then stores them
        // without putting pages together from pieces.
        self.stream.queue(&[&header, head].concat())?;
        for part in data.chunks(BATCH_BYTES) {
            if self.stream.queue(part)? >= BATCH_BYTES {
                self.stream.flush()?;
            }
        }
        Ok((HEADER_BYTES + head.len() + data.len()) as u64)
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

    /// Bytes of the payload that is being read, at least one: of the frame that was unpacked, or as they arrive.
    fn fill(&mut self, doing: &'static str) -> Result<&[u8], TransportError> {
        if self.unpacked.rest().is_empty() { self.stream.fill(doing) } else { Ok(self.unpacked.rest()) }
    }

    fn consume(&mut self, bytes: usize) {
        if self.unpacked.rest().is_empty() {
            self.stream.consume(bytes);
        } else {
            self.unpacked.consume(bytes);
        }
    }

    fn read_exact(&mut self, mut buffer: &mut [u8], doing: &'static str) -> Result<(), TransportError> {
        while !buffer.is_empty() {
            let chunk = self.fill(doing)?;
            let take = chunk.len().min(buffer.len());
            let (now, later) = buffer.split_at_mut(take);
            now.copy_from_slice(&chunk[..take]);
            buffer = later;
            self.consume(take);
        }
        Ok(())
    }

    /// Reads a packed frame to its end; what it holds is read next.
    fn unpack(&mut self, length: u32, doing: &'static str) -> Result<Incoming, TransportError> {
        self.payload(length, doing)?;
        let header = self.unpacked.unpack(&self.scratch)?;
        Ok(match header.kind {
            Kind::Block => Incoming::Block { length: header.length },
            _ => Incoming::Pages { length: header.length },
        })
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

    /// Reads the rest of a page frame. Hands its runs to `zero` or, page data as it arrives and never less than a page,
    /// to `store`. Returns the bytes that the frame took on the wire, before TLS.
    ///
    /// # Errors
    ///
    /// [`TransportError`], or what `sink` returns.
    pub fn read_pages<E: From<TransportError>>(
        &mut self,
        length: u32,
        pages: u64,
        sink: &mut dyn PageSink<Error = E>,
    ) -> Result<u64, E> {
        const DOING: &str = "receiving pages";
        let mut head = [0; frame::table_head_bytes()];
        if (length as usize) < head.len() {
            let detail = format!("{length} bytes are less than a table");
            return Err(TransportError::from(WireError::Malformed { kind: "page frame", detail }).into());
        }
        self.read_exact(&mut head, DOING)?;
        let count = frame::decode_table_head(&head, length).map_err(TransportError::from)?;
        let mut table = std::mem::take(&mut self.scratch);
        table.resize(frame::table_bytes(count) - head.len(), 0);
        self.read_exact(&mut table, DOING)?;
        let mut runs = std::mem::take(&mut self.runs);
        frame::decode_runs(&table, length, pages, &mut runs).map_err(TransportError::from)?;
        self.scratch = table;
        for run in &runs {
            if run.zero {
                sink.zero(run.first..run.first + u64::from(run.count))?;
            } else {
                self.read_run(run, sink)?;
            }
        }
        self.runs = runs;
        Ok(HEADER_BYTES as u64 + u64::from(length))
    }

    fn read_run<E: From<TransportError>>(
        &mut self,
        run: &PageRun,
        sink: &mut dyn PageSink<Error = E>,
    ) -> Result<(), E> {
        const PAGE: usize = PAGE_BYTES as usize;
        let (mut page, end) = (run.first, run.first + u64::from(run.count));
        sink.announce(page..end);
        while page < end {
            let chunk = self.fill("receiving pages")?;
            let whole = (chunk.len() / PAGE).min((end - page) as usize);
            if whole > 0 {
                sink.store(page, &chunk[..whole * PAGE])?;
                self.consume(whole * PAGE);
                page += whole as u64;
            } else {
                // Only from a sender that lays its records out otherwise.
                let mut carry = [0; PAGE];
                self.read_exact(&mut carry, "receiving pages")?;
                sink.store(page, &carry)?;
                page += 1;
            }
        }
        Ok(())
    }

    /// Reads the rest of a block frame. The data is valid until the next call.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn read_block(&mut self, length: u32) -> Result<(BlockHeader, &[u8]), TransportError> {
        let payload = if self.unpacked.rest().is_empty() {
            self.payload(length, "receiving blocks")?
        } else {
            self.unpacked.take()
        };
        Ok(BlockHeader::decode(payload)?)
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

/// Where received pages go.
pub trait PageSink {
    /// Of the sink.
    type Error;

    /// These pages are about to be stored.
    fn announce(&mut self, pages: std::ops::Range<u64>) {
        let _ = pages;
    }

    /// Stores whole pages from `first` on.
    ///
    /// # Errors
    ///
    /// Of the sink.
    fn store(&mut self, first: u64, data: &[u8]) -> Result<(), Self::Error>;

    /// Makes pages read as zeroes.
    ///
    /// # Errors
    ///
    /// Of the sink.
    fn zero(&mut self, pages: std::ops::Range<u64>) -> Result<(), Self::Error>;
}
