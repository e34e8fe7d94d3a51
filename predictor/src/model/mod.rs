//! Point forecasters: those that are cheap enough to run for every machine and resource at every sample, and dear ones (see
//! [`dear`]) that are fitted off the hot path.
//!
//! A model only ever sees plausible values (see [`crate::sample::plausible`]); the [`crate::bank::Bank`] bounds what it says.

pub mod additive;
pub mod arima;
pub mod boost;
pub mod dear;
pub mod ets;
pub mod ewma;
pub mod fit;
pub mod forest;
pub mod holt;
pub mod lstm;
pub mod mstl;
pub mod naive;
pub mod ridge;
pub mod shared;
mod squares;

use serde::{Deserialize, Serialize};

/// What is forecast for a horizon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The value at its end.
    #[default]
    Value,
    /// The highest value from the next step to its end.
    Maximum,
}

/// What one forecaster does.
pub trait Model {
    /// Its name in explanations.
    const NAME: &'static str;

    /// Takes the next sample, `None` if it is missing: time passes either way.
    fn update(&mut self, value: Option<f64>);

    /// Forecasts for `horizons` (steps ahead, ascending) into `out`, which is as long. Untouched entries and NaN mean that the
    /// model has nothing to say yet.
    fn forecast(&self, horizons: &[usize], out: &mut [f32]);
}

/// What a model costs, and so where it may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CostClass {
    /// Learns from every sample in well under a microsecond: for every machine and resource.
    Online,
    /// Fitted now and then in milliseconds, cheap between two fits.
    Moderate,
    /// Fitted now and then in seconds.
    Dear,
}

/// How much work may be done off the hot path before the next tick. There is no clock here: work is counted in visits of a number
/// (one multiplication and addition with what it takes to get there), of which a core does about a thousand million a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    left: u64,
}

impl Budget {
    /// So many visits.
    #[must_use]
    pub fn new(visits: u64) -> Self {
        Self { left: visits }
    }

    /// No bound: for replays.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { left: u64::MAX }
    }

    /// Takes `visits` if they are left.
    pub fn spend(&mut self, visits: u64) -> bool {
        let enough = self.left >= visits;
        if enough && self.left != u64::MAX {
            self.left -= visits;
        }
        enough
    }

    /// What is left.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }
}
