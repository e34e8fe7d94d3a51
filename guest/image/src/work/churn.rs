//! Memory that comes and goes: takes a free MiB, fills it, keeps it for a while, compares it, and lets it go, for ever. So pages
//! that were given to the host, or named to a migration as free, are soon used again.

use alloc::collections::VecDeque;

use super::PIECE;
use super::memory::{PAGES_A_LOOK, PAGES_PER_MIB};
use super::rate::Pace;
use crate::memory::Area;
use crate::memory::pool::Pool;
use crate::oracle::fill;
use crate::oracle::sweep::Pages;
use crate::time::{Clock, MILLISECOND, Next};

/// When no memory is free: until the next look, in nanoseconds.
const RETRY: u64 = 10 * MILLISECOND;

/// A MiB, and which use of it this is.
#[derive(Clone, Copy)]
struct Use {
    unit: usize,
    number: u64,
}

impl Use {
    /// What depends on the place and on the use.
    fn frame(self, frame: u64) -> u64 {
        const NUMBER_BITS: u32 = 20;
        const FRAME_BITS: u32 = 28;
        frame ^ (self.number & ((1 << NUMBER_BITS) - 1)) << FRAME_BITS
    }
}

/// What is being done page by page.
#[derive(Clone, Copy)]
enum Doing {
    Nothing,
    Fill(Use, u64),
    Check(Use, u64),
}

/// The state of the work.
pub struct Churn {
    limit: usize,
    pace: Pace,
    held: VecDeque<Use>,
    doing: Doing,
    uses: u64,
    last: usize,
    checked: u64,
    errors: u64,
}

impl Churn {
    /// Nothing yet.
    pub fn new() -> Self {
        Self {
            limit: 0,
            pace: Pace::new(1),
            held: VecDeque::new(),
            doing: Doing::Nothing,
            uses: 0,
            last: 0,
            checked: 0,
            errors: 0,
        }
    }

    /// How much is kept, and how much is filled in a second.
    pub fn set(&mut self, mib: u32, mib_per_second: u32) {
        self.limit = if mib_per_second == 0 { 0 } else { mib as usize };
        self.pace.set(if mib == 0 { 0 } else { u64::from(mib_per_second) * PAGES_PER_MIB });
    }

    /// Pages compared, and those of them that did not hold what was written.
    pub fn figures(&self) -> (u64, u64) {
        (self.checked, self.errors)
    }

    /// Goes on for up to [`PIECE`].
    pub fn poll(&mut self, clock: &Clock, area: &mut Area, pool: &mut Pool) -> Next {
        let start = clock.now();
        self.pace.update(start);
        loop {
            for _ in 0..PAGES_A_LOOK {
                if let Some(wait) = self.step(start, area, pool) {
                    return wait;
                }
            }
            if clock.now() - start >= PIECE {
                return Next::Now;
            }
        }
    }

    /// One page. Says when to go on, if not now.
    fn step(&mut self, now: u64, area: &mut Area, pool: &mut Pool) -> Option<Next> {
        match self.doing {
            Doing::Nothing => {
                if self.held.len() >= self.limit.max(1) || self.limit == 0 {
                    let Some(oldest) = self.held.pop_front() else { return Some(Next::Never) };
                    self.doing = Doing::Check(oldest, 0);
                    return None;
                }
                // In turn the first that is free, which was let go a moment ago, and what comes next.
                let from = if self.uses.is_multiple_of(2) { 0 } else { self.last + 1 };
                let unit = pool.claim_next(from).or_else(|| pool.claim_next(0));
                let Some(unit) = unit else { return Some(Next::At(now + RETRY)) };
                self.last = unit;
                self.uses += 1;
                self.doing = Doing::Fill(Use { unit, number: self.uses }, 0);
            }
            Doing::Fill(using, PAGES_PER_MIB) => {
                self.held.push_back(using);
                self.doing = Doing::Nothing;
            }
            Doing::Fill(using, page) => {
                if !self.pace.take(1) {
                    return Some(self.pace.due(now, 1).map_or(Next::Never, Next::At));
                }
                if let Some((content, frame)) = area.page(using.unit as u64 * PAGES_PER_MIB + page) {
                    fill::write(content, using.frame(frame));
                }
                self.doing = Doing::Fill(using, page + 1);
            }
            Doing::Check(using, PAGES_PER_MIB) => {
                pool.release(using.unit..using.unit + 1);
                self.doing = Doing::Nothing;
                // The balloon has its turn before this MiB is taken again: else it would never be seen free.
                return Some(Next::Now);
            }
            Doing::Check(using, page) => {
                if let Some((content, frame)) = area.page(using.unit as u64 * PAGES_PER_MIB + page) {
                    self.checked += 1;
                    self.errors += u64::from(!fill::check(content, using.frame(frame)));
                }
                self.doing = Doing::Check(using, page + 1);
            }
        }
        None
    }
}
