//! What a bank says: points, quantiles between and beyond its tracked horizons, and what they are made of.

use super::{Bank, MODELS};
use crate::conformal::Basis;
use crate::forecast::{Forecast, LEVELS};

/// Where a number of steps lies among the tracked horizons.
#[derive(Clone, Copy, Debug)]
enum Between {
    /// At the horizon of this number or below it, at this share of the way from the one before.
    Known { above: usize, share: f64 },
    /// Further than the longest, so that quantiles are so many times as far from the point.
    Beyond { longest: usize, wider: f64 },
}

impl Bank {
    /// The forecast for `steps` ahead: exact at the configured horizons, by straight lines between them, and beyond the last
    /// with a spread that grows as a random walk's does. `None` before the first sample.
    #[must_use]
    pub fn forecast(&self, steps: usize) -> Option<Forecast> {
        let (last, point) = (self.last?, self.point(steps)?);
        let at = |index: usize| self.told(index).map(|value| f64::from(value.max(0.0)));
        let quantiles = match self.between(steps) {
            Between::Beyond { longest, wider } => at(longest).map(|value| (point + wider * (value - point)).max(0.0)),
            Between::Known { above, share } => {
                let before = above.checked_sub(1).map_or([last; LEVELS.len()], at);
                let after = at(above);
                std::array::from_fn(|i| before[i] + share * (after[i] - before[i]))
            }
        };
        Some(Forecast { steps, point, quantiles })
    }

    /// The point of [`Bank::forecast`] without its quantiles.
    pub(crate) fn point(&self, steps: usize) -> Option<f64> {
        let last = self.last?;
        let at = |index: usize| f64::from(self.tracks[index].point);
        Some(match self.between(steps) {
            Between::Beyond { longest, .. } => at(longest),
            Between::Known { above, share } => {
                let before = above.checked_sub(1).map_or(last, at);
                before + share * (at(above) - before)
            }
        })
    }

    /// Where `steps` ahead lies among the tracked horizons.
    fn between(&self, steps: usize) -> Between {
        let horizons = &self.config.horizons;
        let above = horizons.partition_point(|known| *known < steps);
        if above == horizons.len() {
            let longest = above - 1;
            return Between::Beyond { longest, wider: (steps as f64 / horizons[longest] as f64).sqrt() };
        }
        let from = above.checked_sub(1).map_or(0, |before| horizons[before]);
        Between::Known { above, share: (steps - from) as f64 / (horizons[above] - from) as f64 }
    }

    /// Quantiles at the tracked horizon `index`, made of what was known when its point was.
    pub(super) fn told(&self, index: usize) -> [f32; LEVELS.len()] {
        let (track, usual) = (&self.tracks[index], self.scales()[index]);
        let basis = Basis {
            point: track.point,
            last: self.last.unwrap_or(0.0) as f32,
            scales: [usual, track.fast(usual), self.step],
            levels: self.levels.values(),
        };
        // The cycle stands at the step after the newest sample.
        let phased =
            self.phased(index, self.config.horizons[index] as u32 - 1).and_then(|place| self.phases.get(place));
        track.conformal.quantiles(&basis, phased)
    }

    /// The usual absolute error `steps` ahead, at the tracked horizon nearest above or the last; 0 before the first sample.
    #[must_use]
    pub fn usual_error(&self, steps: usize) -> f64 {
        let index = self.config.horizons.partition_point(|known| *known < steps).min(self.tracks.len() - 1);
        f64::from(self.scales()[index])
    }

    /// The share of each of `MODEL_NAMES` in the forecast at the tracked horizon nearest to `steps`.
    #[must_use]
    pub fn weights(&self, steps: usize) -> [f64; MODELS] {
        let index = self.config.horizons.partition_point(|known| *known < steps).min(self.tracks.len() - 1);
        self.tracks[index].weights.map(f64::from)
    }

    /// Quantiles at the tracked horizon `index`.
    pub(crate) fn quantiles(&self, index: usize) -> Option<[f32; LEVELS.len()]> {
        (index < self.tracks.len()).then(|| self.told(index))
    }
}
