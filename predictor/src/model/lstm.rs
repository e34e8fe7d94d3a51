//! A recurrent network with long short-term memory, one for all horizons of a series.
//!
//! Hochreiter and Schmidhuber, *Long short-term memory*, Neural Computation 9, 1997, with the forget gate of Gers, Schmidhuber and Cummins,
//! *Learning to forget*, Neural Computation 12, 2000. It reads the newest [`WINDOW`] samples in their order and says the change over each
//! horizon in its usual size, so that it can tell a marker some steps ago from none: what no weighted sum of lags can.
//!
//! candle trains it, which only a build with the feature `lstm` can do: [`Lstm::CAN_BE_FITTED`]. Weights are plain numbers, and forecasts
//! are made of them by the loops below, so that what was fitted is stored, read and used by either build. Nothing is drawn from the
//! operating system: weights start from the seed.

#[cfg(feature = "lstm")]
mod train;

use super::fit::{Dear, History};
use super::{Budget, CostClass, Model};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Samples that are read for one forecast.
const WINDOW: usize = 32;
/// Cells.
const HIDDEN: usize = 16;
/// Gates of a cell: input, forget, output, and what is taken in.
const GATES: usize = 4;
/// Windows that it is fitted to at most: of longer histories every other one, and so on.
#[cfg(feature = "lstm")]
const LESSONS: usize = 1_536;
/// Times that all of them are gone through at most.
#[cfg(feature = "lstm")]
const EPOCHS: usize = 24;
/// Visits of a weight for one sample in fitting: forwards, backwards, and what candle does around them.
#[cfg(feature = "lstm")]
const VISITS: usize = 3;
/// Samples that a fit needs.
#[cfg(feature = "lstm")]
const LEAST: usize = 6 * WINDOW;

/// See the module's description.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lstm {
    horizons: Vec<usize>,
    cycles: Vec<usize>,
    seed: u64,
    fitted: Option<Fitted>,
    /// Newest first, gaps bridged, as many as one forecast reads.
    recent: VecDeque<f32>,
    /// Number of the newest step.
    now: u64,
}

/// What a fit gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Fitted {
    measures: Measures,
    weights: Weights,
}

/// How samples are told to the network, and its answers to us.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Measures {
    /// Mean of the series, and mean distance from it.
    centre: f32,
    spread: f32,
    /// Usual change over a step, and over each horizon.
    step: f32,
    changes: Vec<f32>,
}

/// Rows are inputs and columns outputs, one row after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Weights {
    /// From features (the last is always 1), then cells, to the gates of all cells: input, forget, output, intake.
    gates: Vec<f32>,
    /// From cells, then 1, to horizons.
    answers: Vec<f32>,
}

impl Lstm {
    /// Whether this build can fit one. Without the feature `lstm` a fit is refused, and what was fitted elsewhere goes on.
    pub const CAN_BE_FITTED: bool = cfg!(feature = "lstm");

    /// For these horizons and cycles, all in steps. The same seed and history give the same weights.
    #[must_use]
    pub fn new(horizons: &[usize], cycles: &[usize], seed: u64) -> Self {
        Self {
            horizons: horizons.to_vec(),
            cycles: cycles.to_vec(),
            seed,
            fitted: None,
            recent: VecDeque::new(),
            now: 0,
        }
    }

    /// Numbers that the network is told of a sample.
    fn width(&self) -> usize {
        3 + 2 * self.cycles.len()
    }

    /// Adds what the network is told of the sample `value` of `step`, after `before`.
    fn tell(&self, measures: &Measures, before: f32, value: f32, step: u64, row: &mut Vec<f32>) {
        // Logarithmic far out: a spike is told from a step and does not drown what else there is.
        row.push(((value - before) / measures.step).asinh());
        row.push(((value - measures.centre) / measures.spread).asinh());
        for cycle in &self.cycles {
            let cycle = (*cycle).max(1) as u64;
            let (sine, cosine) = ((step % cycle) as f64 / cycle as f64 * std::f64::consts::TAU).sin_cos();
            row.extend([sine as f32, cosine as f32]);
        }
        row.push(1.0);
    }

    /// Changes over the horizons in their usual size, from [`WINDOW`] rows of features.
    fn answers(&self, weights: &Weights, rows: &[f32]) -> Vec<f32> {
        let (mut cells, mut said) = ([0.0_f32; HIDDEN], [0.0_f32; HIDDEN]);
        for row in rows.chunks_exact(self.width()) {
            let mut gates = [0.0_f32; GATES * HIDDEN];
            for (input, weights) in row.iter().chain(&said).zip(weights.gates.chunks_exact(GATES * HIDDEN)) {
                for (gate, weight) in gates.iter_mut().zip(weights) {
                    *gate += input * weight;
                }
            }
            for (cell, said) in said.iter_mut().enumerate() {
                let gate = |number: usize| gates[number * HIDDEN + cell];
                let open = |number: usize| 1.0 / (1.0 + (-gate(number)).exp());
                cells[cell] = open(1) * cells[cell] + open(0) * gate(3).tanh();
                *said = open(2) * cells[cell].tanh();
            }
        }
        let mut answers = vec![0.0; self.horizons.len()];
        for (input, weights) in said.iter().chain(&[1.0]).zip(weights.answers.chunks_exact(self.horizons.len().max(1)))
        {
            for (answer, weight) in answers.iter_mut().zip(weights) {
                *answer += input * weight;
            }
        }
        answers
    }

