//! Memory work: fills an area once, sweeps another for ever, and compares the filled one when asked.
//!
//! The sweeper's area begins at the first page and grows upwards, the filled one ends at the last MiB and grows downwards; either
//! stops at memory that somebody else has. What they no longer need is free, for the balloon and for [`Churn`].

use super::churn::Churn;
use super::rate::{Meter, Pace};
use super::{PAUSE, PIECE};
use crate::memory::pool::{Pool, Unit};
use crate::memory::{Area, PAGE_BYTES};
use crate::oracle::page::Page;
use crate::oracle::sweep::{Pages, Sweeper};
use crate::oracle::{Defects, fill};
use crate::say;
use crate::time::{Clock, Next};

/// Pages of a MiB.
pub const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;
/// Pages between two looks at the clock.
pub const PAGES_A_LOOK: u64 = 8;
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
    pool: Pool,
    sweeper: Sweeper,
    /// MiB of the sweeper.
    swept_units: usize,
    pace: Pace,
    swept: Meter,
    reports_left: u32,
    /// MiB that are to be filled, or were, from here to the end.
    fill_first: usize,
    /// Pages filled, from the end downwards.
    filled: u64,
    verify_next: Option<u64>,
    fill_checked: u64,
    fill_errors: u64,
    churn: Churn,
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
    pub churn_checked: u64,
    pub churn_errors: u64,
    pub free_mib: u32,
    pub given_mib: u32,
    pub balloon_mib: u32,
}

impl Memory {
    /// Over `area`, of which the last `fill_mib` are to be filled.
    pub fn new(area: Area, fill_mib: u32) -> Self {
        let units = (area.pages() / PAGES_PER_MIB) as usize;
        let mut memory = Self {
            pool: Pool::new(units),
            area,
            sweeper: Sweeper::new(),
            swept_units: 0,
            pace: Pace::new(1),
            swept: Meter::default(),
            reports_left: REPORTS_MAX,
            fill_first: units,
            filled: 0,
            verify_next: None,
            fill_checked: 0,
            fill_errors: 0,
            churn: Churn::new(),
        };
        memory.set_fill(fill_mib);
        memory
    }

    /// Who has which MiB.
    pub fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Addresses of the pages of a MiB.
    pub fn addresses(&self, unit: usize) -> impl Iterator<Item = u64> {
        let first = unit as u64 * PAGES_PER_MIB;
        (first..first + PAGES_PER_MIB).filter_map(|page| self.area.address(page))
    }

    /// All that the workload could have, in bytes.
    pub fn bytes(&self) -> u64 {
        self.area.bytes()
    }

    /// What nobody needs, in bytes.
    pub fn free_bytes(&self) -> u64 {
        ((self.pool.count(Unit::Free) + self.pool.count(Unit::Host)) as u64) << 20
    }

    /// Sets size and rate of the sweeper; the size that it has then, in MiB.
    pub fn set_sweep(&mut self, mib: u32, mib_per_second: u32) -> u32 {
        let wanted = mib as usize;
        while self.swept_units < wanted && self.pool.claim(self.swept_units) {
            self.swept_units += 1;
        }
        if wanted < self.swept_units {
            self.pool.release(wanted..self.swept_units);
            self.swept_units = wanted;
        }
        self.sweeper.resize(self.swept_units as u64 * PAGES_PER_MIB);
        self.pace.set(if self.swept_units == 0 { 0 } else { u64::from(mib_per_second) * PAGES_PER_MIB });
        self.swept_units as u32
    }

    /// Sets how much is to be filled; the size that it has then, in MiB. What is let go is free at once, what is added is filled
    /// piece by piece.
    pub fn set_fill(&mut self, mib: u32) -> u32 {
        let wanted = self.pool.len().saturating_sub(mib as usize);
        while self.fill_first > wanted && self.pool.claim(self.fill_first - 1) {
            self.fill_first -= 1;
        }
        if self.fill_first < wanted {
            self.pool.release(self.fill_first..wanted);
            self.fill_first = wanted;
            self.filled = self.filled.min(self.fill_pages());
        }
        self.fill_mib()
    }

    /// Sets how much comes and goes, and how fast.
    pub fn set_churn(&mut self, mib: u32, mib_per_second: u32) {
        self.churn.set(mib, mib_per_second);
    }

    /// MiB that were set aside to be filled.
    pub fn fill_mib(&self) -> u32 {
        (self.pool.len() - self.fill_first) as u32
    }

    fn fill_pages(&self) -> u64 {
        u64::from(self.fill_mib()) * PAGES_PER_MIB
    }

    /// The page that was, or is to be, filled as number `index`.
    fn fill_page(&mut self, index: u64) -> Option<(&mut Page, u64)> {
        let end = self.pool.len() as u64 * PAGES_PER_MIB;
        self.area.page(end.checked_sub(index + 1)?)
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
            churn_checked: self.churn.figures().0,
            churn_errors: self.churn.figures().1,
            free_mib: (self.free_bytes() >> 20) as u32,
            given_mib: self.pool.count(Unit::Host) as u32,
            balloon_mib: self.pool.count(Unit::Ballooned) as u32,
        }
    }

    /// Fills for up to [`PIECE`]; false when it is done.
    pub fn fill(&mut self, clock: &Clock) -> bool {
        let start = clock.now();
        while clock.now() - start < PIECE {
            for _ in 0..PAGES_A_LOOK {
                if self.filled == self.fill_pages() {
                    return false;
                }
                let Some((page, frame)) = self.fill_page(self.filled) else {
                    return false;
                };
                fill::write(page, frame);
                self.filled += 1;
            }
        }
        true
    }

    /// Sweeps, fills, compares, and lets memory come and go, for up to [`PIECE`] each.
    pub fn poll(&mut self, clock: &Clock) -> Next {
        let filling = if self.fill(clock) { Next::Now } else { Next::Never };
        let churning = self.churn.poll(clock, &mut self.area, &mut self.pool);
        self.sweep(clock).or(filling).or(self.verify(clock)).or(churning)
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
                if next >= self.filled {
                    self.verify_next = None;
                    return Next::Never;
                }
                let Some((page, frame)) = self.fill_page(next) else {
                    return Next::Never;
                };
                let intact = fill::check(page, frame);
                self.fill_checked += 1;
                self.fill_errors += u64::from(!intact);
                next += 1;
            }
        }
        self.verify_next = Some(next);
        Next::At(start + PAUSE)
    }
}
