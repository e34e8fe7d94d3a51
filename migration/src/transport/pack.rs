//! Frames that travel compressed: what a channel keeps for them. Whether it pays is decided in [`crate::page::pack`].

use std::time::{Duration, Instant};

use crate::page::pack::{self, Choice};
use crate::wire::WireError;
use crate::wire::frame::{Kind, PackedHeader};

/// What one channel needs to send compressed frames.
#[derive(Default)]
pub(super) struct Packer {
    choice: Choice,
    /// Time that has not been counted yet: the bandwidth limit held the next frame back.
    held_back: Duration,
    plain: Vec<u8>,
    packed: Vec<u8>,
}

impl Packer {
    /// See [`super::channels::Channel::held_back`].
    pub(super) fn held_back(&mut self, time: Duration) {
        self.held_back += time;
    }

    /// The payload of a packed frame, if one is worth it.
    pub(super) fn pack(&mut self, kind: Kind, parts: &[&[u8]]) -> Option<(PackedHeader, &[u8])> {
        if !self.choice.decide() {
            return None;
        }
        let start = Instant::now();
        self.plain.clear();
        parts.iter().for_each(|part| self.plain.extend_from_slice(part));
        let smaller = pack::pack(&self.plain, &mut self.packed);
        let left = if smaller { self.packed.len() } else { self.plain.len() };
        self.choice.packed(self.plain.len(), left, start.elapsed());
        let header = PackedHeader { kind, length: u32::try_from(self.plain.len()).ok()? };
        smaller.then_some((header, &self.packed))
    }

    /// `bytes` were sent since `start`.
    pub(super) fn sent(&mut self, bytes: usize, start: Instant) {
        self.choice.sent(bytes, start.elapsed() + std::mem::take(&mut self.held_back));
    }
}

/// What has arrived compressed, and is read as if it had not.
#[derive(Default)]
pub(super) struct Unpacked {
    plain: Vec<u8>,
    from: usize,
}

impl Unpacked {
    /// Unpacks the payload of a packed frame.
    pub(super) fn unpack(&mut self, payload: &[u8]) -> Result<PackedHeader, WireError> {
        let (header, packed) = PackedHeader::decode(payload)?;
        // Bounded by the kind's cap, and kept for the next frame.
        self.plain.resize(header.length as usize, 0);
        self.from = self.plain.len();
        pack::unpack(packed, &mut self.plain)
            .map_err(|detail| WireError::Malformed { kind: "packed frame", detail })?;
        self.from = 0;
        Ok(header)
    }

    /// What is left of it.
    pub(super) fn rest(&self) -> &[u8] {
        &self.plain[self.from..]
    }

    /// All that is left of it.
    pub(super) fn take(&mut self) -> &[u8] {
        let from = std::mem::replace(&mut self.from, self.plain.len());
        &self.plain[from..]
    }

    /// Takes bytes that `rest` has shown.
    pub(super) fn consume(&mut self, bytes: usize) {
        self.from += bytes;
    }
}
