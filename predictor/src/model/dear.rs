//! Models that are fitted now and then, and used where they win.
//!
//! A [`Panel`] holds all of them for one series. [`Panel::refit`] fits what a budget allows, off the hot path; between two fits a model
//! only takes samples. Each one's quantiles are made of its own past errors by the same adaptive tracking as the bank's, and a
//! model speaks for a horizon only while its recent pinball loss is below that of the bank.

use super::additive::Additive;
use super::arima::Arima;
use super::ets::Ets;
use super::fit::{Dear, History};
use super::forest::Forest;
use super::lstm::Lstm;
use super::mstl::Mstl;
use super::{Budget, Model};
use crate::bank::Bank;
use crate::conformal::{Basis, Conformal, Levels, Rates};
use crate::forecast::{Forecast, LEVELS};
use crate::quantile::pinball;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Names of the dear models, in the order of [`Panel::losses`].
pub const DEAR_NAMES: [&str; MODELS] = [Ets::NAME, Mstl::NAME, Arima::NAME, Additive::NAME, Forest::NAME, Lstm::NAME];
const MODELS: usize = 6;
/// Outcomes that a model needs before it may speak.
const TRIAL: u32 = 50;
/// A model has to be better than the bank by this share.
const MARGIN: f32 = 0.02;
/// Weight of the newest loss.
const RATE: f32 = 0.01;
/// What the weights of a network start from.
const SEED: u64 = 1;

/// All dear models of one series.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Panel {
    ets: Ets,
    mstl: Mstl,
    arima: Arima,
    additive: Additive,
    forest: Forest,
    lstm: Lstm,
    horizons: Vec<usize>,
    fitted: [bool; MODELS],
    /// Whose turn it is.
    turn: usize,
    tracks: Vec<[Track; MODELS]>,
    /// Usual pinball loss of the bank at 0.95, by horizon.
    bank: Vec<f32>,
    levels: Levels,
    said: VecDeque<Vec<Said>>,
    step: f32,
    last: Option<f64>,
}

/// How one model did at one horizon.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Track {
    conformal: Conformal,
    loss: f32,
    seen: u32,
}

/// What was said at one step for one horizon.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Said {
    points: [Option<f32>; MODELS],
    last: f32,
    scales: [[f32; 2]; MODELS],
    step: f32,
    levels: [f32; LEVELS.len()],
    bank: f32,
}

impl Panel {
    /// For the horizons and cycles of a bank.
    #[must_use]
    pub fn new(horizons: &[usize], cycles: &[usize]) -> Self {
        let longest = cycles.iter().copied().max().unwrap_or(0);
        let track = Track { conformal: Conformal::new(), loss: 0.0, seen: 0 };
        Self {
            ets: Ets::new(longest),
            mstl: Mstl::new(cycles),
            arima: Arima::default(),
            additive: Additive::new(cycles),
            forest: Forest::new(horizons, cycles),
            lstm: Lstm::new(horizons, cycles, SEED),
            horizons: horizons.to_vec(),
            fitted: [false; MODELS],
            turn: 0,
            tracks: vec![std::array::from_fn(|_| track.clone()); horizons.len()],
            bank: vec![0.0; horizons.len()],
            levels: Levels::default(),
            said: VecDeque::new(),
            step: 0.0,
            last: None,
        }
    }

    /// Takes the next sample, which `bank` has taken already.
    pub fn update(&mut self, value: Option<f64>, bank: &Bank) {
        if let Some(value) = value {
            self.score(value as f32);
            self.levels.update(value as f32, 0.01);
            let moved = self.last.map_or(0.0, |last| (value - last).abs() as f32);
            self.step += (moved - self.step) * 0.02;
        }
        self.last = value.or(self.last);
        self.ets.update(value);
        self.mstl.update(value);
        self.arima.update(value);
        self.additive.update(value);
        self.forest.update(value);
        self.lstm.update(value);
        self.announce(bank);
    }

    fn points(&self, bank: &Bank) -> Vec<[Option<f32>; MODELS]> {
        let mut by_model = vec![vec![f32::NAN; self.horizons.len()]; MODELS];
        self.ets.forecast(&self.horizons, &mut by_model[0]);
        self.mstl.forecast(&self.horizons, &mut by_model[1]);
        self.arima.forecast(&self.horizons, &mut by_model[2]);
        self.additive.forecast(&self.horizons, &mut by_model[3]);
        self.forest.forecast(&self.horizons, &mut by_model[4]);
        self.lstm.forecast(&self.horizons, &mut by_model[5]);
        let (low, high) = bank.reach();
        let sound = |model: usize, horizon: usize| {
            let said = by_model[model][horizon];
            (self.fitted[model] && said.is_finite()).then(|| said.max(low).min(high))
        };
        (0..self.horizons.len()).map(|horizon| std::array::from_fn(|model| sound(model, horizon))).collect()
    }

