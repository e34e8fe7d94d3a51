//! A TCP connection that is held through the move, with every byte checked.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use serde::Serialize;

use super::{Clock, ECHO_PORT};

/// Bytes in a message.
pub const MESSAGE_BYTES: usize = 64;

/// Most bytes that wait for a peer that does not read.
const BACKLOG_BYTES: usize = 1 << 20;

/// What became of the connection.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TcpSummary {
    /// Messages sent.
    pub messages: u64,
    /// Bytes handed to the connection.
    pub bytes_sent: u64,
    /// Bytes that came back and were right.
    pub bytes_echoed: u64,
    /// Longest time between two arrivals while bytes were outstanding.
    pub longest_silence_ms: f64,
    /// Place in the stream of the first wrong byte.
    pub wrong_at: Option<u64>,
    /// Why the connection ended, if it did.
    pub closed: Option<String>,
}

impl TcpSummary {
    /// The connection stands and everything that came back was right.
    pub fn alive(&self) -> bool {
        self.closed.is_none() && self.wrong_at.is_none()
    }

    /// Everything that was sent has come back.
    pub fn complete(&self) -> bool {
        self.alive() && self.bytes_echoed == self.bytes_sent
    }
}

pub(super) struct TcpProbe {
    stream: TcpStream,
    backlog: Vec<u8>,
    /// Bytes put into the backlog so far: the place of the next one in the stream.
    produced: u64,
    /// Since when an answer is awaited; `None` while nothing is outstanding.
    waiting_since: Option<u64>,
    clock: Clock,
}

impl TcpProbe {
    pub(super) fn connect(address: Ipv4Addr, clock: Clock) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&SocketAddr::from((address, ECHO_PORT)), Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, backlog: Vec::new(), produced: 0, waiting_since: None, clock })
    }

    /// Sends one message, or queues it.
    pub(super) fn send(&mut self, summary: &mut TcpSummary) {
        if summary.closed.is_none() && self.backlog.len() < BACKLOG_BYTES {
            let end = self.produced + MESSAGE_BYTES as u64;
            self.backlog.extend((self.produced..end).map(pattern));
            self.produced = end;
            summary.messages += 1;
        }
        while !self.backlog.is_empty() && summary.closed.is_none() {
            match self.stream.write(&self.backlog) {
                Ok(0) => summary.closed = Some("the connection takes no more bytes".into()),
                Ok(count) => {
                    self.backlog.drain(..count);
                    summary.bytes_sent += count as u64;
                    self.waiting_since.get_or_insert(self.clock.now());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => summary.closed = Some(error.to_string()),
            }
        }
    }

    /// Takes and checks what has come back. Returns false once the connection has ended.
    pub(super) fn receive(&mut self, summary: &mut TcpSummary) -> bool {
        let mut buffer = [0u8; 4096];
        for _ in 0..256 {
            match self.stream.read(&mut buffer) {
                Ok(0) => summary.closed = Some("closed by the machine".into()),
                Ok(count) => self.check(&buffer[..count], summary),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) => summary.closed = Some(error.to_string()),
            }
            if summary.closed.is_some() {
                return false;
            }
        }
        true
    }

    fn check(&mut self, bytes: &[u8], summary: &mut TcpSummary) {
        let now = self.clock.now();
        if let Some(since) = self.waiting_since {
            summary.longest_silence_ms = summary.longest_silence_ms.max(now.saturating_sub(since) as f64 / 1e6);
        }
        for byte in bytes {
            if summary.wrong_at.is_none() && *byte != pattern(summary.bytes_echoed) {
                summary.wrong_at = Some(summary.bytes_echoed);
            }
            if summary.wrong_at.is_none() {
                summary.bytes_echoed += 1;
            }
        }
        self.waiting_since = (summary.bytes_echoed < summary.bytes_sent).then_some(now);
    }
}

impl AsFd for TcpProbe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The byte at a place of the stream: neighbours differ, and so do places a power of two apart.
fn pattern(place: u64) -> u8 {
    place.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_tells_shifted_streams_apart() {
        for shift in [1, 2, 64, 256, 1024, 1460, 4096] {
            let same = (0..4096u64).filter(|place| pattern(*place) == pattern(place + shift)).count();
            assert!(same < 4096 / 4, "shift {shift}: {same} of 4096 bytes agree");
        }
    }
}
