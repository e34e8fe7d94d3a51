//! Which blocks of a disk were written.
//!
//! # Why nothing is lost
//!
//! The block device marks the blocks of each write, discard and write-zeroes **twice**: before the request is submitted, and
//! when it has completed, before the guest is told. A collector takes words of the map with an atomic exchange.
//!
//! * *No write is lost.* Say a request changes the image at time `t`, is reaped at `r > t` and marked then. A collection
//!   that ends before `r` cannot take that second mark, so a later one reports the block. A collection after `r` reports it
//!   now. The last collection of a migration follows `Device::pause`, that is, every `r`: so a block that was read by the
//!   migration before `t` is read again, whatever the interleaving.
//! * *A block written after `collect` has returned is reported by the next one*: its mark on completion is later still.
//! * *What can be seen is already marked.* Verification at the destination reads a block and then collects; if it sees a
//!   change of the guest, the mark made before submission is there, and it does not take a write for a damage.
//!
//! Marks made before [`Tracker::start`] do not count: a request that was submitted earlier and completes later is caught by
//! its second mark.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use migration::guest::BLOCK_BYTES;
use migration::page::Bitmap;

/// A map of dirty blocks of [`BLOCK_BYTES`], shared by the device (marks) and a migration (collects).
#[derive(Debug, Default)]
pub struct Tracker {
    /// Made by `start`, for the size that the disk has then: a machine that never migrates does not pay for it.
    map: RwLock<Map>,
    enabled: AtomicBool,
}

#[derive(Debug, Default)]
struct Map {
    words: Box<[AtomicU64]>,
    blocks: u64,
}

impl Tracker {
    /// Starts to record for a disk of `bytes` bytes, which keeps that size until `stop`. What was recorded earlier is forgotten,
    /// unless it is recording already.
    pub fn start(&self, bytes: u64) {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        if !self.enabled.load(Ordering::SeqCst) {
            let blocks = bytes.div_ceil(BLOCK_BYTES);
            *map = Map { words: (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), blocks };
            self.enabled.store(true, Ordering::SeqCst);
        }
    }

    /// Stops recording.
    pub fn stop(&self) {
        self.enabled.store(false, Ordering::SeqCst);
    }

    /// Whether it is recording.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Records that `length` bytes at `offset` are changed. Bytes past the end of the disk are ignored.
    pub fn mark(&self, offset: u64, length: u64) {
        if length == 0 || !self.enabled() {
            return;
        }
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let last = offset.saturating_add(length - 1) / BLOCK_BYTES;
        let mut block = offset / BLOCK_BYTES;
        while block <= last && block < map.blocks {
            let word_last = last.min(block | 63).min(map.blocks - 1);
            let mask = (u64::MAX >> (63 - (word_last - block))) << (block % 64);
            map.words[(block / 64) as usize].fetch_or(mask, Ordering::SeqCst);
            block = word_last + 1;
        }
    }

    /// Sets in `into` every block marked since the last call, and forgets them.
    pub fn collect(&self, into: &mut Bitmap) {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        for (index, word) in map.words.iter().enumerate() {
            if word.load(Ordering::SeqCst) != 0 {
                into.insert_word(index as u64, word.swap(0, Ordering::SeqCst));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn records_only_while_started() {
        let tracker = Tracker::default();
        tracker.mark(0, 1);
        tracker.start(10 * BLOCK_BYTES);
        tracker.mark(BLOCK_BYTES, 1);
        tracker.start(10 * BLOCK_BYTES);
        let mut seen = Bitmap::new(10);
        tracker.collect(&mut seen);
        assert_eq!((seen.contains(0), seen.contains(1), seen.count()), (false, true, 1));
        tracker.stop();
        tracker.mark(BLOCK_BYTES, 1);
        seen.clear();
        tracker.collect(&mut seen);
        assert!(seen.is_empty());
    }

    #[test]
    fn each_start_is_for_the_size_of_then() {
        let tracker = Tracker::default();
        for blocks in [3, 200, 7] {
            tracker.start(blocks * BLOCK_BYTES);
            tracker.mark(0, u64::MAX);
            let mut seen = Bitmap::new(blocks);
            tracker.collect(&mut seen);
            assert_eq!(seen.count(), blocks);
            tracker.mark(0, 1);
            tracker.stop();
        }
    }

    #[test]
    fn a_mark_survives_every_race_with_collectors() {
        let tracker = Arc::new(Tracker::default());
        tracker.start(1000 * BLOCK_BYTES);
        let marker = {
            let tracker = Arc::clone(&tracker);
            std::thread::spawn(move || {
                for block in 0..1000u64 {
                    tracker.mark(block * BLOCK_BYTES + 5, 7);
                }
            })
        };
        let mut seen = Bitmap::new(1000);
        while !marker.is_finished() {
            tracker.collect(&mut seen);
        }
        marker.join().unwrap();
        tracker.collect(&mut seen);
        assert_eq!(seen.count(), 1000);
    }

    proptest! {
        #[test]
        fn marks_exactly_the_touched_blocks(blocks in 1u64..300, offset in 0u64..400 * BLOCK_BYTES, length in 0u64..300 * BLOCK_BYTES) {
            let tracker = Tracker::default();
            tracker.start(blocks * BLOCK_BYTES - 512);
            tracker.mark(offset, length);
            let mut seen = Bitmap::new(blocks);
            tracker.collect(&mut seen);
            for block in 0..blocks {
                let touched = length > 0 && offset < (block + 1) * BLOCK_BYTES && offset + length > block * BLOCK_BYTES;
                prop_assert_eq!(seen.contains(block), touched, "block {}", block);
            }
        }
    }
}
