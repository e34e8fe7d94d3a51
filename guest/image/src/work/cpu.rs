//! Processor load: arithmetic for a share of the time.

use core::hint::black_box;

use super::PIECE;
use crate::oracle::mix;
use crate::time::{Clock, MILLISECOND, Next};

/// Work begins when this much time of it is due, and ends when none is: fewer wakings than doing every microsecond at once.
const BURST: u64 = MILLISECOND;
/// Time owed beyond this is forgotten.
const DEBT_MAX: u64 = 10 * MILLISECOND;
/// Rounds of arithmetic in a unit of work: some 5 us on a processor of 2026.
const UNIT_ROUNDS: u64 = 4096;

/// The load.
#[derive(Default)]
pub struct Cpu {
    percent: u64,
    /// Nanoseconds of work that are due.
    due: u64,
    last: u64,
    working: bool,
    units: u64,
}

impl Cpu {
    /// Changes the share, 0 to 100 per cent.
    pub fn set(&mut self, percent: u8) {
        self.percent = u64::from(percent);
        self.due = 0;
    }

    /// Units of work done.
    pub fn units(&self) -> u64 {
        self.units
    }

    /// Works for up to [`PIECE`].
    pub fn poll(&mut self, clock: &Clock) -> Next {
        let start = clock.now();
        let elapsed = start.saturating_sub(self.last);
        self.last = start;
        if self.percent == 0 {
            return Next::Never;
        }
        self.due = (self.due + elapsed * self.percent / 100).min(DEBT_MAX);
        if !self.working && self.due < BURST {
            return Next::At(start + (BURST - self.due) * 100 / self.percent);
        }
        let mut now = start;
        while now - start < PIECE.min(self.due) {
            black_box((0..UNIT_ROUNDS).fold(self.units, |value, round| mix(value ^ round)));
            self.units += 1;
            now = clock.now();
        }
        // A piece that took longer did not work longer: the vCPU was kept waiting, and the work is still owed.
        self.due -= (now - start).min(PIECE).min(self.due);
        self.working = self.due != 0;
        if self.working { Next::Now } else { Next::At(now + BURST * 100 / self.percent) }
    }
}
