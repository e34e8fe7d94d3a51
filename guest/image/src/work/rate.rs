//! Rates: to keep to one, and to measure one.

use super::PAUSE;
use crate::time::{MILLISECOND, SECOND};

/// Work that is owed for longer than this is forgotten, in nanoseconds: after a blackout the guest goes on at its rate and
/// does not make up for it.
const DEBT_MAX: u64 = 20 * MILLISECOND;

/// Keeps work to so many units a second.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    per_second: u64,
    /// Units that may be done now, in 1/SECOND.
    credit: u64,
    /// The least credit that is always allowed to gather, in units.
    burst: u64,
    last: u64,
}

impl Pace {
    /// Nothing a second. Credit for `burst` units may gather at any rate.
    pub fn new(burst: u64) -> Self {
        Self { per_second: 0, credit: 0, burst, last: 0 }
    }

    /// Changes the rate.
    pub fn set(&mut self, per_second: u64) {
        self.per_second = per_second;
        if per_second == 0 {
            self.credit = 0;
        }
    }

    /// Adds what has come due up to `now`.
    pub fn update(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.last).min(SECOND);
        self.last = now;
        let most = (self.per_second.saturating_mul(DEBT_MAX)).max(self.burst * SECOND);
        self.credit = self.credit.saturating_add(self.per_second.saturating_mul(elapsed)).min(most);
    }

    /// Takes `units` if they are due.
    pub fn take(&mut self, units: u64) -> bool {
        let cost = units * SECOND;
        let due = self.per_second != 0 && self.credit >= cost;
        if due {
            self.credit -= cost;
        }
        due
    }

    /// Takes a `take` back.
    pub fn give_back(&mut self, units: u64) {
        self.credit = self.credit.saturating_add(units * SECOND);
    }

    /// When `units` will be due, but not sooner than [`PAUSE`] from now; `None` for never.
    pub fn due(&self, now: u64, units: u64) -> Option<u64> {
        let missing = (units * SECOND).saturating_sub(self.credit);
        Some(now + missing.div_ceil(self.per_second.max(1)).max(PAUSE)).filter(|_| self.per_second != 0)
    }
}

/// Measures units a second over about the last second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    start: u64,
    count: u64,
    per_second: u64,
}

impl Meter {
    /// Counts `units`.
    pub fn count(&mut self, units: u64) {
        self.count += units;
    }

    /// Ends the measurement if it is a second old.
    pub fn update(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.start);
        if elapsed >= SECOND {
            self.per_second = (u128::from(self.count) * u128::from(SECOND) / u128::from(elapsed)) as u64;
            self.start = now;
            self.count = 0;
        }
    }

    /// Units a second.
    pub fn per_second(&self) -> u64 {
        self.per_second
    }
}
