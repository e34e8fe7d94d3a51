//! One TLS session over one TCP connection, driven by one thread with blocking calls.

use std::io::{BufRead, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustls::Connection;

use super::TransportError;
use super::tcp::{self, is_tick};
use super::tls::{TlsError, explain};
use crate::control::Control;
use crate::report::TlsInfo;
use crate::wire::handshake::EXPORTER_LABEL;

/// Read from the socket at once: as much as fits into the second-level cache beside what is made of it.
const READ_BYTES: usize = 256 << 10;

/// Raised to make every thread of one migration stop at its next [`TICK`](super::tcp::TICK); a cancelled [`Control`]
/// raises it too.
#[derive(Clone, Default)]
pub struct Stop {
    raised: Arc<AtomicBool>,
    control: Control,
}

impl Stop {
    /// Not raised, unless `control` is cancelled.
    pub fn new(control: &Control) -> Self {
        Self { raised: Arc::default(), control: control.clone() }
    }

    /// Raises it, for good.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::SeqCst);
    }

    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst) || self.control.is_cancelled()
    }
}

/// A TLS session.
pub struct TlsStream {
    tls: Connection,
    tcp: TcpStream,
    inbox: Box<[u8]>,
    inbox_from: usize,
    inbox_to: usize,
    /// Decrypted bytes that can be taken.
    ready: usize,
    /// Plain bytes encrypted and not yet written out.
    queued: usize,
    stop: Stop,
    patience: Duration,
    deadline: Option<Instant>,
}

impl TlsStream {
    /// Runs the handshake over a connected socket.
    ///
    /// # Errors
    ///
    /// [`TransportError::Tls`] in words if the peer is refused or refuses us, [`TransportError::Silent`] if it takes
    /// longer than `deadline`.
    pub fn handshake(
        tls: impl Into<Connection>,
        tcp: TcpStream,
        stop: Stop,
        deadline: Duration,
    ) -> Result<Self, TransportError> {
        let mut tls = tls.into();
        // Flow is controlled by flushing batches, not by a cap inside rustls.
        tls.set_buffer_limit(None);
        let mut stream = Self {
            tls,
            tcp,
            inbox: vec![0; READ_BYTES].into_boxed_slice(),
            inbox_from: 0,
            inbox_to: 0,
            ready: 0,
            queued: 0,
            stop,
            patience: deadline,
            deadline: None,
        };
        let end = Instant::now() + deadline;
        while stream.tls.is_handshaking() {
            if Instant::now() > end {
                return Err(TransportError::Silent { doing: "agreeing on TLS", after: deadline });
            }
            stream.write_out("agreeing on TLS")?;
            if stream.tls.is_handshaking() && stream.tls.wants_read() {
                stream.read_in("agreeing on TLS")?;
            }
        }
        stream.write_out("agreeing on TLS")?;
        Ok(stream)
    }

    /// How long a call may wait without a single byte moving.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// When everything must be over, however much moves; `None` lifts it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// The flag that makes calls return [`TransportError::Stopped`].
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Replaces that flag, once it is known to which migration this session belongs.
    pub fn set_stop(&mut self, stop: Stop) {
        self.stop = stop;
    }

    /// A second handle on the socket, with which another thread can cut it off.
    ///
    /// # Errors
    ///
    /// [`TransportError::Io`] if no descriptor is left.
    pub fn socket(&self) -> Result<TcpStream, TransportError> {
        self.tcp.try_clone().map_err(|source| TransportError::Io { doing: "duplicating a socket", source })
    }

