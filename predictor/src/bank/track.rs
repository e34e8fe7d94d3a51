//! What a bank keeps of one horizon: how its models do there, and what was said and waits for its outcome.

use super::{BankConfig, MODELS};
use crate::conformal::{Basis, Conformal, Phased};
use crate::forecast::LEVELS;
use serde::{Deserialize, Serialize};

/// Models that say the same for every horizon come first: naive and the means.
pub(super) const FLAT: usize = 3;
/// Numbers kept of each step for each horizon: the models that tell horizons apart, point, usual errors.
pub(super) const SLOT: usize = MODELS - FLAT + 3;
/// Numbers kept of each step for all horizons: the flat models, the usual step, the series' own quantiles.
pub(super) const COMMON: usize = FLAT + 1 + LEVELS.len();

/// What is kept for one horizon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Track {
    /// Usual absolute error of each model.
    pub(super) losses: [f32; MODELS],
    pub(super) seen: u32,
    pub(super) conformal: Conformal,
    /// How much each model counts now.
    pub(super) weights: [f32; MODELS],
    /// What is forecast now. Its quantiles are made when somebody asks: nothing that they are made of changes before the next sample.
    pub(super) point: f32,
}

impl Track {
    /// With naive alone trusted.
    pub(super) fn new() -> Self {
        Self {
            losses: [0.0; MODELS],
            seen: 0,
            conformal: Conformal::new(),
            weights: std::array::from_fn(|model| if model == 0 { 1.0 } else { 0.0 }),
            point: 0.0,
        }
    }

    /// Usual error in fast memory, once there are some.
    pub(super) fn fast(&self, usual: f32) -> f32 {
        if self.conformal.seen < 10 { usual } else { self.conformal.errors[1] }
    }

    /// Scores what was said `steps` ago: for all horizons, and for this one.
    pub(super) fn learn(
        &mut self,
        outcome: f32,
        common: &[f32],
        noted: &[f32],
        decay: f32,
        phased: Option<&mut Phased>,
        config: &BankConfig,
    ) {
        if noted[0].is_nan() || common[0].is_nan() || outcome.is_nan() {
            return;
        }
        self.seen = self.seen.saturating_add(1);
        let rate = (1.0 - decay).max(1.0 / self.seen as f32);
        let said = common[..FLAT].iter().chain(&noted[..MODELS - FLAT]);
        for (loss, said) in self.losses.iter_mut().zip(said) {
            *loss += ((said - outcome).abs() - *loss) * rate;
        }
        let [point, usual, fast] = [0, 1, 2].map(|i| noted[MODELS - FLAT + i]);
        let mut levels = [0.0; LEVELS.len()];
        levels.copy_from_slice(&common[FLAT + 1..]);
        // The first flat model is the last value itself.
        let scales = [usual, fast, common[FLAT]];
        let basis = Basis { point, last: common[0], scales, levels };
        self.conformal.learn(outcome, &basis, &config.rates, phased);
        self.weigh(config.sharpness);
    }

    /// How much each model counts: by how much better it was than naive, and not at all if it was worse.
    fn weigh(&mut self, sharpness: i32) {
        let naive = self.losses[0];
        // Without a loss to compare with, or with one so small that a millionth of it is nothing, all stays as it was.
        if naive.is_nan() || naive <= 1e-30 {
            return;
        }
        // Relative to the best model and not to naive: the power of a large ratio would overflow.
        let floor = 1e-6 * naive;
        let best = self.losses.iter().fold(naive, |best, loss| best.min(*loss)).max(floor);
        let better = powers(self.losses.map(|loss| best / loss.max(floor)), sharpness);
        let mut total = 0.0;
        for ((weight, loss), better) in self.weights.iter_mut().zip(self.losses).zip(better) {
            *weight = if loss <= naive { better } else { 0.0 };
            total += *weight;
        }
        for weight in &mut self.weights {
            *weight /= total;
        }
    }
}

/// Each base to that power by repeated squaring, in the order in which `powi` multiplies, which is a call for each.
#[inline]
fn powers(mut bases: [f32; MODELS], exponent: i32) -> [f32; MODELS] {
    let (mut left, mut products) = (exponent.unsigned_abs(), [1.0; MODELS]);
    loop {
        if left & 1 == 1 {
            products.iter_mut().zip(bases).for_each(|(product, base)| *product *= base);
        }
        left >>= 1;
        if left == 0 {
            break;
        }
        bases.iter_mut().for_each(|base| *base *= *base);
    }
    if exponent < 0 { products.map(|product| 1.0 / product) } else { products }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_those_of_the_standard_library() {
        let bases = [0.5, 1.0, 0.999_9, 1e-6, 0.123_456];
        for exponent in [1, 2, 7, 16, 24, -3] {
            for (power, base) in powers(bases, exponent).iter().zip(bases) {
                let expected = base.powi(exponent);
                assert!((power - expected).abs() <= 1e-5 * expected, "{base} to the {exponent}: {power}, {expected}");
            }
        }
    }
}
