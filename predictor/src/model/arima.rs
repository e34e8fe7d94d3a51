//! ARIMA with orders chosen by AICc.
//!
//! Box and Jenkins (*Time Series Analysis*, 1970); parameters by the two regressions of Hannan and Rissanen (*Biometrika* 69, 1982): a long
//! autoregression gives the innovations, which are then regressors beside the lags. Orders up to (3, 1, 2) by AICc, as Hyndman and
//! Khandakar do (*Journal of Statistical Software* 27, 2008), here over all of them instead of step by step.

use super::fit::{Dear, History};
use super::squares::least_squares;
use super::{Budget, CostClass, Model};
use serde::{Deserialize, Serialize};

/// The highest orders of the autoregressive and of the moving average part.
const HIGHEST: [usize; 2] = [3, 2];
/// Lags of the long autoregression.
const LONG: usize = 12;

/// A fitted model and its state after the newest sample.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Arima {
    constant: f64,
    lags: Vec<f64>,
    errors: Vec<f64>,
    differenced: bool,
    last: Option<f64>,
    /// Newest (differenced) values and innovations first, as many as there are coefficients.
    values: Vec<f64>,
    innovations: Vec<f64>,
    fitted: bool,
}

impl Arima {
    /// Orders p, d, q of the fitted model.
    #[must_use]
    pub fn orders(&self) -> [usize; 3] {
        [self.lags.len(), usize::from(self.differenced), self.errors.len()]
    }

    fn expected(&self, values: &[f64], innovations: &[f64]) -> f64 {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        self.constant + dot(&self.lags, values) + dot(&self.errors, innovations)
    }

    /// The parameters of one order, and the criterion.
    fn candidate(series: &[f64], residuals: &[f64], orders: [usize; 2], differenced: bool) -> Option<(f64, Self)> {
        let [p, q] = orders;
        let from = LONG + HIGHEST[0].max(HIGHEST[1]);
        let rows = || {
            (from..series.len()).map(move |t| {
                let lags = (1..=p).map(move |lag| series[t - lag]);
                let errors = (1..=q).map(move |lag| residuals[t - lag]);
                (std::iter::once(1.0).chain(lags).chain(errors), series[t])
            })
        };
        let (weights, error) = least_squares(rows(), 1 + p + q, 1e-9)?;
        let count = (series.len() - from) as f64;
        let parameters = (2 + p + q) as f64;
        let criterion =
            count * (error / count).max(1e-300).ln() + 2.0 * parameters * count / (count - parameters - 1.0).max(1.0);
        let (lags, errors) = (weights[1..=p].to_vec(), weights[1 + p..].to_vec());
        // What explodes or cannot be inverted is no model of use here.
        let sound = lags.iter().sum::<f64>() < 0.9999 && errors.iter().map(|x| x.abs()).sum::<f64>() < 0.99;
        let (values, innovations) = (vec![0.0; p], vec![0.0; q]);
        let model =
            Self { constant: weights[0], lags, errors, differenced, last: None, values, innovations, fitted: true };
        sound.then_some((criterion, model))
    }

    /// Innovations of a long autoregression.
    fn residuals(series: &[f64]) -> Option<Vec<f64>> {
        let lags = move |t: usize| std::iter::once(1.0).chain((1..=LONG).map(move |lag| series[t - lag]));
        let rows = (LONG..series.len()).map(|t| (lags(t), series[t]));
        let (weights, _) = least_squares(rows, 1 + LONG, 1e-6)?;
        let said = |t: usize| lags(t).zip(&weights).map(|(x, weight)| x * weight).sum::<f64>();
        Some((0..series.len()).map(|t| if t < LONG { 0.0 } else { series[t] - said(t) }).collect())
    }

    fn step(&mut self, value: f64) {
        let known = match (self.differenced, self.last) {
            (true, None) => None,
            (true, Some(last)) => Some(value - last),
            (false, _) => Some(value),
        };
        self.last = Some(value);
        let Some(known) = known else { return };
        let innovation = known - self.expected(&self.values, &self.innovations);
        push(&mut self.values, known);
        push(&mut self.innovations, innovation);
    }
}

