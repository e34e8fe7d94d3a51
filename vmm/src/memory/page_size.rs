//! Which pages an arriving machine is put on: huge ones, as long as they are no dearer than small ones.
//!
//! As a rule a huge page costs half as much as the 512 small ones it stands for, and the guest runs faster on it. Not where
//! memory is fragmented, so that the kernel must move other pages away first, nor on a host that is itself a virtual machine
//! and reports free memory to its own host: blocks of 2 MiB that were freed a moment ago are quick, those that have been
//! reported come back one fault at a time, some 3 ms each. The kernel does not tell, and what held for the first granules need
//! not hold for the next. So every huge page is timed against small ones. One that was dearer is followed by a pause on small
//! pages, long enough that what it cost too much is a small part of them, and at least twice as long as the pause before; a
//! success halves it. Where huge pages are cheap nearly all of memory gets them, and where they are not the arrival pays for a
//! handful.

use std::time::Duration;

use super::mapping::HUGE_PAGE;

/// Granules on small pages after the first huge page that was too dear, and at most.
const PAUSE: (u32, u32) = (8, 4096);

/// What one huge page cost too much is at most this part of what is spent on small pages until the next.
const WASTE: u32 = 32;

/// After so many huge pages in a row, a granule of small ones tells what these cost now.
const REMINDER: u32 = 32;

/// A measurement counts for this part of what small pages are taken to cost: one may have met an interruption.
const WEIGHT: u32 = 4;

/// So many bytes on small pages tell what they cost.
const SAMPLE: usize = HUGE_PAGE / 2;

/// Pages that a granule of 2 MiB is put on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Huge,
    Small,
}

/// Which kind the next granule is put on; a function of nothing but what it was told.
#[derive(Debug)]
pub(super) struct Choice {
    /// What small pages cost in this pause: bytes, and the time to fill them.
    sample: (usize, Duration),
    /// What a granule of small pages costs, as far as known.
    small: Option<Duration>,
    /// Huge pages since the last small ones.
    row: u32,
    /// Granules left until the next huge page is tried.
    left: u32,
    /// Length of the last pause.
    pause: u32,
}

impl Default for Choice {
    fn default() -> Self {
        Self { sample: (0, Duration::ZERO), small: None, row: 0, left: 1, pause: 0 }
    }
}

impl Choice {
    /// For a granule that nothing was written to.
    pub(super) fn next(&mut self) -> Kind {
        self.row += 1;
        if self.left > 0 || self.small.is_none() || self.row > REMINDER {
            self.left = self.left.saturating_sub(1);
            self.row = 0;
            return Kind::Small;
        }
        Kind::Huge
    }

    /// `bytes` were stored on small pages, which took `time`, copying included: so much dearer a huge page may be, for the
    /// sake of the guest.
    pub(super) fn filled_small(&mut self, bytes: usize, time: Duration) {
        self.sample = (self.sample.0 + bytes, self.sample.1 + time);
        if self.sample.0 >= SAMPLE {
            let now = self.sample.1.mul_f64(HUGE_PAGE as f64 / self.sample.0 as f64);
            self.small = Some(self.small.map_or(now, |known| known - known / WEIGHT + now / WEIGHT));
            self.sample = (0, Duration::ZERO);
        }
    }

    /// Populating a granule on a huge page took `time`.
    pub(super) fn populated_huge(&mut self, time: Duration) {
        match self.small {
            Some(small) if time > small => {
                let excess = (time - small).as_secs_f64() / small.as_secs_f64().max(1e-9);
                let paid = (excess * f64::from(WASTE)) as u32;
                self.pause = paid.max(self.pause * 2).clamp(PAUSE.0, PAUSE.1);
                self.left = self.pause;
            }
            _ => self.pause /= 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Numbers of the granules on huge pages, where `huge` says what the huge page of a granule costs, and a granule of
    /// small ones costs 2 ms.
    fn huge_ones(granules: u32, huge: impl Fn(u32) -> Duration) -> Vec<u32> {
        let mut choice = Choice::default();
        let mut chosen = Vec::new();
        for index in 0..granules {
            match choice.next() {
                Kind::Huge => {
                    choice.populated_huge(huge(index));
                    chosen.push(index);
                }
                Kind::Small => choice.filled_small(HUGE_PAGE, 2 * MS),
            }
        }
        chosen
    }

    #[test]
    fn cheap_huge_pages_are_taken_for_nearly_all() {
        let reminders = 1000 / (REMINDER as usize + 1) + 1;
        assert_eq!(huge_ones(1000, |_| MS).len(), 1000 - reminders);
        assert_eq!(huge_ones(1000, |_| 2 * MS).len(), 1000 - reminders, "alike: the guest likes huge pages better");
    }

    #[test]
    fn dear_huge_pages_are_tried_ever_more_seldom() {
        assert_eq!(huge_ones(400, |_| 9 * MS), [1, 114, 339], "7 ms too much are a thirty-second of 112 times 2 ms");
        assert_eq!(huge_ones(40, |_| 2 * MS + MS / 10), [1, 10, 27], "hardly dearer");
        assert!(huge_ones(100_000, |_| 9 * MS).len() < 40);
        // What was freed a moment ago is quick, and then the rest is not.
        let turning = huge_ones(256, |index| if index < 100 { MS } else { 9 * MS });
        assert!((95..102).contains(&turning.len()), "{turning:?}");
        // And back: most of what follows is on huge pages.
        let back = huge_ones(2000, |index| if index < 100 { 9 * MS } else { MS });
        assert!(back.iter().filter(|&&index| index > 300).count() > 1600);
    }

    #[test]
    fn one_interruption_does_not_make_small_pages_dear() {
        let mut choice = Choice::default();
        choice.filled_small(HUGE_PAGE, MS);
        choice.filled_small(HUGE_PAGE, 5 * MS);
        assert_eq!(choice.small, Some(2 * MS));
        choice.left = 0;
        choice.populated_huge(3 * MS);
        assert_eq!(choice.left, 16);
        for _ in 0..20 {
            choice.filled_small(HUGE_PAGE / 4, MS);
        }
        assert!(choice.small.is_some_and(|small| small > 7 * MS / 2), "four of them are: {:?}", choice.small);
    }
}
