//! What it takes to be fitted: a history, a budget, and the trait of models that are.

use super::{Budget, CostClass, Model};

/// What a model is fitted to.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    /// Samples, oldest first.
    pub values: &'a [Option<f64>],
    /// Number of the first sample's step, counted alike always: phases of cycles are told by it.
    pub first: u64,
    /// First and last step, counted likewise, of times that are known to be different: one list for each regressor.
    pub events: &'a [Vec<(u64, u64)>],
}

impl<'a> History<'a> {
    /// See the fields.
    #[must_use]
    pub fn new(values: &'a [Option<f64>], first: u64, events: &'a [Vec<(u64, u64)>]) -> Self {
        Self { values, first, events }
    }

    /// From the first measured sample on, a gap bridged by the value before it; `None` if there is nothing.
    #[must_use]
    pub fn filled(&self) -> Option<Vec<f64>> {
        let mut last = self.values.iter().flatten().copied().next()?;
        let skipped = self.values.iter().position(Option::is_some)?;
        let bridge = |value: &Option<f64>| {
            last = value.unwrap_or(last);
            last
        };
        Some(self.values[skipped..].iter().map(bridge).collect())
    }
}

/// A model that has to be fitted.
pub trait Dear: Model {
    /// Where it may run.
    const COST: CostClass;

    /// Visits that a fit to `history` takes (see [`Budget`]).
    fn work(&self, history: &History<'_>) -> u64;

    /// Fits it to `history`, after which it stands at its newest sample. Keeps the old fit and returns false if the budget or the
    /// history is too short.
    fn fit(&mut self, history: &History<'_>, budget: &mut Budget) -> bool;

    /// Bytes that it takes.
    fn state_bytes(&self) -> usize;
}

#[cfg(test)]
pub(crate) mod test {
    use super::*;

    /// Between -1 and 1.
    pub(crate) fn noise(state: &mut u64) -> f64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 40) as f64 / (1_u64 << 23) as f64 - 1.0
    }

    /// Fitted once to the first `until` samples: mean absolute error after that, `steps` ahead, over that of naive.
    pub(crate) fn error_over_naive<D: Dear>(mut model: D, series: &[Option<f64>], until: usize, steps: usize) -> f64 {
        let history = History::new(&series[..until], 0, &[]);
        assert!(!model.fit(&history, &mut Budget::new(10)), "ten visits are not enough");
        assert!(model.fit(&history, &mut Budget::unlimited()), "{} could not be fitted", D::NAME);
        let (mut error, mut naive, mut last) = (0.0, 0.0, 0.0);
        for t in until..series.len() {
            model.update(series[t]);
            last = series[t].unwrap_or(last);
            let Some(outcome) = series.get(t + steps).copied().flatten() else { continue };
            let mut out = [f32::NAN];
            model.forecast(&[steps], &mut out);
            error += (outcome - f64::from(out[0])).abs();
            naive += (outcome - last).abs();
        }
        assert!(model.state_bytes() > 0);
        error / naive
    }
}
