//! Blocks that an earlier attempt has left at the destination: asked for, compared, and not sent again.
//!
//! A window of blocks is asked for while the one before it is on its way, so that the destination reads ahead. What the machine
//! has written since the earlier attempt has another digest and is sent; nothing has to be remembered between two attempts.

use std::ops::Range;

use super::context::by_peer;
use crate::error::MigrationError;
use crate::page::{Bitmap, StrongDigest, strong_digest};
use crate::transport::channels::Channel;
use crate::wire::WireError;
use crate::wire::message::{MAX_REUSABLE, Message};

/// After so many windows in a row (a GiB) that hold nothing no more is asked: rounds go from the first block to the last one,
/// and an attempt that was cut off has nothing behind.
const BARREN: u32 = 16;

/// Which blocks of one disk to ask for next.
pub(super) struct Windows<'a> {
    number: u16,
    data: &'a Bitmap,
    asked: Option<Range<u64>>,
    barren: u32,
    /// Everything below was asked for.
    end: u64,
}

/// What the destination holds of a range of blocks.
pub(super) struct Held {
    first: u64,
    digests: Vec<Option<StrongDigest>>,
}

impl<'a> Windows<'a> {
    /// Asks for the first window.
    pub(super) fn new(number: u16, data: &'a Bitmap, channel: &mut Channel) -> Result<Self, MigrationError> {
        let mut windows = Self { number, data, asked: None, barren: 0, end: 0 };
        windows.ask(channel)?;
        Ok(windows)
    }

    fn ask(&mut self, channel: &mut Channel) -> Result<(), MigrationError> {
        let first = self.data.next_run(self.end, 1).filter(|_| self.barren < BARREN);
        self.asked = first.map(|run| run.start..self.data.len().min(run.start + MAX_REUSABLE as u64));
        if let Some(window) = &self.asked {
            self.end = window.end;
            let count = (window.end - window.start) as u16;
            channel.send(&Message::AskReusable { disk: self.number, first: window.start, count })?;
        }
        Ok(())
    }

    /// The next window and what the destination holds of it; the one after it is asked for. `None` if no more is asked.
    pub(super) fn next(&mut self, channel: &mut Channel) -> Result<Option<(Range<u64>, Held)>, MigrationError> {
        let Some(window) = self.asked.take() else { return Ok(None) };
        self.ask(channel)?;
        let doing = "asking which blocks the destination holds already";
        let digests = match channel.receive(doing).map_err(by_peer)? {
            Message::Reusable { digests } => digests,
            other => return Err(WireError::Unexpected { found: other.name(), expected: "Reusable" }.into()),
        };
        if digests.len() as u64 != window.end - window.start {
            let detail = format!("{} digests for {} blocks", digests.len(), window.end - window.start);
            return Err(WireError::Malformed { kind: "Reusable", detail }.into());
        }
        self.barren = if digests.iter().all(Option::is_none) { self.barren + 1 } else { 0 };
        Ok(Some((window.clone(), Held { first: window.start, digests })))
    }

    /// From here on nothing was asked for.
    pub(super) fn end(&self) -> u64 {
        self.end
    }
}

impl Held {
    /// Whether the destination holds just these bytes as `block`.
    pub(super) fn is(&self, block: u64, bytes: &[u8]) -> bool {
        let at = block.checked_sub(self.first).and_then(|at| self.digests.get(at as usize));
        at.copied().flatten().is_some_and(|held| held == strong_digest(bytes))
    }
}
