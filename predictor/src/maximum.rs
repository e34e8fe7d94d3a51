//! How high a series will go within a window: the maximum over it, not the value at its end.
//!
//! A bank of its own forecasts the maximum; here the whole distribution of its error is kept, as the outcomes of the past in usual
//! errors of their time, since a probability of exceeding a capacity needs more than a few quantiles.

use crate::bank::{Bank, BankConfig, BankError, Target};
use crate::forecast::{Distribution, Forecast};
use crate::window::gaps;
use serde::{Deserialize, Serialize};

/// Outcomes kept for each window.
const KEPT: usize = 2_048;
/// Outcomes that outweigh what is assumed before there are any.
const ASSUMED: f64 = 6.0;
/// An outcome counts for so many usual errors at most.
const FURTHEST: f32 = 20.0;

/// Forecasts the maximum of one series over several windows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Maxima {
    bank: Bank,
    windows: Vec<Outcomes>,
    /// Newest values, as many as the longest window; missing ones are NaN.
    #[serde(with = "gaps")]
    recent: Vec<f32>,
    clock: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Outcomes {
    steps: usize,
    /// (maximum - forecast) / usual error, newest outcomes, as a ring.
    scores: Vec<f32>,
    next: usize,
    /// Forecast and usual error noted at each of the last `steps` steps.
    #[serde(with = "gaps")]
    pending: Vec<f32>,
}

impl Maxima {
    /// For windows as long as the horizons of `config`.
    ///
    /// # Errors
    /// [`BankError`] names the setting that cannot be used.
    pub fn new(config: &BankConfig) -> Result<Self, BankError> {
        let bank = Bank::new(BankConfig { target: Target::Maximum, ..config.clone() })?;
        let windows = config
            .horizons
            .iter()
            .map(|steps| Outcomes { steps: *steps, scores: Vec::new(), next: 0, pending: vec![f32::NAN; 2 * steps] })
            .collect();
        let longest = config.horizons.last().copied().unwrap_or(1);
        Ok(Self { bank, windows, recent: vec![f32::NAN; longest], clock: 0 })
    }

    /// Takes the next sample; `None` if it is missing.
    pub fn update(&mut self, value: Option<f64>) {
        let length = self.recent.len();
        let place = (self.clock % length as u64) as usize;
        self.recent[place] = value.map_or(f32::NAN, |value| value as f32);
        self.bank.update(value);
        for outcomes in &mut self.windows {
            let slot = (self.clock % outcomes.steps as u64) as usize * 2;
            let (point, scale) = (outcomes.pending[slot], outcomes.pending[slot + 1]);
            if value.is_some() && point.is_finite() && scale > 0.0 {
                let seen = (0..outcomes.steps).map(|age| self.recent[(place + length - age) % length]);
                let highest = seen.fold(f32::NAN, f32::max);
                outcomes.push(((highest - point) / scale).clamp(-FURTHEST, FURTHEST));
            }
            let (point, scale) = base(&self.bank, outcomes.steps).unwrap_or((f64::NAN, f64::NAN));
            outcomes.pending[slot] = point as f32;
            outcomes.pending[slot + 1] = scale as f32;
        }
        self.clock += 1;
    }

    /// The distribution of the maximum over the next `steps` steps (the window asked for when this was made that is nearest
    /// above, or the longest). `None` before the first sample.
    #[must_use]
    pub fn distribution(&self, steps: usize) -> Option<Distribution> {
        let outcomes = self.windows.iter().find(|outcomes| outcomes.steps >= steps).or(self.windows.last())?;
        let (point, scale) = base(&self.bank, outcomes.steps)?;
        let assumed = Distribution::from_values(ASSUMED_SCORES.iter().map(|score| point + scale * score).collect())?;
        let learned = outcomes.scores.iter().map(|score| point + scale * f64::from(*score)).collect();
        let Some(learned) = Distribution::from_values(learned) else { return Some(assumed) };
        // Windows overlap, so that their outcomes tell less than their number.
        let count = outcomes.scores.len() as f64 / (outcomes.steps as f64).sqrt();
        if count >= 8.0 * ASSUMED {
            return Some(learned);
        }
        Distribution::mixture(&[(count, learned), (ASSUMED, assumed)])
    }

    /// Point and quantiles of the maximum over the next `steps` steps.
    #[must_use]
    pub fn forecast(&self, steps: usize) -> Option<Forecast> {
        Some(self.distribution(steps)?.forecast(steps))
    }
}

fn base(bank: &Bank, steps: usize) -> Option<(f64, f64)> {
    Some((bank.forecast(steps)?.point, bank.usual_error(steps)))
}

/// Before anything is known: quantiles of the maximum of a few Laplace errors.
const ASSUMED_SCORES: [f64; 10] = [-0.5, 0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 1.9, 2.6, 4.0];

impl Outcomes {
    fn push(&mut self, score: f32) {
        if self.scores.len() < KEPT {
            self.scores.push(score);
        } else {
            self.scores[self.next] = score;
        }
        self.next = (self.next + 1) % KEPT;
    }
}
