//! The TLS handshake, run by rustls, up to the point where the keys of the session are known.

use std::io::Read;
use std::time::{Duration, Instant};

use rustls::Connection;

use super::TransportError;
use super::line::Line;
use super::record::{HEAD, MAX_RECORD, Opener, Sealer};
use super::tls::{Session, TlsError, explain, looks_like_tls};
use crate::report::TlsInfo;
use crate::wire::handshake::EXPORTER_LABEL;

const DOING: &str = "agreeing on TLS";

/// What both ends have agreed on.
pub(super) struct Agreed {
    pub(super) sealer: Sealer,
    pub(super) opener: Opener,
    /// Bytes in the inbox that came after the handshake.
    pub(super) rest: std::ops::Range<usize>,
    pub(super) info: TlsInfo,
    /// Key material that exists only in this session (RFC 8446, section 7.5).
    pub(super) session_key: [u8; 32],
    pub(super) peer_certificate: Option<rustls::pki_types::CertificateDer<'static>>,
}

/// Runs the handshake with at most `patience`.
pub(super) fn run(
    session: Session,
    line: &mut Line,
    inbox: &mut [u8],
    patience: Duration,
) -> Result<Agreed, TransportError> {
    let Session { connection: mut tls, handover } = session;
    let end = Instant::now() + patience;
    let (mut from, mut to) = (0, 0);
    while tls.is_handshaking() {
        if Instant::now() > end {
            return Err(TransportError::Silent { doing: DOING, after: patience });
        }
        write_out(&mut tls, line)?;
        // rustls gets record by record: the first one that belongs to the session is not for its eyes.
        match record(&inbox[from..to]) {
            Some(length) => {
                take(&mut tls, line, &inbox[from..from + length], &inbox[..to])?;
                from += length;
            }
            None if tls.is_handshaking() && tls.wants_read() => {
                inbox.copy_within(from..to, 0);
                (from, to) = (0, to - from);
                match line.read(&mut inbox[to..], DOING)? {
                    0 => return Err(TlsError::ClosedInHandshake.into()),
                    count => to += count,
                }
            }
            None => {}
        }
    }
    write_out(&mut tls, line)?;
    agreed(&tls, &handover, from..to)
}

fn agreed(
    tls: &Connection,
    handover: &super::keys::Handover,
    rest: std::ops::Range<usize>,
) -> Result<Agreed, TransportError> {
    let failed = |detail: String| TransportError::from(TlsError::Session { detail });
    let suite = tls.negotiated_cipher_suite().map(|suite| suite.suite());
    let keys = suite.and_then(|suite| handover.take(suite)).ok_or_else(|| failed("no keys came of it".to_owned()))?;
    let (ours, theirs) = match tls {
        Connection::Client(_) => keys,
        Connection::Server(_) => (keys.1, keys.0),
    };
    let unusable = |_| failed("its keys cannot be used".to_owned());
    let session_key = tls.export_keying_material([0; 32], EXPORTER_LABEL, None);
    Ok(Agreed {
        sealer: Sealer::new(ours).map_err(unusable)?,
        opener: Opener::new(theirs).map_err(unusable)?,
        rest,
        info: TlsInfo {
            version: tls.protocol_version().map(|version| format!("{version:?}")).unwrap_or_default(),
            cipher: suite.map(|suite| format!("{suite:?}")).unwrap_or_default(),
        },
        session_key: session_key.map_err(|error| failed(error.to_string()))?,
        peer_certificate: tls.peer_certificates().and_then(|chain| chain.first()).cloned(),
    })
}

/// How long the record is that begins here, if it is there as a whole. What cannot be a record is as long as it is: rustls
/// says why it is none.
fn record(bytes: &[u8]) -> Option<usize> {
    if !looks_like_tls(bytes) {
        return Some(bytes.len());
    }
    let length = HEAD + usize::from(u16::from_be_bytes([*bytes.get(3)?, *bytes.get(4)?]));
    if length > MAX_RECORD { Some(bytes.len()) } else { Some(length).filter(|&length| length <= bytes.len()) }
}

/// Hands a record to rustls; `received` is all that came, to tell what it looks like.
fn take(tls: &mut Connection, line: &mut Line, record: &[u8], received: &[u8]) -> Result<(), TransportError> {
    let mut left = record;
    while !left.is_empty() {
        let io = |source| TransportError::Io { doing: DOING, source };
        tls.read_tls(&mut (&mut left as &mut dyn Read)).map_err(io)?;
        if let Err(error) = tls.process_new_packets() {
            // Tell the peer which alert it is before the connection goes.
            let _ = tls.write_tls(&mut line.tcp);
            return Err(explain(&error, received).into());
        }
    }
    Ok(())
}

fn write_out(tls: &mut Connection, line: &mut Line) -> Result<(), TransportError> {
    let mut out = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut out).map_err(|source| TransportError::Io { doing: DOING, source })?;
    }
    line.write(&out, &mut 0, DOING)
}
