//! What many series have taught of one resource: one set of trees for all pools, one for all machines.
//!
//! `headroom forecast evaluate` and `hostd` make theirs here, so that what is published is what runs.

use crate::bank::BankConfig;
use crate::fleet::Fleet;
use crate::insight::Insight;
use crate::model::shared::Shared;
use serde::{Deserialize, Serialize};

/// Lessons that are kept for each horizon at most, unless told otherwise.
pub const LESSONS: usize = 100_000;
/// Steps that lessons of pools reach back, 33 days of five minutes: a pool gives 3,200 in them,
const POOL_SPAN: usize = 9_600;
/// and those of machines, three weeks: a machine gives 860.
const MACHINE_SPAN: usize = 6_000;

/// See the module's description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Experience {
    /// Of pools.
    pub insight: Insight,
    /// Of machines.
    pub fleet: Fleet,
}

impl Experience {
    /// For banks that are made with `bank`, keeping so many lessons for each horizon.
    #[must_use]
    pub fn new(bank: &BankConfig, lessons: usize) -> Self {
        let horizons = bank.horizons.len();
        Self {
            insight: Insight::new(horizons, lessons, POOL_SPAN),
            fleet: Fleet::new(horizons, &bank.seasons, lessons, MACHINE_SPAN),
        }
    }

    /// All ensembles, those of pools first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Shared> {
        self.insight.windows().iter().chain(self.fleet.models())
    }

    /// The same, to be fitted.
    pub(crate) fn all_mut(&mut self) -> impl Iterator<Item = &mut Shared> {
        self.insight.windows_mut().iter_mut().chain(self.fleet.models_mut())
    }

    /// Takes lessons of a time before its own.
    pub(crate) fn absorb(&mut self, older: &Self) {
        self.all_mut().zip(older.all()).for_each(|(own, older)| own.absorb(older));
    }

    /// Bytes that it takes, lessons included.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.all().map(Shared::state_bytes).sum()
    }
}