    fn announce(&mut self, bank: &Bank) {
        let last = self.last.unwrap_or(0.0) as f32;
        let points = self.points(bank);
        let said = self.horizons.iter().zip(points).zip(&self.tracks).map(|((steps, points), tracks)| {
            let scales = std::array::from_fn(|model: usize| tracks[model].conformal.errors);
            let bank = bank.forecast(*steps).map_or(f32::NAN, |forecast| forecast.quantile(0.95) as f32);
            Said { points, last, scales, step: self.step, levels: self.levels.values(), bank }
        });
        let said = said.collect();
        self.said.push_front(said);
        self.said.truncate(self.horizons.last().copied().unwrap_or(1));
    }

    fn score(&mut self, value: f32) {
        for (horizon, steps) in self.horizons.iter().enumerate() {
            let Some(said) = self.said.get(steps - 1).and_then(|said| said.get(horizon)) else { continue };
            if said.bank.is_nan() || said.points.iter().all(Option::is_none) {
                continue;
            }
            let loss = |quantile: f32| pinball(0.95, f64::from(quantile), f64::from(value)) as f32;
            for (model, track) in self.tracks[horizon].iter_mut().enumerate() {
                let Some(basis) = said.basis(model) else { continue };
                let quantile = track.conformal.quantiles(&basis, None)[2];
                track.seen = track.seen.saturating_add(1);
                track.loss += (loss(quantile) - track.loss) * RATE.max(1.0 / track.seen as f32);
                track.conformal.learn(value, &basis, &Rates::default(), None);
            }
            let seen = self.tracks[horizon].iter().map(|track| track.seen).max().unwrap_or(1).max(1);
            self.bank[horizon] += (loss(said.bank) - self.bank[horizon]) * RATE.max(1.0 / seen as f32);
        }
    }

    /// Which model speaks for a horizon; `None` = the bank.
    #[must_use]
    pub fn speaker(&self, horizon: usize) -> Option<usize> {
        let tracks = self.tracks.get(horizon)?;
        let best = (0..MODELS)
            .filter(|model| self.fitted[*model] && tracks[*model].seen >= TRIAL)
            .min_by(|a, b| tracks[*a].loss.total_cmp(&tracks[*b].loss))?;
        (tracks[best].loss < (1.0 - MARGIN) * self.bank[horizon]).then_some(best)
    }

    /// The forecast at the tracked horizon `horizon`: of the best dear model if it wins, or else of `bank`.
    #[must_use]
    pub fn forecast(&self, horizon: usize, bank: &Bank) -> Option<Forecast> {
        let steps = *self.horizons.as_slice().get(horizon)?;
        let banks = bank.forecast(steps)?;
        Some(self.speaker(horizon).and_then(|model| self.opinion(horizon, model)).unwrap_or(banks))
    }

    /// What the model `model` of [`DEAR_NAMES`] says for the tracked horizon `horizon`, whether it wins or not; `None` if it has not been
    /// fitted or has nothing to say.
    #[must_use]
    pub fn opinion(&self, horizon: usize, model: usize) -> Option<Forecast> {
        let steps = *self.horizons.as_slice().get(horizon)?;
        let said = self.said.front()?.get(horizon)?;
        let track = self.tracks.get(horizon)?.get(model)?;
        let point = said.points[model]?;
        let quantiles = track.conformal.quantiles(&said.basis(model)?, None);
        Some(Forecast {
            steps,
            point: f64::from(point.max(0.0)),
            quantiles: quantiles.map(|quantile| f64::from(quantile.max(0.0))),
        })
    }

    /// Fits models to `history`, whose newest sample is the newest this has taken: each in its turn, as far as the budget goes.
    /// Returns how many.
    pub fn refit(&mut self, history: &History<'_>, budget: &mut Budget) -> usize {
        let mut count = 0;
        for _ in 0..MODELS {
            let model = self.turn;
            let before = budget.left();
            let done = match model {
                0 => self.ets.fit(history, budget),
                1 => self.mstl.fit(history, budget),
                2 => self.arima.fit(history, budget),
                3 => self.additive.fit(history, budget),
                4 => self.forest.fit(history, budget),
                _ => self.lstm.fit(history, budget),
            };
            // Short of budget: the same model has the first turn the next time.
            if !done && before == budget.left() && before < self.work(model, history) {
                break;
            }
            self.turn = (self.turn + 1) % MODELS;
            self.fitted[model] |= done;
            count += usize::from(done);
        }
        count
    }

    fn work(&self, model: usize, history: &History<'_>) -> u64 {
        match model {
            0 => self.ets.work(history),
            1 => self.mstl.work(history),
            2 => self.arima.work(history),
            3 => self.additive.work(history),
            4 => self.forest.work(history),
            _ => self.lstm.work(history),
        }
    }

    /// Usual pinball loss at 0.95 of each of [`DEAR_NAMES`], and of the bank.
    #[must_use]
    pub fn losses(&self, horizon: usize) -> Option<([f32; MODELS], f32)> {
        Some((std::array::from_fn(|model| self.tracks[horizon][model].loss), *self.bank.as_slice().get(horizon)?))
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        let models = self.ets.state_bytes() + self.mstl.state_bytes() + self.arima.state_bytes();
        let said = self.said.len() * self.horizons.len() * size_of::<Said>();
        let tracks = self.tracks.len() * size_of::<[Track; MODELS]>();
        size_of::<Self>()
            + models
            + self.additive.state_bytes()
            + self.forest.state_bytes()
            + said
            + tracks
            + self.lstm.state_bytes()
    }
}

