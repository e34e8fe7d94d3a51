//! What a bank is told when it is made, and what it refuses.

use crate::conformal::{PHASES, Rates};
use crate::model::Target;
use crate::model::ridge::MOST_SEASONS;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most horizons a bank keeps track of.
pub const MOST_HORIZONS: usize = 6;
/// The furthest horizon in steps: each step costs memory in every bank.
pub const LONGEST_HORIZON: usize = 2_016;

/// What a bank is told when it is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BankConfig {
    /// Steps ahead at which errors are learned, ascending; forecasts between them are interpolated.
    pub horizons: Vec<usize>,
    /// What is forecast.
    pub target: Target,
    /// Memory of the losses by which the models are weighed: a loss weighs half after this many steps.
    pub loss_half_life: f64,
    /// How sharply a better model is preferred: weights go with (naive's loss / model's loss) to this power.
    pub sharpness: i32,
    /// Step of the series' own quantiles, in mean deviations.
    pub level_rate: f64,
    /// How fast quantiles adapt.
    pub rates: Rates,
    /// Lengths in steps of the cycles that the series may follow, such as an hour and a day; at most two.
    pub seasons: Vec<usize>,
    /// Weight of the newest cycle in a cycle's profile.
    pub season_rate: f64,
    /// What is left of a sample's weight in the ridge regression a step later.
    pub ridge_decay: f64,
    /// Penalty of the ridge regression, in samples.
    pub ridge_penalty: f64,
    /// Steps between two solutions of the ridge regression.
    pub refit_every: u32,
}

impl Default for BankConfig {
    fn default() -> Self {
        Self {
            horizons: vec![1, 3, 12],
            target: Target::Value,
            loss_half_life: 288.0,
            sharpness: 16,
            level_rate: 0.01,
            rates: Rates::default(),
            seasons: Vec::new(),
            season_rate: 0.1,
            ridge_decay: 0.998,
            ridge_penalty: 3.0,
            refit_every: 96,
        }
    }
}

impl BankConfig {
    /// The default for samples `step_s` seconds apart, with horizons spread up to `steps` ahead, and with the two longest of
    /// minute, hour and day as cycles that have at least four steps.
    #[must_use]
    pub fn for_horizon(step_s: f64, steps: usize) -> Self {
        let steps = steps.clamp(1, LONGEST_HORIZON);
        let mut horizons: Vec<usize> =
            [1, steps.div_ceil(12), steps.div_ceil(4), steps.div_ceil(2), steps].into_iter().collect();
        horizons.sort_unstable();
        horizons.dedup();
        Self { horizons, seasons: cycles(step_s), ..Self::default() }
    }

    /// In how many parts of the shortest cycle quantiles are told apart.
    pub(super) fn phases(&self) -> usize {
        self.seasons.iter().copied().min().map_or(0, |length| length.min(PHASES))
    }

    /// Steps of the shortest cycle; 1 without one.
    pub(super) fn cycle(&self) -> u32 {
        self.seasons.iter().copied().min().unwrap_or(1).clamp(1, 1 << 20) as u32
    }

    pub(super) fn check(&self) -> Result<(), BankError> {
        let ascending = self.horizons.windows(2).all(|pair| pair[0] < pair[1]);
        let first = self.horizons.first().copied().unwrap_or(0);
        let last = self.horizons.last().copied().unwrap_or(0);
        if first == 0 || !ascending || last > LONGEST_HORIZON || self.horizons.len() > MOST_HORIZONS {
            return Err(BankError::Horizons(self.horizons.clone()));
        }
        if self.seasons.len() > MOST_SEASONS || self.seasons.contains(&0) {
            return Err(BankError::Seasons(self.seasons.clone()));
        }
        let positive = |name, value: f64| {
            if value.is_finite() && value > 0.0 { Ok(()) } else { Err(BankError::NotPositive { name, value }) }
        };
        positive("loss_half_life", self.loss_half_life)?;
        positive("sharpness", f64::from(self.sharpness))?;
        positive("level_rate", self.level_rate)?;
        positive("ridge_penalty", self.ridge_penalty)?;
        positive("gamma", f64::from(self.rates.gamma))
    }
}

/// See [`BankConfig::for_horizon`]; the shorter one first.
#[must_use]
pub fn cycles(step_s: f64) -> Vec<usize> {
    let steps = [60.0, 3_600.0, 86_400.0].map(|seconds| (seconds / step_s).round());
    let known = steps.into_iter().filter(|steps| (4.0..=1e6).contains(steps)).map(|steps| steps as usize);
    let known: Vec<usize> = known.collect();
    known[known.len().saturating_sub(MOST_SEASONS)..].to_vec()
}

/// A configuration that cannot be used.
#[derive(Debug, Error, PartialEq)]
pub enum BankError {
    /// Horizons are empty, not ascending, too many or too far.
    #[error(
        "horizons {0:?} cannot be used: give 1 to {MOST_HORIZONS} ascending numbers of steps from 1 to {LONGEST_HORIZON}"
    )]
    Horizons(Vec<usize>),
    /// Cycles are too many, or of no length.
    #[error("cycles of {0:?} steps cannot be used: give at most {MOST_SEASONS}, none of 0 steps")]
    Seasons(Vec<usize>),
    /// A number that has to be above zero is not.
    #[error("{name} is {value}: give a number above 0")]
    NotPositive {
        /// Name of the setting.
        name: &'static str,
        /// Its value.
        value: f64,
    },
}
