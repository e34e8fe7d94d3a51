//! The pages that are looked at.

use super::fingerprint;
use super::turn::Turn;
use crate::memory::{Memory, MemoryError, Residence};
use migration::guest::PAGE_BYTES;

/// Resident pages that are looked at for each GiB of memory: 16 MiB of it, read in some milliseconds.
const PER_GIB: u64 = 4096;
/// At least so many, as far as there are.
const LEAST: u64 = 2048;
/// At most so many, whatever the size: 128 MiB.
const MOST: u64 = 32_768;

/// Where little of the memory is resident, so many times as many places are tried.
const PASSES: u64 = 8;

/// Pages between two looks at whether to go on: less than a millisecond.
const BATCH: usize = 256;

/// Resident pages that are looked at in a memory of so many pages.
pub fn most_pages(pages: u64) -> u64 {
    (pages * PAGE_BYTES / (1 << 30) * PER_GIB).clamp(LEAST, MOST).min(pages)
}

/// Numbers that look random and follow from the seed (SplitMix64: Steele, Lea, Flood, OOPSLA 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0. With limits far below 2^64 the bias is nothing.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A page in each of `count` equal parts of `pages` pages, ascending: spread out, and never in step with what a guest does.
fn places(pages: u64, count: u64, random: &mut Random) -> Vec<u64> {
    let edge = |part: u64| (u128::from(pages) * u128::from(part) / u128::from(count.max(1))) as u64;
    (0..count).map(|part| edge(part) + random.below((edge(part + 1) - edge(part)).max(1))).collect()
}

/// What was seen of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It has no memory: it reads as zeroes.
    Nothing,
    Page(u64),
}

/// What a look back found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Pages that were written since.
    pub changed: u64,
    /// Pages that have memory now.
    pub resident: u64,
}

/// Pages and what they held.
#[derive(Debug)]
pub struct Sample {
    /// By page.
    pages: Vec<(u64, Seen)>,
    zeroes: u64,
}

impl Sample {
    /// Chooses pages and looks at them. `None` if the turn ended.
    ///
    /// # Errors
    ///
    /// [`MemoryError::PageMap`] where the kernel does not say which pages are there.
    pub fn take(memory: &Memory, seed: u64, turn: &Turn<'_>) -> Result<Option<Self>, MemoryError> {
        let (pages, wanted) = (memory.pages(), most_pages(memory.pages()));
        let mut random = Random(seed);
        let mut buffer = vec![0; PAGE_BYTES as usize];
        let mut sample = Self { pages: Vec::new(), zeroes: fingerprint::of(&buffer) };
        let mut resident = 0;
        for _ in 0..PASSES {
            let places = places(pages, wanted, &mut random);
            for batch in places.chunks(BATCH) {
                if turn.ended() {
                    return Ok(None);
                }
                for &page in batch {
                    // What is in swap stays there, and the sample without it: to compare it later it would have to be read now.
                    let Some(seen) = see(memory, page, &mut buffer)? else { continue };
                    resident += u64::from(seen != Seen::Nothing);
                    sample.pages.push((page, seen));
                }
            }
            if resident >= wanted || wanted == pages {
                break;
            }
        }
        // A page that was met twice counts once: what it held first, since sorting keeps the order.
        sample.pages.sort_by_key(|&(page, _)| page);
        sample.pages.dedup_by_key(|&mut (page, _)| page);
        Ok(Some(sample))
    }

    /// Number of pages, with memory or without.
    pub fn len(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Looks at the same pages again. `None` if the turn ended.
    ///
    /// # Errors
    ///
    /// As [`Sample::take`].
    pub fn look_back(&self, memory: &Memory, turn: &Turn<'_>) -> Result<Option<Found>, MemoryError> {
        let mut buffer = vec![0; PAGE_BYTES as usize];
        let mut found = Found::default();
        for batch in self.pages.chunks(BATCH) {
            if turn.ended() {
                return Ok(None);
            }
            for &(page, before) in batch {
                // What was given back, or has gone to swap, was not written.
                let Some(now @ Seen::Page(print)) = see(memory, page, &mut buffer)? else { continue };
                found.resident += 1;
                // Memory that came with a read, or with a huge page for a neighbour, holds zeroes.
                let unchanged = now == before || (before == Seen::Nothing && print == self.zeroes);
                found.changed += u64::from(!unchanged);
            }
        }
        Ok(Some(found))
    }
}

/// `None` for a page in swap.
fn see(memory: &Memory, page: u64, buffer: &mut [u8]) -> Result<Option<Seen>, MemoryError> {
    match memory.residence(page)? {
        Residence::Absent => Ok(Some(Seen::Nothing)),
        Residence::Swapped => Ok(None),
        Residence::Present => {
            memory.read_pages(page, buffer)?;
            Ok(Some(Seen::Page(fingerprint::of(buffer))))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::turn::Turns;
    use super::*;

    proptest! {
        #[test]
        fn places_are_spread_over_all_pages(pages in 1u64..1 << 40, count in 1u64..5000, seed: u64) {
            let count = count.min(pages);
            let places = places(pages, count, &mut Random(seed));
            prop_assert_eq!(places.len() as u64, count);
            prop_assert!(places.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(places.last().is_some_and(|&last| last < pages));
        }
    }

    #[test]
    fn the_work_is_bounded() {
        assert_eq!([16, 1024, 4096, 1 << 20].map(|mib| most_pages(mib * 256)), [2048, 4096, 16_384, 32_768]);
        assert_eq!(most_pages(100), 100);
    }

    #[test]
    fn only_what_was_written_has_changed_and_nothing_is_populated() {
        let memory = Memory::new(64).unwrap();
        let turns = Turns::default();
        let turn = turns.take().unwrap();
        let write = |pages: std::ops::Range<u64>, byte: u8| {
            memory.write_pages(pages.start, &vec![byte; ((pages.end - pages.start) * PAGE_BYTES) as usize]).unwrap();
        };
        write(0..4096, 1);
        let before = memory.usage().ram_bytes;
        let sample = Sample::take(&memory, 1, &turn).unwrap().unwrap();
        let quiet = sample.look_back(&memory, &turn).unwrap().unwrap();
        assert_eq!(quiet.changed, 0);
        let share = quiet.resident as f64 / sample.len() as f64;
        assert!((0.22..0.28).contains(&share), "a quarter is resident: {share}");
        // Half of what was there, and a quarter of the memory that was not.
        write(0..2048, 2);
        write(4096..8192, 3);
        memory.zero_pages(2048..3072).unwrap();
        let found = sample.look_back(&memory, &turn).unwrap().unwrap();
        let share = found.changed as f64 / sample.len() as f64;
        assert!((0.35..0.4).contains(&share), "6,144 of 16,384 pages: {share}");
        assert_eq!(crate::memory::Usage::now(Some(&memory)).ram_bytes, before + (4096 - 1024) * PAGE_BYTES);
        turns.end();
        assert!(sample.look_back(&memory, &turn).unwrap().is_none());
        assert!(Sample::take(&memory, 1, &turn).unwrap().is_none());
    }
}
