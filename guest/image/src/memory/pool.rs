//! Who has which MiB of the work area: the workload, nobody, the device for a moment, or the host.
//!
//! ```text
//!          claim                 lend for a report          done
//! Used <─────────── Free ─────────────────────> Lent ────────────────> Host
//!   └── release ──────┘ └─────── lend for a hint ─┘└── done: as it was    │ claim ──> Used
//!                              Host, Free ── lend for the balloon ──> Lent ── done ──> Ballooned ── deflated ──> Host
//! ```

extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// What a MiB is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// The workload's.
    Used,
    /// Nobody's, and the host still keeps memory for it.
    Free,
    /// In a request that the device has not answered.
    Lent,
    /// Nobody's, and the host has its memory back.
    Host,
    /// In the balloon.
    Ballooned,
}

/// All of them, by number.
#[derive(Clone, Debug)]
pub struct Pool {
    units: Vec<Unit>,
}

impl Pool {
    /// `units` MiB that nobody has touched: the host has no memory for them yet.
    pub fn new(units: usize) -> Self {
        Self { units: vec![Unit::Host; units] }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.units.len()
    }

    /// How many are `kind`.
    pub fn count(&self, kind: Unit) -> usize {
        self.units.iter().filter(|&&unit| unit == kind).count()
    }

    fn is_claimable(&self, index: usize) -> bool {
        matches!(self.units.get(index), Some(Unit::Free | Unit::Host))
    }

    /// Takes one for the workload, if it can be had.
    pub fn claim(&mut self, index: usize) -> bool {
        let can = self.is_claimable(index);
        if can {
            self.units[index] = Unit::Used;
        }
        can
    }

    /// Takes the first from `from` on that can be had.
    pub fn claim_next(&mut self, from: usize) -> Option<usize> {
        let index = (from..self.len()).find(|&index| self.is_claimable(index))?;
        self.units[index] = Unit::Used;
        Some(index)
    }

    /// The workload needs these no more.
    pub fn release(&mut self, range: Range<usize>) {
        for unit in self.units.get_mut(range).into_iter().flatten() {
            if *unit == Unit::Used {
                *unit = Unit::Free;
            }
        }
    }

    /// Hands the last one that nobody needs to the device.
    pub fn lend_last(&mut self) -> Option<usize> {
        let index = (0..self.len()).rev().find(|&index| self.is_claimable(index))?;
        self.units[index] = Unit::Lent;
        Some(index)
    }

    /// Hands the first from `from` on that the host keeps memory for to the device.
    pub fn lend_free(&mut self, from: usize) -> Option<usize> {
        let index = (from..self.len()).find(|&index| self.units[index] == Unit::Free)?;
        self.units[index] = Unit::Lent;
        Some(index)
    }

    /// One from the balloon.
    pub fn ballooned(&self) -> Option<usize> {
        self.units.iter().position(|&unit| unit == Unit::Ballooned)
    }

    /// The device has answered: this is `kind` from here on.
    pub fn put(&mut self, index: usize, kind: Unit) {
        if let Some(unit) = self.units.get_mut(index) {
            *unit = kind;
        }
    }
}