    /// What is read for a forecast now, oldest first.
    fn rows(&self, measures: &Measures) -> Vec<f32> {
        let mut rows = Vec::with_capacity(WINDOW * self.width());
        for age in (0..WINDOW).rev() {
            let (value, before) = (self.recent[age], self.recent[age + 1]);
            self.tell(measures, before, value, self.now.saturating_sub(age as u64), &mut rows);
        }
        rows
    }
}

impl Model for Lstm {
    const NAME: &'static str = "lstm";

    fn update(&mut self, value: Option<f64>) {
        if self.fitted.is_none() {
            return;
        }
        self.now += 1;
        let Some(value) = value.map(|value| value as f32).or(self.recent.front().copied()) else { return };
        self.recent.push_front(value);
        self.recent.truncate(WINDOW + 1);
    }

    fn forecast(&self, horizons: &[usize], out: &mut [f32]) {
        let Some(Fitted { measures, weights }) = &self.fitted else { return };
        // A state that was stored by other code may be of another size: it has nothing to say.
        let sizes = ((self.width() + HIDDEN) * GATES * HIDDEN, (HIDDEN + 1) * self.horizons.len());
        if self.recent.len() <= WINDOW || (weights.gates.len(), weights.answers.len()) != sizes {
            return;
        }
        let answers = self.answers(weights, &self.rows(measures));
        for (steps, out) in horizons.iter().zip(out) {
            let known = self.horizons.iter().position(|known| known == steps);
            let Some((answer, change)) = known.and_then(|at| Some((answers.get(at)?, measures.changes.get(at)?)))
            else {
                continue;
            };
            *out = self.recent[0] + change * answer;
        }
    }
}

impl Dear for Lstm {
    const COST: CostClass = CostClass::Dear;

    #[cfg(feature = "lstm")]
    fn work(&self, history: &History<'_>) -> u64 {
        let weights = GATES * HIDDEN * (self.width() + HIDDEN);
        (history.values.len().min(LESSONS) * WINDOW * weights * EPOCHS * VISITS) as u64
    }

    /// None: a fit is refused.
    #[cfg(not(feature = "lstm"))]
    fn work(&self, _history: &History<'_>) -> u64 {
        0
    }

    #[cfg(feature = "lstm")]
    fn fit(&mut self, history: &History<'_>, budget: &mut Budget) -> bool {
        let Some(values) = history.filled() else { return false };
        let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
        let longest = self.horizons.iter().copied().max().unwrap_or(usize::MAX);
        if values.len() < LEAST.saturating_add(longest) || !budget.spend(self.work(history)) {
            return false;
        }
        let first = history.first + (history.values.len() - values.len()) as u64;
        let Some(fitted) = train::fitted(self, &values, first) else { return false };
        self.fitted = Some(fitted);
        self.now = first + values.len() as u64 - 1;
        self.recent = values.iter().rev().take(WINDOW + 1).copied().collect();
        true
    }

    #[cfg(not(feature = "lstm"))]
    fn fit(&mut self, _history: &History<'_>, _budget: &mut Budget) -> bool {
        false
    }

    fn state_bytes(&self) -> usize {
        let weights = self.fitted.as_ref().map_or(0, |fitted| {
            4 * (fitted.weights.gates.len() + fitted.weights.answers.len() + fitted.measures.changes.len())
        });
        size_of::<Self>() + 4 * self.recent.len() + 8 * (self.horizons.len() + self.cycles.len()) + weights
    }
}

#[cfg(all(test, not(feature = "lstm")))]
mod tests {
    use super::*;

    #[test]
    fn a_build_that_cannot_fit_one_refuses_and_takes_nothing() {
        let series: Vec<Option<f64>> = (0..2_000).map(|t| Some(f64::from(t % 7))).collect();
        let (mut lstm, mut budget) = (Lstm::new(&[1], &[], 1), Budget::new(u64::MAX - 1));
        assert!(!Lstm::CAN_BE_FITTED && !lstm.fit(&History::new(&series, 0, &[]), &mut budget));
        assert_eq!(budget.left(), u64::MAX - 1);
        let mut out = [f32::NAN];
        lstm.forecast(&[1], &mut out);
        assert!(out[0].is_nan(), "it has nothing to say");
    }
}