    /// What was agreed on.
    pub fn info(&self) -> TlsInfo {
        let name = |value: Option<String>| value.unwrap_or_default();
        TlsInfo {
            version: name(self.tls.protocol_version().map(|version| format!("{version:?}"))),
            cipher: name(self.tls.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()))),
        }
    }

    /// Key material that exists only in this session.
    ///
    /// # Errors
    ///
    /// [`TransportError::Tls`].
    pub fn session_key(&self) -> Result<[u8; 32], TransportError> {
        self.tls
            .export_keying_material([0; 32], EXPORTER_LABEL, None)
            .map_err(|error| TlsError::Session { detail: error.to_string() }.into())
    }

    /// The peer's leaf certificate in DER.
    pub fn peer_certificate(&self) -> Option<rustls::pki_types::CertificateDer<'static>> {
        self.tls.peer_certificates().and_then(|chain| chain.first()).cloned()
    }

    /// Encrypts `data` into records of up to 16 KiB; nothing is written yet. Returns how much waits to be written.
    ///
    /// # Errors
    ///
    /// [`TransportError::Io`] if the session has ended.
    pub fn queue(&mut self, data: &[u8]) -> Result<usize, TransportError> {
        self.tls.writer().write_all(data).map_err(|source| TransportError::Io { doing: "encrypting", source })?;
        self.queued += data.len();
        Ok(self.queued)
    }

    /// Writes out everything that was queued.
    ///
    /// # Errors
    ///
    /// [`TransportError`] if the link is lost, silent for too long, or the stop flag was raised.
    pub fn flush(&mut self) -> Result<(), TransportError> {
        self.queued = 0;
        self.write_out("sending")
    }

    /// Decrypted bytes, at least one, at most a record; waits for them.
    ///
    /// # Errors
    ///
    /// As [`TlsStream::flush`], and [`TransportError::Closed`] at the end of the stream.
    pub fn fill(&mut self, doing: &'static str) -> Result<&[u8], TransportError> {
        while self.ready == 0 {
            self.read_in(doing)?;
            if self.tls.wants_write() {
                self.write_out(doing)?;
            }
        }
        self.tls.reader().into_first_chunk().map_err(|source| TransportError::Io { doing, source })
    }

    /// Takes bytes that [`TlsStream::fill`] has shown.
    pub fn consume(&mut self, bytes: usize) {
        self.ready -= bytes;
        self.tls.reader().consume(bytes);
    }

    /// Whether bytes have arrived that the socket no longer shows: then it must not be polled for more.
    pub fn has_input(&self) -> bool {
        self.ready > 0 || self.inbox_from < self.inbox_to
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    ///
    /// As [`TlsStream::fill`].
    pub fn read_exact(&mut self, buffer: &mut [u8], doing: &'static str) -> Result<(), TransportError> {
        let mut done = 0;
        while done < buffer.len() {
            let chunk = self.fill(doing)?;
            let take = chunk.len().min(buffer.len() - done);
            buffer[done..done + take].copy_from_slice(&chunk[..take]);
            self.consume(take);
            done += take;
        }
        Ok(())
    }

    /// Says goodbye to the peer (close_notify), as far as it still listens.
    pub fn close(&mut self) {
        self.tls.send_close_notify();
        let _ = self.tcp.set_write_timeout(Some(tcp::TICK));
        let _ = self.tls.write_tls(&mut self.tcp);
        let _ = self.tcp.shutdown(Shutdown::Write);
    }

    fn write_out(&mut self, doing: &'static str) -> Result<(), TransportError> {
        let mut moved = Instant::now();
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.tcp) {
                Ok(0) => return Err(TransportError::Closed { doing }),
                Ok(_) => moved = Instant::now(),
                Err(error) if is_tick(&error) => self.tick(moved, doing)?,
                Err(source) => return Err(TransportError::Io { doing, source }),
            }
        }
        Ok(())
    }

    /// Gets more from the socket, and decrypts as much of it as makes one step.
    fn read_in(&mut self, doing: &'static str) -> Result<(), TransportError> {
        let moved = Instant::now();
        self.check_deadline(doing)?;
        while self.inbox_from == self.inbox_to {
            match self.tcp.read(&mut self.inbox) {
                Ok(0) => return Err(self.closed(doing)),
                Ok(count) => (self.inbox_from, self.inbox_to) = (0, count),
                Err(error) if is_tick(&error) => self.tick(moved, doing)?,
                Err(source) => return Err(TransportError::Io { doing, source }),
            }
        }
        let mut filled = &self.inbox[self.inbox_from..self.inbox_to];
        self.tls.read_tls(&mut filled).map_err(|source| TransportError::Io { doing, source })?;
        self.inbox_from = self.inbox_to - filled.len();
        match self.tls.process_new_packets() {
            Ok(state) => {
                self.ready = state.plaintext_bytes_to_read();
                if state.peer_has_closed() && self.ready == 0 {
                    return Err(self.closed(doing));
                }
                Ok(())
            }
            Err(error) => {
                // Tell the peer which alert it is before the connection goes.
                let _ = self.tls.write_tls(&mut self.tcp);
                Err(explain(&error, self.inbox.get(..self.inbox_to).unwrap_or_default()).into())
            }
        }
    }

    fn closed(&self, doing: &'static str) -> TransportError {
        if self.tls.is_handshaking() { TlsError::ClosedInHandshake.into() } else { TransportError::Closed { doing } }
    }

    fn check_deadline(&self, doing: &'static str) -> Result<(), TransportError> {
        match self.deadline {
            Some(deadline) if Instant::now() > deadline => Err(TransportError::TooSlow { doing }),
            _ => Ok(()),
        }
    }

    fn tick(&self, moved: Instant, doing: &'static str) -> Result<(), TransportError> {
        if self.stop.is_raised() {
            return Err(TransportError::Stopped);
        }
        if moved.elapsed() > self.patience {
            return Err(TransportError::Silent { doing, after: self.patience });
        }
        self.check_deadline(doing)
    }

    /// Says goodbye, and lets what was sent last reach the peer; see [`tcp::linger`].
    pub fn linger(mut self, at_most: Duration) {
        self.close();
        tcp::linger(&self.tcp, at_most);
    }
}
