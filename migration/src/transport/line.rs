//! One TCP connection with blocking calls that can be stopped, and that do not wait for ever.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::TransportError;
use super::stop::Stop;
use super::tcp::is_tick;

pub(super) struct Line {
    pub(super) tcp: TcpStream,
    pub(super) stop: Stop,
    /// How long a call may wait without a single byte moving.
    pub(super) patience: Duration,
    /// When everything must be over, however much moves.
    pub(super) deadline: Option<Instant>,
}

impl Line {
    /// Reads at least a byte; 0 if the peer has closed.
    pub(super) fn read(&mut self, buffer: &mut [u8], doing: &'static str) -> Result<usize, TransportError> {
        let since = Instant::now();
        self.check_deadline(doing)?;
        loop {
            match self.tcp.read(buffer) {
                Ok(count) => return Ok(count),
                Err(error) if is_tick(&error) => self.tick(since, doing)?,
                Err(source) => return Err(TransportError::Io { doing, source }),
            }
        }
    }

    /// Writes `bytes` from `written` on, which says how far it came even if it failed.
    pub(super) fn write(
        &mut self,
        bytes: &[u8],
        written: &mut usize,
        doing: &'static str,
    ) -> Result<(), TransportError> {
        let mut moved = Instant::now();
        while *written < bytes.len() {
            match self.tcp.write(&bytes[*written..]) {
                Ok(0) => return Err(TransportError::Closed { doing }),
                Ok(count) => (*written, moved) = (*written + count, Instant::now()),
                Err(error) if is_tick(&error) => self.tick(moved, doing)?,
                Err(source) => return Err(TransportError::Io { doing, source }),
            }
        }
        Ok(())
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
}
