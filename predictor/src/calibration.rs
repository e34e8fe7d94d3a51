//! Probabilities that mean what they say: what was said is compared with what came, and corrected.
//!
//! A logistic regression from the raw probability and what else is known (whether the limit was exceeded lately, and a cycle ago) to
//! the outcome, learned online as an extended Kalman filter (Penny and Roberts, *Dynamic logistic regression*, IJCNN 1999). It
//! starts as the identity and leaves it only as far as outcomes show. This is Platt's scaling (1999) with a memory that fades.

use serde::{Deserialize, Serialize};

/// Number of features: constant, logit, quiet, logit if quiet, exceeded a cycle ago, the same if quiet.
pub(crate) const FEATURES: usize = 6;

/// The correction that holds now for one window: log-odds are multiplied and shifted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Correction {
    /// Factor of the log-odds; above 0, so that order is kept.
    pub slope: f64,
    /// What is added to them.
    pub shift: f64,
}

impl Correction {
    /// No correction.
    pub const NONE: Self = Self { slope: 1.0, shift: 0.0 };

    /// The corrected probability.
    #[must_use]
    pub fn apply(&self, probability: f64) -> f64 {
        if probability <= 0.0 || self == &Self::NONE {
            return probability.clamp(0.0, 1.0);
        }
        logistic(self.slope * logit(probability) + self.shift)
    }
}

/// What is known beside the raw probability.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Circumstances {
    /// Not above the limit for as long as the longest window.
    pub quiet: bool,
    /// Above the limit within the same window a cycle ago.
    pub a_cycle_ago: bool,
}

pub(crate) fn features(probability: f64, known: Circumstances) -> [f32; FEATURES] {
    let z = logit(probability) as f32;
    let quiet = if known.quiet { 1.0 } else { 0.0 };
    let ago = if known.a_cycle_ago { 1.0 } else { 0.0 };
    [1.0, z, quiet, quiet * z, ago, quiet * ago]
}

pub(crate) fn logit(probability: f64) -> f64 {
    let p = probability.clamp(1e-4, 1.0 - 1e-4);
    (p / (1.0 - p)).ln()
}

fn logistic(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// Learns the correction for one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Calibration {
    weights: [f64; FEATURES],
    covariance: [[f64; FEATURES]; FEATURES],
    /// How much one outcome counts: windows overlap.
    share: f64,
}

/// Variance of the weights before anything is known.
const START: f64 = 0.1;
/// What fades of the past with each outcome.
const FORGET: f64 = 2e-5;

impl Calibration {
    pub(crate) fn new(window_steps: usize) -> Self {
        let mut covariance = [[0.0; FEATURES]; FEATURES];
        for (i, row) in covariance.iter_mut().enumerate() {
            row[i] = START;
        }
        Self { weights: [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], covariance, share: 1.0 / window_steps.max(1) as f64 }
    }

    pub(crate) fn learn(&mut self, x: &[f32], happened: bool) {
        let x: [f64; FEATURES] = std::array::from_fn(|i| x.get(i).map_or(0.0, |x| f64::from(*x)));
        let z: f64 = x.iter().zip(self.weights).map(|(x, weight)| x * weight).sum();
        if !z.is_finite() {
            return;
        }
        let p = logistic(z);
        let px: [f64; FEATURES] = std::array::from_fn(|i| self.covariance[i].iter().zip(x).map(|(c, x)| c * x).sum());
        let curvature = (p * (1.0 - p)).max(1e-4) * self.share;
        let gain = 1.0 / (1.0 + curvature * px.iter().zip(x).map(|(px, x)| px * x).sum::<f64>());
        for i in 0..FEATURES {
            for j in 0..FEATURES {
                self.covariance[i][j] -= curvature * gain * px[i] * px[j];
            }
            self.covariance[i][i] += FORGET * self.share;
        }
        let error = (f64::from(u8::from(happened)) - p) * self.share;
        for (weight, px) in self.weights.iter_mut().zip(px) {
            *weight += px * gain * error;
        }
    }

    pub(crate) fn correction(&self, known: Circumstances) -> Correction {
        let quiet = f64::from(u8::from(known.quiet));
        let ago = f64::from(u8::from(known.a_cycle_ago));
        let [constant, slope, on_quiet, slope_quiet, on_ago, on_both] = self.weights;
        Correction {
            slope: (slope + quiet * slope_quiet).clamp(0.2, 5.0),
            shift: constant + quiet * on_quiet + ago * on_ago + quiet * ago * on_both,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_as_the_identity_and_learns_that_too_much_is_promised() {
        let mut calibration = Calibration::new(1);
        let known = Circumstances { quiet: true, a_cycle_ago: false };
        for p in [0.01, 0.3, 0.9] {
            assert!((calibration.correction(known).apply(p) - p).abs() < 1e-9);
        }
        // Says 0.5 where one in five comes, and 0.1 where one in fifty comes.
        for i in 0..4_000 {
            let (p, every) = if i % 2 == 0 { (0.5, 5) } else { (0.1, 50) };
            calibration.learn(&features(p, known), (i / 2) % every == 0);
        }
        let correction = calibration.correction(known);
        assert!((correction.apply(0.5) - 0.2).abs() < 0.03, "{}", correction.apply(0.5));
        assert!((correction.apply(0.1) - 0.02).abs() < 0.015, "{}", correction.apply(0.1));
        assert_eq!(correction.apply(0.0), 0.0);
    }

    #[test]
    fn order_is_kept_and_nonsense_is_survived() {
        let mut calibration = Calibration::new(12);
        let known = Circumstances::default();
        for i in 0..5_000 {
            calibration.learn(&features(f64::from(i % 100) / 100.0, known), i % 100 < 20);
        }
        calibration.learn(&[f32::NAN; FEATURES], true);
        let correction = calibration.correction(known);
        assert!(correction.apply(0.9) > correction.apply(0.1));
        assert!((0.0..=1.0).contains(&correction.apply(1.0)));
    }
}
