//! Memory work: fills an area once, sweeps another for ever, and compares the filled one when asked.
//!
//! The sweeper's area begins at the first page, the filled one ends at the last; a sweeper that is told to grow stops at
//! the filled area.

use super::rate::{Meter, Pace};
use super::{PAUSE, PIECE};
use crate::memory::{Area, PAGE_BYTES};
use crate::oracle::page::Page;
use crate::oracle::sweep::{Pages, Sweeper};
use crate::oracle::{Defects, fill};
use crate::say;
use crate::time::{Clock, Next};

/// Pages of a MiB.
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;
/// Pages between two looks at the clock.
const PAGES_A_LOOK: u64 = 8;
/// Defects that are reported on the serial port; all are counted.
const REPORTS_MAX: u32 = 8;

impl Pages for Area {
    fn page(&mut self, index: u64) -> Option<(&mut Page, u64)> {
        let address = self.address(index)?;
        // SAFETY: the area is RAM that nothing but the workload uses, page-aligned and mapped; the borrow of the area keeps
        // this the only reference to the page.
        Some((unsafe { &mut *(address as *mut Page) }, address / PAGE_BYTES))
    }
}

/// The state of all memory work.
pub struct Memory {
    area: Area,
    sweeper: Sweeper,
    pace: Pace,
    swept: Meter,
    reports_left: u32,
    fill_first: u64,
    filled: u64,
    verify_next: Option<u64>,
    fill_checked: u64,
    fill_errors: u64,
}

/// What the status says about memory.
pub struct Figures {
    pub step: u64,
    pub checked: u64,
    pub defects: Defects,
    pub mib_per_second: u32,
    pub filled: u64,
    pub fill_checked: u64,
    pub fill_errors: u64,
}

impl Memory {
    /// Over `area`, of which the last `fill_mib` are to be filled.
    pub fn new(area: Area, fill_mib: u32) -> Self {
        let fill = (u64::from(fill_mib) * PAGES_PER_MIB).min(area.pages());
        Self {
            fill_first: area.pages() - fill,
            area,
            sweeper: Sweeper::new(),
            pace: Pace::new(1),
            swept: Meter::default(),
            reports_left: REPORTS_MAX,
            filled: 0,
            verify_next: None,
            fill_checked: 0,
            fill_errors: 0,
        }
    }

    /// Sets size and rate of the sweeper; the size that it has then, in MiB.
    pub fn set_sweep(&mut self, mib: u32, mib_per_second: u32) -> u32 {
        let mib = u64::from(mib).min(self.fill_first / PAGES_PER_MIB);
        self.sweeper.resize(mib * PAGES_PER_MIB);
        self.pace.set(if mib == 0 { 0 } else { u64::from(mib_per_second) * PAGES_PER_MIB });
        mib as u32
    }

    /// MiB that were set aside to be filled.
    pub fn fill_mib(&self) -> u32 {
        ((self.area.pages() - self.fill_first) / PAGES_PER_MIB) as u32
    }

    /// Starts to compare the filled area.
    pub fn verify_fill(&mut self) {
        self.verify_next = Some(0);
    }

    /// For the status.
    pub fn figures(&self) -> Figures {
        Figures {
            step: self.sweeper.step(),
            checked: self.sweeper.checked(),
            defects: self.sweeper.defects(),
            mib_per_second: (self.swept.per_second() + PAGES_PER_MIB / 2).wrapping_div(PAGES_PER_MIB) as u32,
            filled: self.filled,
            fill_checked: self.fill_checked,
            fill_errors: self.fill_errors,
        }
    }

    /// Fills for up to [`PIECE`]; false when it is done.
    pub fn fill(&mut self, clock: &Clock) -> bool {
        let start = clock.now();
        while clock.now() - start < PIECE {
            for _ in 0..PAGES_A_LOOK {
                let Some((page, frame)) = self.area.page(self.fill_first + self.filled) else {
                    return false;
                };
                fill::write(page, frame);
                self.filled += 1;
            }
        }
        true
    }

    /// Sweeps, and compares, for up to [`PIECE`] each.
    pub fn poll(&mut self, clock: &Clock) -> Next {
        self.sweep(clock).or(self.verify(clock))
    }

    fn sweep(&mut self, clock: &Clock) -> Next {
        let start = clock.now();
        self.swept.update(start);
        self.pace.update(start);
        loop {
            for _ in 0..PAGES_A_LOOK {
                if !self.pace.take(1) {
                    return self.pace.due(start, 1).map_or(Next::Never, Next::At);
                }
                self.touch();
            }
            if clock.now() - start >= PIECE {
                return Next::Now;
            }
        }
    }

    fn touch(&mut self) {
        match self.sweeper.advance(&mut self.area) {
            Ok(touched) => self.swept.count(u64::from(touched)),
            Err(finding) => {
                self.swept.count(1);
                if self.reports_left != 0 {
                    self.reports_left -= 1;
                    say!("headroom-guest sweeper: {finding:x?}");
                }
            }
        }
    }

    fn verify(&mut self, clock: &Clock) -> Next {
        let Some(mut next) = self.verify_next else {
            return Next::Never;
        };
        let start = clock.now();
        while clock.now() - start < PIECE {
            for _ in 0..PAGES_A_LOOK {
                if next == self.filled {
                    self.verify_next = None;
                    return Next::Never;
                }
                let Some((page, frame)) = self.area.page(self.fill_first + next) else {
                    return Next::Never;
                };
                self.fill_checked += 1;
                if !fill::check(page, frame) {
                    self.fill_errors += 1;
                }
                next += 1;
            }
        }
        self.verify_next = Some(next);
        Next::At(start + PAUSE)
    }
}
