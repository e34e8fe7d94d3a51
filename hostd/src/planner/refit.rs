//! Trees are fitted off the hot path, on an allowance of processor time.
//!
//! The planner hands out copies of what there is to learn from and takes the trees back; ticks go on meanwhile with those fitted last. Who
//! does the work is [`crate::daemon`]'s matter: a thread of the lowest priority.

use std::time::Duration;

use predictor::model::Budget;
use predictor::pools::{Done, Work};

use super::Planner;

/// Share of one processor that fits may take in the long run.
const SHARE: f64 = 0.05;

/// What a processor does in a second, in visits (see [`Budget`]).
const VISITS_PER_SECOND: f64 = 1e9;

/// So much is saved up at most; a fit that takes more is never begun.
const SAVED: Duration = Duration::from_secs(600);

/// Processor time that was granted and not used yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowance {
    visits: u64,
}

impl Allowance {
    /// Time has passed.
    pub fn earn(&mut self, passed: Duration) {
        let of = |time: Duration| (time.as_secs_f64() * SHARE * VISITS_PER_SECOND) as u64;
        self.visits = self.visits.saturating_add(of(passed)).min(of(SAVED));
    }

    /// The next work that it is enough for.
    pub fn spend(&mut self, planner: &mut Planner) -> Option<Work> {
        let mut budget = Budget::new(self.visits);
        let work = planner.begin_refit(&mut budget);
        self.visits = budget.left();
        work
    }
}

impl Planner {
    /// The next fit that is due and within `budget`, as a copy. The planner need not be held while it runs.
    pub fn begin_refit(&mut self, budget: &mut Budget) -> Option<Work> {
        self.pools.begin(budget)
    }

    /// Forecasts use what was fitted from now on.
    pub fn end_refit(&mut self, done: Done) {
        self.pools.install(done);
    }
}
