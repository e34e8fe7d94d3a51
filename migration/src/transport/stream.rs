//! One TLS session over one TCP connection, driven by one thread with blocking calls.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use rustls::{AlertDescription, Error};

use super::TransportError;
use super::handshake::{self, Agreed};
use super::line::Line;
use super::record::{Content, MAX_PLAIN, MAX_RECORD, MAX_SENT, Opened, Opener, Refused, Sealer};
use super::stop::Stop;
use super::tcp;
use super::tls::{Session, TlsError, explain};
use crate::report::TlsInfo;

/// Read from the socket at once: as much as fits into the second-level cache.
const READ_BYTES: usize = 256 << 10;

/// Opened at once: data of several records lies side by side then, and is stored in fewer pieces. Four full records, and the head of
/// a frame before them; 64 KiB are what memory is quickest filled with (`vmm/src/memory/filling.rs`).
const OPENED_BYTES: usize = 66 << 10;
const _: () = assert!(OPENED_BYTES > MAX_RECORD);

/// What is kept of memory for records on their way out.
const KEPT_BYTES: usize = 512 << 10;

/// Records without data in a row, after which a peer is only keeping this end busy.
const MAX_IDLE_RECORDS: u32 = 32;

/// What the peer said, or did, last.
enum End {
    Goodbye,
    Alert(AlertDescription),
    Refused(Refused),
}

/// A TLS session.
pub struct TlsStream {
    sealer: Sealer,
    opener: Opener,
    line: Line,
    inbox: Box<[u8]>,
    /// What arrived and is not opened yet.
    sealed: Range<usize>,
    opened: Box<[u8]>,
    /// What of it can be taken.
    ready: Range<usize>,
    /// How the session ends once that has been taken.
    end: Option<End>,
    /// Records in a row that brought no data.
    idle_records: u32,
    /// Room for records; see `unsent`.
    outbox: Vec<u8>,
    /// Records on their way out.
    unsent: Range<usize>,
    /// Plain bytes in those that have not left.
    queued: usize,
    info: TlsInfo,
    session_key: [u8; 32],
    peer_certificate: Option<rustls::pki_types::CertificateDer<'static>>,
}

impl TlsStream {
    /// Runs the handshake over a connected socket.
    ///
    /// # Errors
    ///
    /// [`TransportError::Tls`] in words if the peer is refused or refuses us, [`TransportError::Silent`] if it takes
    /// longer than `deadline`.
    pub fn handshake(session: Session, tcp: TcpStream, stop: Stop, deadline: Duration) -> Result<Self, TransportError> {
        let mut line = Line { tcp, stop, patience: deadline, deadline: None };
        let mut inbox = vec![0; READ_BYTES].into_boxed_slice();
        let agreed = handshake::run(session, &mut line, &mut inbox, deadline)?;
        let Agreed { sealer, opener, rest, info, session_key, peer_certificate } = agreed;
        Ok(Self {
            sealer,
            opener,
            line,
            inbox,
            sealed: rest,
            opened: vec![0; OPENED_BYTES].into_boxed_slice(),
            ready: 0..0,
            end: None,
            idle_records: 0,
            outbox: Vec::new(),
            unsent: 0..0,
            queued: 0,
            info,
            session_key,
            peer_certificate,
        })
    }

    /// How long a call may wait without a single byte moving.
    pub fn set_patience(&mut self, patience: Duration) {
        self.line.patience = patience;
    }

