//! Exponentially weighted mean: for series that jump about a level.

use super::Model;
use serde::{Deserialize, Serialize};

/// Simple exponential smoothing (Brown 1956), started as the plain mean of the first samples so that the first one does not
/// weigh more than the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ewma {
    alpha: f64,
    /// Of nothing, while none was seen.
    level: f64,
    seen: u32,
}

impl Ewma {
    /// `alpha` in 0..=1 is the weight of the newest sample.
    #[must_use]
    pub fn new(alpha: f64) -> Self {
        Self { alpha: alpha.clamp(0.0, 1.0), level: 0.0, seen: 0 }
    }

    /// The mean so far.
    #[must_use]
    pub fn level(&self) -> Option<f64> {
        (self.seen > 0).then_some(self.level)
    }
}

impl Model for Ewma {
    const NAME: &'static str = "ewma";

    fn update(&mut self, value: Option<f64>) {
        let Some(value) = value else { return };
        let level = self.level().unwrap_or(value);
        self.seen = self.seen.saturating_add(1);
        let alpha = self.alpha.max(1.0 / f64::from(self.seen));
        self.level = level + alpha * (value - level);
    }

    fn forecast(&self, _horizons: &[usize], out: &mut [f32]) {
        if let Some(level) = self.level() {
            out.fill(level as f32);
        }
    }
}
