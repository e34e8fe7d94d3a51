//! Level and damped trend: sees a ramp coming.

use super::Model;
use serde::{Deserialize, Serialize};

/// Holt's linear method with a damped trend (Gardner and McKenzie, *Management Science* 31, 1985):
/// level + (phi + phi^2 + ... + phi^h) trend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Holt {
    alpha: f64,
    beta: f64,
    phi: f64,
    level: f64,
    trend: f64,
    seen: u32,
    /// Samples missed since the last one.
    missed: u32,
}

impl Holt {
    /// Smoothing of the level (`alpha`) and of the trend (`beta`), and the damping `phi` a step, all in 0..=1.
    #[must_use]
    pub fn new(alpha: f64, beta: f64, phi: f64) -> Self {
        let unit = |x: f64| x.clamp(0.0, 1.0);
        Self { alpha: unit(alpha), beta: unit(beta), phi: unit(phi), level: 0.0, trend: 0.0, seen: 0, missed: 0 }
    }

    /// phi + phi^2 + ... + phi^h
    fn damped(&self, steps: u32) -> f64 {
        if self.phi >= 1.0 {
            f64::from(steps)
        } else {
            self.phi * (1.0 - self.phi.powi(steps.min(1 << 30) as i32)) / (1.0 - self.phi)
        }
    }
}

impl Model for Holt {
    const NAME: &'static str = "holt";

    fn update(&mut self, value: Option<f64>) {
        let Some(value) = value else {
            self.missed = self.missed.saturating_add(1);
            return;
        };
        let steps = self.missed.saturating_add(1);
        self.missed = 0;
        self.seen = self.seen.saturating_add(1);
        if self.seen == 1 {
            self.level = value;
            return;
        }
        let expected = self.level + self.damped(steps) * self.trend;
        // The first samples weigh as in a plain mean: a short history must not be ruled by where it started.
        let warm = 2.0 / f64::from(self.seen + 1);
        let alpha = self.alpha.max(warm);
        let beta = self.beta.max(warm.min(0.5));
        let level = expected + alpha * (value - expected);
        let slope = (level - self.level) / f64::from(steps);
        self.trend = self.phi * self.trend + beta * (slope - self.phi * self.trend);
        self.level = level;
    }

    fn forecast(&self, horizons: &[usize], out: &mut [f32]) {
        if self.seen < 2 {
            return;
        }
        for (steps, out) in horizons.iter().zip(out) {
            let steps = u32::try_from(*steps).unwrap_or(u32::MAX).saturating_add(self.missed);
            *out = (self.level + self.damped(steps) * self.trend) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_a_ramp_and_bridges_a_gap() {
        let mut holt = Holt::new(0.5, 0.2, 1.0);
        for t in 0..60 {
            holt.update((t % 7 != 3).then_some(10.0 + 2.0 * f64::from(t)));
        }
        let mut out = [f32::NAN; 2];
        holt.forecast(&[1, 10], &mut out);
        // t = 59 was the last: 10 + 2 * 60 and 10 + 2 * 69.
        assert!((out[0] - 130.0).abs() < 1.0, "{out:?}");
        assert!((out[1] - 148.0).abs() < 2.0, "{out:?}");
    }

    #[test]
    fn damping_bounds_what_a_trend_may_add() {
        let mut holt = Holt::new(0.5, 0.2, 0.9);
        for t in 0..60 {
            holt.update(Some(f64::from(t)));
        }
        let mut out = [0.0; 1];
        holt.forecast(&[100_000], &mut out);
        assert!(f64::from(out[0]) < 59.0 + 9.1, "{out:?}");
    }
}