fn push(newest_first: &mut [f64], value: f64) {
    if let Some(last) = newest_first.len().checked_sub(1) {
        newest_first.copy_within(..last, 1);
        newest_first[0] = value;
    }
}

impl Model for Arima {
    const NAME: &'static str = "arima";

    fn update(&mut self, value: Option<f64>) {
        if !self.fitted {
            return;
        }
        // A missing sample is taken for what was expected.
        let mut next = [f32::NAN];
        self.forecast(&[1], &mut next);
        if let Some(value) = value.or(Some(f64::from(next[0])).filter(|value| value.is_finite())) {
            self.step(value);
        }
    }

    fn forecast(&self, horizons: &[usize], out: &mut [f32]) {
        let (Some(last), true) = (self.last, self.fitted) else { return };
        let (mut values, mut innovations) = (self.values.clone(), self.innovations.clone());
        let (mut level, mut done) = (last, 0);
        for (steps, out) in horizons.iter().zip(out) {
            let mut value = level;
            while done < (*steps).min(100_000) {
                let expected = self.expected(&values, &innovations);
                push(&mut values, expected);
                push(&mut innovations, 0.0);
                value = if self.differenced { level + expected } else { expected };
                level = value;
                done += 1;
            }
            *out = value as f32;
        }
    }
}

impl Dear for Arima {
    const COST: CostClass = CostClass::Moderate;

    fn work(&self, history: &History<'_>) -> u64 {
        2 * (200 + 12 * 40) * history.values.len() as u64
    }

    fn fit(&mut self, history: &History<'_>, budget: &mut Budget) -> bool {
        let Some(values) = history.filled().filter(|values| values.len() >= 5 * LONG) else { return false };
        if !budget.spend(self.work(history)) {
            return false;
        }
        let changes: Vec<f64> = values.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mut chosen: Option<(f64, Self)> = None;
        for (series, differenced) in [(&values[1..], false), (&changes[..], true)] {
            let Some(residuals) = Self::residuals(series) else { continue };
            for p in 0..=HIGHEST[0] {
                for q in 0..=HIGHEST[1] {
                    let Some(found) = Self::candidate(series, &residuals, [p, q], differenced) else { continue };
                    if chosen.as_ref().is_none_or(|(best, _)| found.0 < *best) {
                        chosen = Some(found);
                    }
                }
            }
        }
        let Some((_, mut model)) = chosen else { return false };
        values.iter().for_each(|value| model.step(*value));
        *self = model;
        true
    }

    fn state_bytes(&self) -> usize {
        size_of::<Self>() + 16 * (self.lags.len() + self.errors.len())
    }
}

#[cfg(test)]
mod tests {
    use super::super::fit::test::{error_over_naive, noise};
    use super::*;

    #[test]
    fn a_known_process_is_recovered() {
        let (mut state, mut before, mut last) = (5, [0.0; 2], 0.0);
        let series: Vec<Option<f64>> = (0..4_000)
            .map(|_| {
                let innovation = noise(&mut state);
                let value = 1.1 * before[0] - 0.5 * before[1] + innovation + 0.4 * last;
                (before, last) = ([value, before[0]], innovation);
                Some(value + 60.0)
            })
            .collect();
        let mut arima = Arima::default();
        assert!(arima.fit(&History::new(&series, 0, &[]), &mut Budget::unlimited()));
        let [p, d, q] = arima.orders();
        assert!(p >= 2 && d == 0 && q >= 1, "{arima:?}");
        if [p, q] == [2, 1] {
            assert!((arima.lags[0] - 1.1).abs() < 0.12 && (arima.lags[1] + 0.5).abs() < 0.12, "{arima:?}");
        }
        assert!(error_over_naive(Arima::default(), &series, 3_000, 1) < 0.85);
    }

    #[test]
    fn a_random_walk_is_left_as_it_is() {
        let (mut state, mut level) = (6, 500.0);
        let series: Vec<Option<f64>> = (0..2_000)
            .map(|t| {
                level += noise(&mut state);
                (t % 11 != 3).then_some(level)
            })
            .collect();
        let error = error_over_naive(Arima::default(), &series, 1_500, 3);
        assert!((0.9..1.05).contains(&error), "{error}");
    }
}
