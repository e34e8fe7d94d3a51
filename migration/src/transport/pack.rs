//! Frames that travel compressed: what a channel keeps for them. Whether it pays is decided in [`crate::page::pack`].

use std::time::{Duration, Instant};

use crate::guest::PAGE_BYTES;
use crate::page::pack::{self, Costs, Trials};
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
    costs: Costs,
    /// For frames with differences, if the destination takes them.
    differences: Option<Trials>,
    /// Time that has not been counted yet: the bandwidth limit held the next frame back.
    held_back: Duration,
    /// Frames looked at.
    frames: usize,
    plain: Vec<u8>,
    packed: Vec<u8>,
}

/// Processor time of this thread: what compressing costs, however many others want the processor. (Sending is measured by the
/// clock, since waiting for the link is what it costs.)
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Bytes that a frame is judged by.
const SAMPLE: usize = PAGE_BYTES as usize;

impl Packer {
    pub(super) fn new(packing: Packing, differences: bool) -> Self {
        Self {
            packing,
            costs: Costs::default(),
            differences: differences.then(Trials::default),
            held_back: Duration::ZERO,
            frames: 0,
            plain: Vec::new(),
            packed: Vec::new(),
        }
    }

    /// See [`super::channels::Channel::wants_copies`].
    pub(super) fn wants_copies(&self) -> bool {
        self.differences.is_some() && self.costs.link_is_slow()
    }

    /// See [`super::channels::Channel::differences_pay`].
    pub(super) fn differences_pay(&mut self) -> bool {
        self.differences.as_mut().is_some_and(Trials::decide)
    }

    /// See [`super::channels::Channel::held_back`].
    pub(super) fn held_back(&mut self, time: Duration) {
        self.held_back += time;
    }

    /// The payload of a packed frame of `head` and `data`, if one is worth it. With differences that was decided before.
    pub(super) fn pack(
        &mut self,
        kind: Kind,
        head: &[u8],
        data: &[u8],
        differences: bool,
    ) -> Option<(PackedHeader, &[u8])> {
        let expected = match self.packing {
            Packing::Never => return None,
            Packing::Measured if !differences => Some(self.shrinks(data)?),
            _ => None,
        };
        // Memory that has to be got first is no cost of compression.
        let grows = self.plain.capacity() < head.len() + data.len();
        let start = thread_time();
        self.plain.clear();
        self.plain.extend_from_slice(head);
        self.plain.extend_from_slice(data);
        let packed = pack::pack(&self.plain, &mut self.packed);
        let (bytes, time) = (self.plain.len(), thread_time().saturating_sub(start));
        if let Some(left) = expected.filter(|_| !grows) {
            self.costs.packed(bytes, left, time);
        } else if let Some(trials) = self.differences.as_mut().filter(|_| differences) {
            trials.packed(bytes, packed.unwrap_or(bytes), time);
        }
        let header = PackedHeader { kind, length: u32::try_from(bytes).ok()? };
        packed.map(|length| (header, &self.packed[..length]))
    }

    /// What is left of a byte of `data`, judged by a page of it, each time another one; `None` if compressing it does not pay.
    fn shrinks(&mut self, data: &[u8]) -> Option<f64> {
        self.frames = self.frames.wrapping_add(1);
        let pages = data.len() / SAMPLE;
        let from = self.frames.checked_rem(pages).unwrap_or(0) * SAMPLE;
        let sample = &data[from..data.len().min(from + SAMPLE)];
        let start = thread_time();
        let packed = pack::pack(sample, &mut self.packed);
        self.costs.sampled(sample.len(), thread_time().saturating_sub(start));
        let left = packed? as f64 / sample.len() as f64;
        self.costs.pays(left).then_some(left)
    }

    /// `bytes` were sent since `start`.
    pub(super) fn sent(&mut self, bytes: usize, start: Instant) {
        let time = start.elapsed() + std::mem::take(&mut self.held_back);
        self.costs.sent(bytes, time);
        if let Some(trials) = &mut self.differences {
            trials.sent(bytes, time);
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
            packer.pack(Kind::Pages, &[], &noise, false);
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
    fn each_frame_is_judged_by_what_it_holds() {
        let mut packer = after_a_trial(true);
        let noise: Vec<u8> = (0..65536u64).map(|index| crate::page::digest(&index.to_le_bytes()) as u8).collect();
        assert!(packer.pack(Kind::Pages, &[1], &noise, false).is_none());
        assert!(packer.pack(Kind::Pages, &[1], &[0; 65536], false).is_some());
        assert!(packer.pack(Kind::Block, &[1], &[7; 512], false).is_some(), "the last block of a disk is short");
        packer.packing = Packing::Never;
        assert!(packer.pack(Kind::Pages, &[1], &[0; 65536], false).is_none());
        packer.packing = Packing::Always;
        assert!(packer.pack(Kind::Pages, &[1], &noise, false).is_none(), "it would become longer");
    }
}
