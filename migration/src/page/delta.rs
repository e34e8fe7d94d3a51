//! Pages as they were last sent: one that is sent again can travel as what differs from that.
//!
//! Guests that write much often change little of a page. The exclusive or of the two versions is then nearly all zeroes and
//! packs to a few bytes (Svärd et al., VEE 2011; QEMU's XBZRLE).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::guest::PAGE_BYTES;

const PAGE: usize = PAGE_BYTES as usize;

/// Slots that share a lock and are given memory together, at their first use: 1 MiB.
const SHARD: usize = 256;

/// Copies take at most this share of the machine's memory ...
const SHARE: u64 = 8;
/// ... and at most this many bytes.
const MOST: u64 = 64 << 20;

/// A page has one slot that it can have, by its number, so neighbours never contend. It takes the slot over from a page that
/// was not sent in this round nor in the one before.
#[derive(Debug)]
pub struct Copies {
    shards: Vec<Mutex<Shard>>,
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct Shard {
    tags: Vec<Option<Tag>>,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Tag {
    page: u64,
    /// In which it was last sent.
    round: u32,
}

impl Copies {
    /// For a machine of so many pages. Takes no memory yet.
    pub fn new(pages: u64) -> Self {
        let shards = (pages * PAGE_BYTES / SHARE).min(MOST) / (SHARD * PAGE) as u64;
        Self { shards: (0..shards.max(1)).map(|_| Mutex::default()).collect(), used: AtomicBool::new(false) }
    }

    /// Whether there was never a copy.
    pub fn is_unused(&self) -> bool {
        !self.used.load(Ordering::Relaxed)
    }

    fn shard(&self, page: u64) -> (MutexGuard<'_, Shard>, usize) {
        let (shards, slot) = (self.shards.len() as u64, (page % SHARD as u64) as usize);
        let shard = &self.shards[(page / SHARD as u64 % shards) as usize];
        (shard.lock().unwrap_or_else(PoisonError::into_inner), slot)
    }

    /// Whether there is a copy of this page.
    pub fn has(&self, page: u64) -> bool {
        let (shard, slot) = self.shard(page);
        shard.holds(page, slot)
    }

    /// The page is sent in `round` as `bytes`: keeps a copy, if there is room.
    pub fn keep(&self, page: u64, round: u32, bytes: &[u8]) {
        let (mut shard, slot) = self.shard(page);
        let mine = shard.tags.get(slot).copied().flatten().is_none_or(|tag| tag.page == page || tag.round + 1 < round);
        if !mine {
            return;
        }
        if shard.tags.is_empty() {
            shard.tags = vec![None; SHARD];
            shard.bytes = vec![0; SHARD * PAGE];
            self.used.store(true, Ordering::Relaxed);
        }
        shard.tags[slot] = Some(Tag { page, round });
        shard.bytes[slot * PAGE..][..PAGE].copy_from_slice(bytes);
    }

    /// If there is a copy of the page, which is sent in `round` as `bytes`, puts the difference in place of `bytes`, and `bytes`
    /// in place of the copy. False if there is none.
    pub fn differ(&self, page: u64, round: u32, bytes: &mut [u8]) -> bool {
        let (mut shard, slot) = self.shard(page);
        if !shard.holds(page, slot) {
            return false;
        }
        shard.tags[slot] = Some(Tag { page, round });
        for (new, old) in bytes.iter_mut().zip(&mut shard.bytes[slot * PAGE..][..PAGE]) {
            (*new, *old) = (*new ^ *old, *new);
        }
        true
    }

    /// The destination no longer holds what was copied.
    pub fn forget(&self, page: u64) {
        let (mut shard, slot) = self.shard(page);
        if shard.holds(page, slot) {
            shard.tags[slot] = None;
        }
    }
}

impl Shard {
    fn holds(&self, page: u64, slot: usize) -> bool {
        self.tags.get(slot).copied().flatten().is_some_and(|tag| tag.page == page)
    }
}

/// The page that has become of `held` by `difference`, in place of `held`.
pub fn apply(held: &mut [u8], difference: &[u8]) {
    held.iter_mut().zip(difference).for_each(|(held, difference)| *held ^= difference);
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_copy_makes_room_once_its_page_rests() {
        // One shard: pages 3 and 259 have the same slot.
        let copies = Copies::new(1024);
        copies.keep(3, 1, &[1; PAGE]);
        copies.keep(259, 1, &[2; PAGE]);
        copies.keep(259, 2, &[2; PAGE]);
        assert!(copies.has(3) && !copies.has(259));
        copies.keep(259, 3, &[2; PAGE]);
        assert!(!copies.has(3) && copies.has(259));
        copies.forget(3);
        assert!(copies.has(259));
        copies.forget(259);
        assert!(!copies.has(259));
    }

    #[test]
    fn their_memory_is_bounded() {
        assert_eq!(Copies::new(u64::MAX >> 12).shards.len(), 64);
        assert_eq!(Copies::new(131_072).shards.len(), 64);
        assert_eq!(Copies::new(16_384).shards.len(), 8);
        assert_eq!(Copies::new(0).shards.len(), 1);
        assert!(Copies::new(16_384).shards.iter().all(|shard| shard.lock().unwrap().bytes.is_empty()));
    }

    proptest! {
        /// Whatever is kept, sent as a difference, sent whole or forgotten: the receiver has what the guest had.
        #[test]
        fn the_receiver_holds_what_was_sent(steps in prop::collection::vec((0u64..700, 0u8..4, any::<u8>(), 0usize..PAGE), 1..400)) {
            let copies = Copies::new(1024);
            let (mut guest, mut receiver) = (HashMap::new(), HashMap::new());
            for (round, (page, how, value, at)) in steps.into_iter().enumerate() {
                let round = (round / 50) as u32;
                let bytes = guest.entry(page).or_insert_with(|| vec![0u8; PAGE]);
                bytes[at] = value;
                let mut sent = bytes.clone();
                let held = receiver.entry(page).or_insert_with(|| vec![0u8; PAGE]);
                if how == 0 {
                    copies.forget(page);
                    held.copy_from_slice(&sent);
                } else if copies.differ(page, round, &mut sent) {
                    apply(held, &sent);
                } else {
                    copies.keep(page, round, &sent);
                    held.copy_from_slice(&sent);
                }
                prop_assert!(held == bytes);
            }
        }
    }
}