impl Said {
    fn basis(&self, model: usize) -> Option<Basis> {
        let [slow, fast] = self.scales[model];
        let scales = [slow, fast, self.step];
        Some(Basis { point: self.points[model]?, last: self.last, scales, levels: self.levels })
    }
}

#[cfg(test)]
mod tests {
    use super::super::fit::test::noise;
    use super::*;

    /// Models that this build can fit.
    const FITTED: usize = if Lstm::CAN_BE_FITTED { MODELS } else { MODELS - 1 };

    /// A daily wave with noise and gaps.
    fn series(steps: u32) -> Vec<Option<f64>> {
        let mut state = 17;
        let wave = |t: u32| 20.0 * (f64::from(t % 96) * std::f64::consts::TAU / 96.0).sin();
        (0..steps).map(|t| (t % 71 != 9).then(|| 60.0 + wave(t) + 2.0 * noise(&mut state))).collect()
    }

    #[test]
    fn the_model_that_wins_speaks_and_keeps_its_promise() {
        let series = series(7_000);
        // The bank is told of no cycle.
        let config = crate::bank::BankConfig { horizons: vec![1, 12], ..Default::default() };
        let (mut bank, mut panel) = (Bank::new(config).expect("sound"), Panel::new(&[1, 12], &[96]));
        let (mut own, mut banks, mut covered, mut count) = (0.0, 0.0, 0.0, 0.0);
        for t in 0..series.len() - 12 {
            bank.update(series[t]);
            panel.update(series[t], &bank);
            if t == 1_000 {
                assert_eq!(panel.speaker(1), None, "nothing is fitted yet");
                let history = History::new(&series[..=t], 0, &[]);
                assert_eq!(panel.refit(&history, &mut Budget::new(1_000)), 0);
                assert_eq!(panel.refit(&history, &mut Budget::unlimited()), FITTED);
            }
            let Some(outcome) = series[t + 12].filter(|_| t > 3_000) else { continue };
            let (said, bank) = (panel.forecast(1, &bank).expect("samples"), bank.forecast(12).expect("samples"));
            own += pinball(0.95, said.quantile(0.95), outcome);
            banks += pinball(0.95, bank.quantile(0.95), outcome);
            covered += f64::from(u8::from(outcome <= said.quantile(0.95)));
            count += 1.0;
        }
        assert!(panel.speaker(1).is_some(), "{:?}", panel.losses(1));
        assert!(own < 0.8 * banks, "{own} against {banks}");
        assert!((covered / count - 0.95).abs() < 0.02, "covered {}", covered / count);
        let stored = serde_json::to_string(&panel).expect("can be stored");
        let restored: Panel = serde_json::from_str(&stored).expect("and read");
        assert_eq!(restored.forecast(1, &bank), panel.forecast(1, &bank));
        assert!(panel.state_bytes() < 1 << 20);
    }

    #[test]
    fn a_random_walk_is_left_to_the_bank() {
        let (mut state, mut level) = (19, 500.0);
        let series: Vec<Option<f64>> = (0..2_500)
            .map(|_| {
                level += noise(&mut state);
                Some(level)
            })
            .collect();
        let mut bank = Bank::new(crate::bank::BankConfig::default()).expect("sound");
        let mut panel = Panel::new(&[1, 3, 12], &[24]);
        let (mut own, mut banks) = (0.0, 0.0);
        for t in 0..series.len() - 3 {
            bank.update(series[t]);
            panel.update(series[t], &bank);
            if t == 1_000 {
                panel.refit(&History::new(&series[..=t], 0, &[]), &mut Budget::unlimited());
            }
            if let Some(outcome) = series[t + 3].filter(|_| t > 1_200) {
                own += pinball(0.95, panel.forecast(1, &bank).expect("samples").quantile(0.95), outcome);
                banks += pinball(0.95, bank.forecast(3).expect("samples").quantile(0.95), outcome);
            }
        }
        assert!(own < 1.03 * banks, "{own} against {banks}");
    }

    #[test]
    fn gaps_and_short_histories_are_survived() {
        let mut bank = Bank::new(crate::bank::BankConfig::default()).expect("sound");
        let mut panel = Panel::new(&[1, 3, 12], &[12, 288]);
        let mut series = Vec::new();
        for t in 0..400 {
            let value = if t < 30 || t % 3 == 0 { None } else { Some(if t % 50 == 0 { 1e15 } else { 0.0 }) };
            series.push(value);
            bank.update(value);
            panel.update(value, &bank);
            panel.refit(&History::new(&series, 7, &[]), &mut Budget::new(t * 10_000));
            if let Some(forecast) = panel.forecast(2, &bank) {
                assert!(forecast.quantiles.iter().all(|quantile| quantile.is_finite()), "at {t}: {forecast:?}");
            }
        }
    }
}
