//! How high a series will go within a window: the maximum over it, not the value at its end.

use crate::bank::Bank;
use crate::forecast::Distribution;
use crate::window::gaps;
use serde::{Deserialize, Serialize};

/// Outcomes kept for each window.
const KEPT: usize = 2_048;
/// Outcomes that outweigh what is assumed before there are any.
const ASSUMED: f64 = 6.0;

/// Learns the distribution of (maximum over the window - forecast) in usual errors, and applies it to the present forecast.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Maxima {
    windows: Vec<Outlook>,
    /// Newest values, as long as the longest window; missing ones are NaN.
    #[serde(with = "gaps")]
    recent: Vec<f32>,
    clock: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Outlook {
    steps: usize,
    /// (maximum - forecast) / usual error, newest outcomes, as a ring.
    scores: Vec<f32>,
    next: usize,
    /// Forecast and usual error noted at each of the last `steps` steps.
    #[serde(with = "gaps")]
    pending: Vec<f32>,
}

impl Maxima {
    /// For windows of these lengths in steps (at least one, all above 0).
    #[must_use]
    pub fn new(windows: &[usize]) -> Self {
        let longest = windows.iter().copied().max().unwrap_or(1).max(1);
        let windows = windows
            .iter()
            .map(|steps| {
                let steps = (*steps).max(1);
                Outlook { steps, scores: Vec::new(), next: 0, pending: vec![f32::NAN; 2 * steps] }
            })
            .collect();
        Self { windows, recent: vec![f32::NAN; longest], clock: 0 }
    }

    /// Takes the sample that `bank` was just updated with.
    pub fn update(&mut self, value: Option<f64>, bank: &Bank) {
        let length = self.recent.len();
        self.recent[(self.clock % length as u64) as usize] = value.map_or(f32::NAN, |value| value as f32);
        for index in 0..self.windows.len() {
            let steps = self.windows[index].steps;
            let seen =
                (0..steps).map(|age| self.recent[((self.clock + (length - age) as u64) % length as u64) as usize]);
            let highest = seen.fold(f32::NAN, f32::max);
            let slot = (self.clock % steps as u64) as usize * 2;
            let noted = (self.windows[index].pending[slot], self.windows[index].pending[slot + 1]);
            // A window that ends in a gap is not scored: its maximum may have been in the gap.
            if value.is_some() && highest.is_finite() && noted.0.is_finite() && noted.1 > 0.0 {
                self.windows[index].push((highest - noted.0) / noted.1);
            }
            let now = Self::base(bank, steps).unwrap_or((f64::NAN, f64::NAN));
            self.windows[index].pending[slot] = now.0 as f32;
            self.windows[index].pending[slot + 1] = now.1 as f32;
        }
        self.clock += 1;
    }

    /// The highest point forecast within the window, and the usual error at its end.
    fn base(bank: &Bank, steps: usize) -> Option<(f64, f64)> {
        let end = bank.forecast(steps)?;
        let within = bank.config().horizons.iter().filter(|known| **known < steps);
        let highest =
            within.filter_map(|known| bank.forecast(*known)).map(|forecast| forecast.point).fold(end.point, f64::max);
        Some((highest, bank.usual_error(steps)))
    }

    /// The distribution of the maximum over the next `steps` steps (the window asked for when this was made that is nearest
    /// above, or the longest). `None` before the first sample.
    #[must_use]
    pub fn distribution(&self, steps: usize, bank: &Bank) -> Option<Distribution> {
        let outlook = self.windows.iter().find(|outlook| outlook.steps >= steps).or(self.windows.last())?;
        let (base, scale) = Self::base(bank, outlook.steps)?;
        let learned = (!outlook.scores.is_empty())
            .then(|| outlook.scores.iter().map(|score| base + scale * f64::from(*score)).collect())
            .and_then(Distribution::from_values);
        let assumed = Distribution::from_values(ASSUMED_SCORES.iter().map(|score| base + scale * score).collect())?;
        let count = outlook.scores.len() as f64 / (outlook.steps as f64).sqrt();
        match learned {
            Some(learned) if count >= 8.0 * ASSUMED => Some(learned),
            Some(learned) => Distribution::mixture(&[(count, learned), (ASSUMED, assumed)]),
            None => Some(assumed),
        }
    }
}

/// Before anything is known: quantiles of the maximum of a few Laplace errors.
const ASSUMED_SCORES: [f64; 10] = [-0.5, 0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 1.9, 2.6, 4.0];

impl Outlook {
    fn push(&mut self, score: f32) {
        if self.scores.len() < KEPT {
            self.scores.push(score);
        } else {
            self.scores[self.next] = score;
        }
        self.next = (self.next + 1) % KEPT;
    }
}
