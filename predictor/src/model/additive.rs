//! Trend, seasons and events that add up.
//!
//! The model of Taylor and Letham (*Forecasting at scale*, The American Statistician 72, 2018; Prophet): a trend of straight pieces,
//! Fourier terms for each cycle, and one regressor for each kind of event, here fitted at once by smartcore's ridge regression. What is
//! left over at the newest sample fades as an autoregression of first order.

use super::fit::{Dear, History};
use super::{Budget, CostClass, Model};
use serde::{Deserialize, Serialize};
use smartcore::linalg::basic::arrays::Array;
use smartcore::linalg::basic::matrix::DenseMatrix;
use smartcore::linear::ridge_regression::{RidgeRegression, RidgeRegressionParameters, RidgeRegressionSolverName};

/// Places where the slope of the trend may change, in the first four fifths of the history.
const BENDS: usize = 8;
/// Sines and cosines of each cycle.
const ORDER: usize = 5;
/// Rows at most: longer histories are thinned.
const ROWS: usize = 3_000;
/// The most kinds of events.
const KINDS: usize = 16;
/// The most times of one kind.
const TIMES: usize = 512;

/// A fitted sum of parts and where it stands.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Additive {
    cycles: Vec<usize>,
    weights: Vec<f64>,
    /// First step and length of the history that it was fitted to.
    first: u64,
    length: f64,
    events: Vec<Vec<(u64, u64)>>,
    /// What is left of the rest a step later.
    fading: f64,
    /// What was left over at the newest sample, faded since.
    rest: f64,
    /// Number of the newest step.
    now: u64,
    fitted: bool,
}

impl Additive {
    /// For cycles of these numbers of steps.
    #[must_use]
    pub fn new(cycles: &[usize]) -> Self {
        Self { cycles: cycles.to_vec(), ..Self::default() }
    }

    /// What a kind of event adds, in the order of the history's.
    #[must_use]
    pub fn event_effect(&self, kind: usize) -> Option<f64> {
        let before = 2 + BENDS + 2 * ORDER * self.cycles.len();
        if kind < self.events.len() { self.weights.as_slice().get(before + kind).copied() } else { None }
    }

    fn row(&self, step: u64) -> Vec<f64> {
        // A trend does not go on for longer than a tenth of what it was seen for.
        let time = ((step as f64 - self.first as f64) / self.length).min(1.1);
        let mut row = vec![1.0, time];
        row.extend((0..BENDS).map(|bend| (time - 0.8 * (bend + 1) as f64 / BENDS as f64).max(0.0)));
        for cycle in &self.cycles {
            let turn = (step % (*cycle).max(1) as u64) as f64 / (*cycle).max(1) as f64 * std::f64::consts::TAU;
            row.extend((1..=ORDER).flat_map(|k| [(k as f64 * turn).sin(), (k as f64 * turn).cos()]));
        }
        let during = |times: &Vec<(u64, u64)>| times.iter().any(|(from, to)| (*from..=*to).contains(&step));
        row.extend(self.events.iter().map(|times| f64::from(u8::from(during(times)))));
        row
    }

    fn expected(&self, step: u64) -> f64 {
        self.row(step).iter().zip(&self.weights).map(|(x, weight)| x * weight).sum::<f64>()
    }

    fn columns(&self) -> usize {
        2 + BENDS + 2 * ORDER * self.cycles.len() + self.events.len()
    }
}

impl Model for Additive {
    const NAME: &'static str = "additive";

    fn update(&mut self, value: Option<f64>) {
        if self.fitted {
            self.now += 1;
            self.rest = value.map_or(self.rest * self.fading, |value| value - self.expected(self.now));
        }
    }

    fn forecast(&self, horizons: &[usize], out: &mut [f32]) {
        if self.fitted {
            for (steps, out) in horizons.iter().zip(out) {
                let rest = self.rest * self.fading.powi((*steps).min(1 << 20) as i32);
                *out = (self.expected(self.now + *steps as u64) + rest) as f32;
            }
        }
    }
}

impl Dear for Additive {
    const COST: CostClass = CostClass::Moderate;

    fn work(&self, history: &History<'_>) -> u64 {
        let columns = (2 + BENDS + 2 * ORDER * self.cycles.len() + history.events.len().min(KINDS)) as u64;
        let rows = history.values.len().min(ROWS) as u64;
        rows * columns * (columns + 20) + columns * columns * columns + 20 * history.values.len() as u64 * columns
    }

