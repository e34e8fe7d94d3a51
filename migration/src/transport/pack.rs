//! Frames that travel compressed: what a channel keeps for them. Whether it pays is decided in [`crate::page::pack`], for frames
//! with differences apart: they pack as no others do.

use std::time::{Duration, Instant};

use crate::page::pack::{self, Choice};
use crate::wire::WireError;
use crate::wire::frame::{Kind, PackedHeader};

/// Which frames are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// Those that are quicker for it, as measured.
    #[default]
    Measured,
    /// None: somebody waits for each of them.
    Never,
    /// All: somebody waits for each of them, and bytes are dear.
    Always,
}

/// What one channel needs to send compressed frames.
pub struct Packer {
    pub(super) packing: Packing,
    choice: Choice,
    /// For frames with differences, if the destination takes them.
    differences: Option<Choice>,
    /// Time that has not been counted yet: the bandwidth limit held the next frame back.
    held_back: Duration,
    plain: Vec<u8>,
    packed: Vec<u8>,
}

impl Packer {
    pub(super) fn new(packing: Packing, differences: bool) -> Self {
        Self {
            packing,
            choice: Choice::default(),
            differences: differences.then(Choice::hopeful),
            held_back: Duration::ZERO,
            plain: Vec::new(),
            packed: Vec::new(),
        }
    }

    /// See [`super::channels::Channel::wants_copies`].
    pub(super) fn wants_copies(&self) -> bool {
        self.differences.is_some() && self.choice.link_is_slow()
    }

    /// See [`super::channels::Channel::differences_pay`].
    pub(super) fn differences_pay(&mut self) -> bool {
        self.differences.as_mut().is_some_and(Choice::decide)
    }

    /// See [`super::channels::Channel::held_back`].
    pub(super) fn held_back(&mut self, time: Duration) {
        self.held_back += time;
    }

    /// The payload of a packed frame, if one is worth it. With differences that was decided before.
    pub(super) fn pack(&mut self, kind: Kind, parts: &[&[u8]], differences: bool) -> Option<(PackedHeader, &[u8])> {
        let choice = match &mut self.differences {
            Some(choice) if differences => choice,
            _ if self.packing == Packing::Never => return None,
            _ if self.packing == Packing::Measured && !self.choice.decide() => return None,
            _ => &mut self.choice,
        };
        let start = Instant::now();
        self.plain.clear();
        parts.iter().for_each(|part| self.plain.extend_from_slice(part));
        let smaller = pack::pack(&self.plain, &mut self.packed);
        let left = if smaller { self.packed.len() } else { self.plain.len() };
        choice.packed(self.plain.len(), left, start.elapsed());
        let header = PackedHeader { kind, length: u32::try_from(self.plain.len()).ok()? };
        smaller.then_some((header, &self.packed))
    }

    /// `bytes` were sent since `start`.
    pub(super) fn sent(&mut self, bytes: usize, start: Instant) {
        let time = start.elapsed() + std::mem::take(&mut self.held_back);
        for choice in self.differences.iter_mut().chain([&mut self.choice]) {
            choice.sent(bytes, time);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// On a link that takes a millisecond for a page, with 64 KiB that do not pack.
    fn after_a_trial(differences: bool) -> Packer {
        let mut packer = Packer::new(Packing::Measured, differences);
        let noise: Vec<u8> =
            (0..8192u64).flat_map(|index| crate::page::digest(&index.to_le_bytes()).to_le_bytes()).collect();
        for _ in 0..20 {
            packer.pack(Kind::Pages, &[&noise], false);
            packer.held_back(Duration::from_millis(16));
            packer.sent(noise.len(), Instant::now());
        }
        packer
    }

    #[test]
    fn copies_are_wanted_by_who_may_send_differences_over_a_slow_link() {
        assert!(after_a_trial(true).wants_copies());
        assert!(!after_a_trial(false).wants_copies());
        assert!(!after_a_trial(false).differences_pay());
        let mut unknown = Packer::new(Packing::Measured, true);
        assert!(!unknown.wants_copies(), "nothing is known of this link");
        assert!(unknown.differences_pay(), "the first frame is a trial");
    }

    #[test]
    fn differences_have_a_choice_of_their_own() {
        let mut packer = after_a_trial(true);
        for _ in 0..20 {
            assert!(packer.differences_pay());
            assert!(packer.pack(Kind::Pages, &[&[0; 65536]], true).is_some());
        }
        // What they become says nothing about other frames.
        assert!(packer.pack(Kind::Pages, &[&[0; 65536]], false).is_none());
    }
}
