//! Watches whether probabilities still mean what they say, and falls back to a plain threshold when they do not.
//!
//! What was said of each window is compared with what came, in ten bins of probability with fading memory (expected calibration
//! error; Naeini, Cooper and Hauskrecht, AAAI 2015). A forecaster that is confident and wrong, after a change that it has not learned
//! yet, must not move machines about; a threshold on what is used now is late and never absurd.

use serde::{Deserialize, Serialize};

/// When calibration counts as broken.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuardConfig {
    /// Steps of the window that the probabilities are about.
    pub window: usize,
    /// A step weighs half after this many steps: 14 days of five minutes by default.
    pub half_life: f64,
    /// Mean distance of what was said and what came from which on calibration is broken,
    pub broken_above: f64,
    /// and below which it is mended.
    pub mended_below: f64,
    /// Windows without overlap that have to be over before anything is concluded.
    pub least_windows: f64,
    /// While it is broken, the score is 1 from this share of the limit on and 0 below.
    pub reactive: f64,
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self {
            window: 12,
            half_life: 14.0 * 288.0,
            broken_above: 0.15,
            mended_below: 0.08,
            least_windows: 20.0,
            reactive: 0.95,
        }
    }
}

/// The longest window in steps that is kept.
const LONGEST: usize = 100_000;

/// The score to act on, and whether it is the forecaster's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guarded {
    /// The score.
    pub score: f64,
    /// Whether it is that of a threshold, because calibration is broken.
    pub fallback: bool,
    /// Mean distance of what was said and what came; `None` while too few windows are over.
    pub calibration_error: Option<f64>,
    /// In words, if it is a fallback.
    pub reason: Option<String>,
}

/// Watches one pool. See the module's description.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    config: GuardConfig,
    /// What was said at each of the last `window` steps; negative = nothing.
    pending: Vec<f32>,
    place: usize,
    /// Steps since the limit was exceeded.
    since: usize,
    /// Sums of what was said, of what came, and of weights, by probability.
    bins: [[f64; 3]; 10],
    broken: bool,
}

impl Guard {
    /// One that has seen nothing. The window is kept within 1 and 100,000 steps.
    #[must_use]
    pub fn new(config: GuardConfig) -> Self {
        let window = config.window.clamp(1, LONGEST);
        let config = GuardConfig { window, ..config };
        Self { config, pending: vec![-1.0; window], place: 0, since: usize::MAX, bins: [[0.0; 3]; 10], broken: false }
    }

    /// Takes a step: the forecaster's `score`, its `probability` that the limit is exceeded within the window (NaN = none), and the
    /// share of the limit that is `used` now (NaN = not measured). Gives the score to act on.
    pub fn step(&mut self, score: f64, probability: f64, used: f64) -> Guarded {
        self.since = if used > 1.0 { 0 } else { self.since.saturating_add(1) };
        let said = f64::from(self.pending[self.place]);
        if said >= 0.0 {
            self.learn(said, self.since < self.config.window);
        }
        let sound = (0.0..=1.0).contains(&probability);
        self.pending[self.place] = if sound { probability as f32 } else { -1.0 };
        self.place = (self.place + 1) % self.config.window;
        let calibration_error = self.calibration_error();
        if let Some(error) = calibration_error {
            let limit = if self.broken { self.config.mended_below } else { self.config.broken_above };
            self.broken = error > limit;
        }
        if !self.broken || used.is_nan() {
            return Guarded { score, fallback: false, calibration_error, reason: None };
        }
        let reactive = f64::from(u8::from(used >= self.config.reactive));
        let reason = format!(
            "probabilities are off by {:.2} in the mean (more than {:.2}): acting on the threshold of {:.0} % until they are below {:.2}",
            calibration_error.unwrap_or(0.0),
            self.config.broken_above,
            100.0 * self.config.reactive,
            self.config.mended_below
        );
        Guarded { score: reactive, fallback: true, calibration_error, reason: Some(reason) }
    }

    fn learn(&mut self, said: f64, came: bool) {
        let keep = 0.5_f64.powf(1.0 / self.config.half_life.max(1.0));
        for bin in self.bins.iter_mut().flatten() {
            *bin *= keep;
        }
        let bin = &mut self.bins[((said * 10.0) as usize).min(9)];
        *bin = [bin[0] + said, bin[1] + f64::from(u8::from(came)), bin[2] + 1.0];
    }

    /// Mean distance of what was said and what came; `None` while too few windows are over.
    #[must_use]
    pub fn calibration_error(&self) -> Option<f64> {
        let weight: f64 = self.bins.iter().map(|bin| bin[2]).sum();
        if weight < self.config.least_windows * self.config.window as f64 {
            return None;
        }
        Some(self.bins.iter().map(|[said, came, _]| (said - came).abs()).sum::<f64>() / weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        Guard::new(GuardConfig { window: 5, half_life: 300.0, ..GuardConfig::default() })
    }

    #[test]
    fn honest_probabilities_stay_and_false_alarms_are_caught_and_forgiven() {
        let mut guard = guard();
        // One step in fifty exceeds: a window of five holds one with a probability of 0.1.
        for t in 0..1_000 {
            let said = guard.step(0.1, 0.1, if t % 50 == 0 { 1.2 } else { 0.5 });
            assert!(!said.fallback && said.score == 0.1, "{t}: {said:?}");
        }
        assert!(guard.calibration_error().is_some_and(|error| error < 0.05));
        // From now on it cries wolf.
        let mut fallback = None;
        for t in 0..600 {
            let said = guard.step(0.9, 0.9, 0.5);
            if said.fallback {
                assert_eq!(said.score, 0.0, "nothing is used that a threshold would mind");
                assert!(said.reason.is_some_and(|reason| reason.contains("threshold")));
                fallback = fallback.or(Some(t));
            }
        }
        assert!(fallback.is_some_and(|t| t < 200), "{fallback:?}");
        assert_eq!(guard.step(0.1, 0.9, 0.96).score, 1.0, "the threshold acts");
        let mended = (0..3_000).find(|_| !guard.step(0.0, 0.0, 0.5).fallback);
        assert!(mended.is_some(), "it is trusted again: {:?}", guard.calibration_error());
    }

    #[test]
    fn misses_break_it_too_and_nonsense_is_survived() {
        let mut guard = guard();
        let mut broken = false;
        for t in 0..400 {
            broken |= guard.step(0.0, 0.0, if t % 4 == 0 { 1.5 } else { 0.5 }).fallback;
        }
        assert!(broken, "nothing was said, and it came again and again");
        for value in [f64::NAN, f64::INFINITY, -1.0, 1e300] {
            let said = guard.step(value, value, value);
            assert!(said.fallback || said.score.to_bits() == value.to_bits(), "{said:?}");
        }
        assert!(Guard::new(GuardConfig { window: 0, ..GuardConfig::default() }).step(0.5, 0.5, 0.5).score > 0.4);
    }
}