    fn fit(&mut self, history: &History<'_>, budget: &mut Budget) -> bool {
        let measured: Vec<(u64, f64)> = history
            .values
            .iter()
            .enumerate()
            .filter_map(|(t, value)| Some((history.first + t as u64, (*value)?)))
            .collect();
        if measured.len() < 4 * (2 + BENDS) || !budget.spend(self.work(history)) {
            return false;
        }
        let times = |times: &Vec<(u64, u64)>| times.iter().rev().take(TIMES).copied().collect();
        let mut model = Self {
            cycles: self.cycles.clone(),
            first: history.first,
            length: history.values.len() as f64,
            events: history.events.iter().take(KINDS).map(times).collect(),
            ..Self::default()
        };
        let every = measured.len().div_ceil(ROWS);
        // Seven divides no cycle: a thinned history still has all phases.
        let every = if every > 1 { every.next_multiple_of(7) } else { 1 };
        let kept: Vec<(u64, f64)> = measured.iter().step_by(every).copied().collect();
        if kept.len() <= model.columns() {
            return false;
        }
        let rows: Vec<Vec<f64>> = kept.iter().map(|(step, _)| model.row(*step)).collect();
        let targets: Vec<f64> = kept.iter().map(|(_, value)| *value).collect();
        let Ok(matrix) = DenseMatrix::from_2d_vec(&rows) else { return false };
        let parameters =
            RidgeRegressionParameters { solver: RidgeRegressionSolverName::Cholesky, alpha: 0.05, normalize: false };
        let Ok(fitted) = RidgeRegression::fit(&matrix, &targets, parameters) else { return false };
        let coefficients: &DenseMatrix<f64> = fitted.coefficients();
        model.weights = (0..model.columns()).map(|column| *coefficients.get((column, 0))).collect();
        if !model.weights.iter().all(|weight| weight.is_finite()) {
            return false;
        }
        let rests: Vec<(u64, f64)> =
            measured.iter().map(|(step, value)| (*step, value - model.expected(*step))).collect();
        let pairs = || rests.windows(2).filter(|pair| pair[1].0 == pair[0].0 + 1);
        let products: f64 = pairs().map(|pair| pair[0].1 * pair[1].1).sum();
        let squares: f64 = pairs().map(|pair| pair[0].1 * pair[0].1).sum();
        model.fading = if squares > 0.0 { (products / squares).clamp(0.0, 0.999) } else { 0.0 };
        let Some((step, rest)) = rests.last().copied() else { return false };
        model.now = history.first + history.values.len() as u64 - 1;
        model.rest = rest * model.fading.powi((model.now - step).min(1 << 20) as i32);
        model.fitted = true;
        *self = model;
        true
    }

    fn state_bytes(&self) -> usize {
        let events: usize = self.events.iter().map(|times| size_of::<Vec<u64>>() + 16 * times.len()).sum();
        size_of::<Self>() + 8 * (self.weights.len() + self.cycles.len()) + events
    }
}

#[cfg(test)]
mod tests {
    use super::super::fit::test::{error_over_naive, noise};
    use super::*;

    fn series(steps: u32, events: &[(u64, u64)]) -> Vec<Option<f64>> {
        let mut state = 11;
        (0..steps)
            .map(|t| {
                let season = 15.0 * (f64::from(t % 96) * std::f64::consts::TAU / 96.0).cos();
                let trend = 0.01 * f64::from(t) + 0.03 * f64::from(t.saturating_sub(600));
                let event =
                    if events.iter().any(|(from, to)| (*from..=*to).contains(&u64::from(t))) { 30.0 } else { 0.0 };
                (t % 40 != 3).then(|| 100.0 + season + trend + event + noise(&mut state))
            })
            .collect()
    }

    #[test]
    fn trend_with_a_bend_and_season_go_on() {
        assert!(error_over_naive(Additive::new(&[96]), &series(1_600, &[]), 1_400, 12) < 0.2);
    }

    #[test]
    fn an_event_that_is_known_is_forecast_before_it_starts() {
        let times: Vec<(u64, u64)> = (0..14).map(|i| (60 + 97 * i, 75 + 97 * i)).collect();
        let series = series(1_500, &times);
        // The last one lies ahead: it starts at 60 + 97 * 13 = 1321.
        let mut model = Additive::new(&[96]);
        assert!(model.fit(&History::new(&series[..1_310], 0, &[times]), &mut Budget::unlimited()));
        assert!((model.event_effect(0).expect("one kind") - 30.0).abs() < 2.0, "{model:?}");
        assert!(model.event_effect(1).is_none());
        let mut out = [f32::NAN; 2];
        model.forecast(&[8, 18], &mut out);
        let truth = [8, 18].map(|ahead| series[1_309 + ahead].expect("measured") as f32);
        assert!((out[0] - truth[0]).abs() < 4.0 && (out[1] - truth[1]).abs() < 4.0, "{out:?} {truth:?}");
        assert!(out[1] > out[0] + 20.0);
    }
}
