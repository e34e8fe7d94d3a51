//! How fast a running guest dirties its memory, estimated without tracking it.
//!
//! A seeded sample of pages is looked at, and looked at again a tenth of the interval and the whole interval later. The share
//! of them whose contents have changed, times the size of the memory, is what a migration would have had to send once more
//! after that time. Nothing is write-protected and no bitmap is read or cleared, so that the guest does not notice, and a
//! migration that begins meanwhile finds everything as it would be without: it ends the estimate and is asked itself from then
//! on.
//!
//! What an estimate costs is bounded: [`sample::most_pages`] pages are read at each look, by the thread of whoever asks.

mod fingerprint;
mod sample;
mod statistics;
mod turn;

use std::time::{Duration, Instant};

use crate::memory::{Memory, MemoryError};
use sample::Sample;

pub use statistics::{Counted, Look, estimate};
pub use turn::{Turn, Turns};

/// Shortest and longest interval that can be asked for, in milliseconds.
pub const INTERVAL_MS: std::ops::RangeInclusive<u64> = 100..=10_000;

/// The first look back comes after this part of the interval.
const EARLY: u32 = 10;

/// Looks at the memory of a running machine for `interval`. `None` if the turn was ended early.
///
/// # Errors
///
/// [`MemoryError::PageMap`] where the kernel does not say which pages are there.
pub fn count(memory: &Memory, interval: Duration, seed: u64, turn: &Turn<'_>) -> Result<Option<Counted>, MemoryError> {
    let start = Instant::now();
    let Some(sample) = Sample::take(memory, seed, turn)? else { return Ok(None) };
    // Each look visits the pages in the same order at the same pace, so that what lies between two looks lies between two
    // visits to each page.
    let looked = start.elapsed() / 2;
    let mut looks = Vec::with_capacity(2);
    let mut resident = 0;
    for after in [interval / EARLY, interval] {
        if !turn.wait_until(start + looked + after) {
            return Ok(None);
        }
        let start_of_look = Instant::now();
        let Some(found) = sample.look_back(memory, turn)? else { return Ok(None) };
        let middle = start_of_look + start_of_look.elapsed() / 2;
        looks.push(Look { after: middle.saturating_duration_since(start + looked), changed: found.changed });
        resident = found.resident;
    }
    Ok(Some(Counted { memory_pages: memory.pages(), sampled: sample.len(), resident, looks }))
}