    /// When everything must be over, however much moves; `None` lifts it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.line.deadline = deadline;
    }

    /// The flag that makes calls return [`TransportError::Stopped`].
    pub fn stop(&self) -> &Stop {
        &self.line.stop
    }

    /// Replaces that flag, once it is known to which migration this session belongs.
    pub fn set_stop(&mut self, stop: Stop) {
        self.line.stop = stop;
    }

    /// A second handle on the socket, with which another thread can cut it off.
    ///
    /// # Errors
    ///
    /// [`TransportError::Io`] if no descriptor is left.
    pub fn socket(&self) -> Result<TcpStream, TransportError> {
        self.line.tcp.try_clone().map_err(|source| TransportError::Io { doing: "duplicating a socket", source })
    }

    /// What was agreed on.
    pub fn info(&self) -> TlsInfo {
        self.info.clone()
    }

    /// Key material that exists only in this session.
    pub fn session_key(&self) -> [u8; 32] {
        self.session_key
    }

    /// The peer's leaf certificate in DER.
    pub fn peer_certificate(&self) -> Option<&rustls::pki_types::CertificateDer<'static>> {
        self.peer_certificate.as_ref()
    }

    /// Encrypts `data` into records of up to 16 KiB; nothing is written yet. Returns how much waits to be written.
    ///
    /// # Errors
    ///
    /// [`TransportError::Tls`] if the cipher fails, which it does not for what is handed to it here.
    pub fn queue(&mut self, data: &[u8]) -> Result<usize, TransportError> {
        for plain in data.chunks(MAX_PLAIN) {
            if self.sealer.is_worn() {
                self.put(|sealer, out| sealer.update(out))?;
            }
            self.put(|sealer, out| sealer.seal(Content::Data, plain, out))?;
        }
        self.queued += data.len();
        Ok(self.queued)
    }

    /// Puts a record behind the others.
    fn put<E>(&mut self, seal: impl FnOnce(&mut Sealer, &mut [u8]) -> Result<usize, E>) -> Result<(), TlsError> {
        let start = self.unsent.end;
        if self.outbox.len() < start + MAX_SENT {
            self.outbox.resize(start + MAX_SENT, 0);
        }
        match seal(&mut self.sealer, &mut self.outbox[start..]) {
            Ok(length) => self.unsent.end += length,
            Err(_) => return Err(TlsError::Session { detail: "a record could not be encrypted".to_owned() }),
        }
        Ok(())
    }

    /// Writes out everything that was queued.
    ///
    /// # Errors
    ///
    /// [`TransportError`] if the link is lost, silent for too long, or the stop flag was raised; what did not leave is the
    /// first to leave with the next call.
    pub fn flush(&mut self) -> Result<(), TransportError> {
        self.write_out("sending")
    }

    fn write_out(&mut self, doing: &'static str) -> Result<(), TransportError> {
        self.queued = 0;
        self.line.write(&self.outbox[..self.unsent.end], &mut self.unsent.start, doing)?;
        self.unsent = 0..0;
        self.outbox.truncate(KEPT_BYTES);
        self.outbox.shrink_to(KEPT_BYTES);
        Ok(())
    }

    /// Decrypted bytes, at least one; waits for them.
    ///
    /// # Errors
    ///
    /// As [`TlsStream::flush`], and [`TransportError::Closed`] at the end of the stream.
    pub fn fill(&mut self, doing: &'static str) -> Result<&[u8], TransportError> {
        while self.ready.is_empty() {
            match self.end.take() {
                None => {}
                Some(End::Goodbye) => return Err(TransportError::Closed { doing }),
                Some(End::Alert(alert)) => return Err(explain(&Error::AlertReceived(alert), &[]).into()),
                Some(End::Refused(refused)) => return Err(self.refuse(refused)),
            }
            self.ready = 0..0;
            match self.record() {
                Ok(None) => self.read_in(doing)?,
                _ => self.open(doing)?,
            }
        }
        Ok(&self.opened[self.ready.clone()])
    }

    /// Takes bytes that [`TlsStream::fill`] has shown.
    pub fn consume(&mut self, bytes: usize) {
        self.ready.start += bytes;
    }

    /// Whether there is something to [`TlsStream::fill`] from that the socket no longer shows: then it must not be polled
    /// for more.
    pub fn has_input(&self) -> bool {
        !self.ready.is_empty() || self.end.is_some() || !matches!(self.record(), Ok(None))
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

    /// How long the next record is, if it has arrived as a whole.
    fn record(&self) -> Result<Option<usize>, Refused> {
        let length = Opener::length(&self.inbox[self.sealed.clone()])?;
        Ok(length.filter(|&length| length <= self.sealed.len()))
    }

    /// Opens records that have arrived, as long as there is room. What ends the session waits until what came before it was taken.
    fn open(&mut self, doing: &'static str) -> Result<(), TransportError> {
        while self.end.is_none() {
            let length = match self.record() {
                Ok(Some(length)) if self.ready.end + Opener::room(length) <= self.opened.len() => length,
                Ok(_) => break,
                Err(refused) => {
                    self.end = Some(End::Refused(refused));
                    break;
                }
            };
            let start = self.sealed.start;
            self.sealed.start += length;
            let mut count = 0;
            match self.opener.open(&self.inbox[start..start + length], &mut self.opened[self.ready.end..]) {
                Ok(Opened::Data(data)) => count = data,
                Ok(Opened::Nothing) => {}
                Ok(Opened::UpdateAsked) => {
                    self.put(|sealer, out| sealer.update(out))?;
                    self.write_out(doing)?;
                }
                Ok(Opened::Goodbye) => self.end = Some(End::Goodbye),
                Ok(Opened::Alert(alert)) => self.end = Some(End::Alert(alert)),
                Err(refused) => self.end = Some(End::Refused(refused)),
            }
            self.ready.end += count;
            self.idle_records = if count == 0 { self.idle_records + 1 } else { 0 };
            if self.idle_records > MAX_IDLE_RECORDS {
                let (alert, detail) = (AlertDescription::UnexpectedMessage, "too many records in a row carry nothing");
                self.end = Some(End::Refused(Refused { alert, detail }));
            }
        }
        Ok(())
    }

    /// Gets more from the socket; what is there of a record moves to the front if there is little room behind it.
    fn read_in(&mut self, doing: &'static str) -> Result<(), TransportError> {
        if self.sealed.is_empty() || self.inbox.len() - self.sealed.end < MAX_RECORD {
            self.inbox.copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
        }
        match self.line.read(&mut self.inbox[self.sealed.end..], doing)? {
            0 => Err(TransportError::Closed { doing }),
            count => {
                self.sealed.end += count;
                Ok(())
            }
        }
    }

    /// Tells the peer what is wrong with what it sent, as far as it still listens.
    fn refuse(&mut self, refused: Refused) -> TransportError {
        const FATAL: u8 = 2;
        self.last_words(FATAL, refused.alert);
        TlsError::Session { detail: refused.detail.to_owned() }.into()
    }

    fn last_words(&mut self, level: u8, alert: AlertDescription) {
        let _ = self.line.tcp.set_write_timeout(Some(tcp::TICK));
        if self.put(|sealer, out| sealer.seal(Content::Alert, &[level, alert.into()], out)).is_ok() {
            let _ = self.line.tcp.write(&self.outbox[self.unsent.clone()]);
        }
    }

    /// Says goodbye to the peer (close_notify), as far as it still listens.
    pub fn close(&mut self) {
        const WARNING: u8 = 1;
        self.last_words(WARNING, AlertDescription::CloseNotify);
        let _ = self.line.tcp.shutdown(Shutdown::Write);
    }

    /// Says goodbye, and lets what was sent last reach the peer; see [`tcp::linger`].
    pub fn linger(mut self, at_most: Duration) {
        self.close();
        tcp::linger(&self.line.tcp, at_most);
    }
}
