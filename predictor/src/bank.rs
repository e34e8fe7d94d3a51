//! Several forecasters for one series, combined by how well each has done lately.

mod config;
mod track;

pub use config::{BankConfig, BankError, LONGEST_HORIZON, MOST_HORIZONS, Target, cycles};

use crate::conformal::{Basis, Levels};
use crate::forecast::{Forecast, LEVELS};
use crate::model::{Model, ewma::Ewma, holt::Holt, naive::Naive, ridge::Ridge};
use crate::sample::plausible;
use crate::season::Season;
use crate::window::gaps;
use serde::{Deserialize, Serialize};
use track::{COMMON, FLAT, SLOT, Track};

/// Number of forecasters in the bank.
const MODELS: usize = 5;
/// Their names, in the order of weights and losses.
pub const MODEL_NAMES: [&str; MODELS] = [Naive::NAME, Ewma::NAME, "slow ewma", Holt::NAME, Ridge::NAME];
/// What each model says for each tracked horizon.
pub(crate) type Predictions = [[f32; MODELS]; MOST_HORIZONS];
/// Numbers that [`Bank::circumstances`] gives.
pub(crate) const CIRCUMSTANCES: usize = 30;
/// The most parts of a cycle that have a mean of their own.
const MOST_PARTS: usize = 288;

/// Where a number of steps lies among the tracked horizons.
#[derive(Clone, Copy, Debug)]
enum Between {
    /// At the horizon of this number or below it, at this share of the way from the one before.
    Known { above: usize, share: f64 },
    /// Further than the longest, so that quantiles are so many times as far from the point.
    Beyond { longest: usize, wider: f64 },
}

/// Forecasts one series of a machine or a pool. See the module's description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bank {
    config: BankConfig,
    naive: Naive,
    ewma: Ewma,
    slow: Ewma,
    holt: Holt,
    ridge: Ridge,
    tracks: Vec<Track>,
    levels: Levels,
    /// Usual size of one step.
    step: f32,
    /// Place of this step in `common`.
    place: u32,
    /// Place of this step in the shortest cycle, its length, and in how many phases it is told apart.
    cycle: [u32; 3],
    /// The newest value that was measured.
    last: Option<f64>,
    samples: u64,
    /// Slowly forgetting extremes: forecasts stay within reach of them.
    low: f64,
    high: f64,
    /// What was the same for all horizons at each of the latest steps.
    #[serde(with = "gaps")]
    common: Vec<f32>,
}

impl Bank {
    /// A bank that has seen nothing.
    ///
    /// # Errors
    /// [`BankError`] names the setting that cannot be used.
    pub fn new(config: BankConfig) -> Result<Self, BankError> {
        config.check()?;
        let seasons =
            config.seasons.iter().map(|length| Season::new(*length, MOST_PARTS, config.season_rate)).collect();
        let tracks = config.horizons.iter().map(|steps| Track::new(*steps)).collect();
        Ok(Self {
            naive: Naive::default(),
            ewma: Ewma::new(0.3),
            slow: Ewma::new(0.03),
            holt: Holt::new(0.5, 0.1, 0.97),
            ridge: Ridge::new(&config.horizons, seasons, config.ridge_decay, config.ridge_penalty, config.refit_every)
                .staggered(config.stagger)
                .of(config.target),
            tracks,
            levels: Levels::default(),
            common: vec![f32::NAN; COMMON * config.horizons.last().copied().unwrap_or(1)],
            step: 0.0,
            place: 0,
            cycle: [0, config.cycle(), config.phases() as u32],
            config,
            last: None,
            samples: 0,
            low: f64::MAX,
            high: f64::MIN,
        })
    }

    /// Takes the sample of the next step; `None`, and anything that cannot be a measurement, is a missing one. Nothing is
    /// scored or learned at a missing sample, but time passes.
    pub fn update(&mut self, value: Option<f64>) {
        let value = plausible(value);
        let outcomes = self.outcomes(value);
        if let Some(value) = value {
            let decay = 1.0 - std::f32::consts::LN_2 / self.config.loss_half_life as f32;
            let phase = self.phase(0);
            let longest = self.common.len() / COMMON;
            for (track, outcome) in self.tracks.iter_mut().zip(outcomes) {
                let (place, steps) = (self.place as usize, track.steps as usize);
                let then = if place >= steps { place - steps } else { place + longest - steps };
                track.learn(outcome, &self.common[then * COMMON..][..COMMON], decay, phase, &self.config);
            }
            if let Some(last) = self.last {
                let young = 1.0 / self.samples.max(1) as f32;
                self.step += ((value - last).abs() as f32 - self.step) * young.max(0.02);
            }
            self.levels.update(value as f32, self.config.level_rate as f32);
            self.last = Some(value);
            self.samples += 1;
            let span = (self.high - self.low).max(0.0);
            let forget = if self.samples > 1 { span / (8.0 * self.config.loss_half_life) } else { 0.0 };
            self.low = (self.low + forget).min(value);
            self.high = (self.high - forget).max(value);
        }
        self.naive.update(value);
        self.ewma.update(value);
        self.slow.update(value);
        self.holt.update(value);
        self.ridge.update(value);
        if self.last.is_some() {
            self.announce();
        }
        self.advance();
    }

    /// Reads what [`Bank::touch`] has to know before it can read anything: itself, line by line, and where its tracks are.
    pub(crate) fn touch_places(&self) -> f32 {
        let places = self.place as usize + self.common.len() + self.config.horizons.len() + self.tracks.len();
        let levels = self.levels.values()[0] + self.high as f32 + self.config.level_rate as f32;
        places as f32 + levels + self.config.rates.gamma + self.ridge.touch_places()
    }

    /// Reads one number of all that the next sample is going to need, so that a processor fetches it all at the same time: of ten thousand
    /// machines nothing is in a cache, and each wait on its own is longer than what is then computed. The result means nothing.
    pub(crate) fn touch(&self) -> f32 {
        let (longest, place) = (self.common.len() / COMMON, self.place as usize);
        let phase = self.phase(0);
        let mut read = self.ridge.touch(&self.config.horizons);
        for track in &self.tracks {
            let steps = track.steps as usize;
            let then = if place >= steps { place - steps } else { place + longest - steps };
            let ends = [&self.common[then * COMMON..][..COMMON], &track.pending[track.place as usize * SLOT..][..SLOT]];
            read += ends.iter().map(|slot| slot[0] + slot[slot.len() - 1]).sum::<f32>();
            read += track.losses[0] + track.weights[MODELS - 1] + track.conformal.touch(phase);
        }
        read + self.common[place * COMMON]
    }

    /// One step further in all rings. Counted and not divided: a division takes as long as ten multiplications.
    fn advance(&mut self) {
        let next = |place: u32, length: u32| if place + 1 >= length { 0 } else { place + 1 };
        self.place = next(self.place, (self.common.len() / COMMON) as u32);
        self.cycle[0] = next(self.cycle[0], self.cycle[1]);
        for track in &mut self.tracks {
            track.place = next(track.place, track.steps);
        }
    }

    /// The phase of the shortest cycle `ahead` of this step, if there is a cycle.
    fn phase(&self, ahead: u32) -> Option<usize> {
        let [place, length, phases] = self.cycle;
        if phases == 0 {
            return None;
        }
        let place = place + ahead;
        let place = if place < length { place } else { place % length };
        Some((if phases == length { place } else { place * phases / length }) as usize)
    }

    /// What came of the forecasts that are due now, by horizon. A window that ends in a gap has no outcome: its maximum may
    /// have been in the gap.
    fn outcomes(&self, value: Option<f64>) -> [f32; MOST_HORIZONS] {
        let value = value.map_or(f32::NAN, |value| value as f32);
        let mut outcomes = [value; MOST_HORIZONS];
        if self.config.target == Target::Maximum && !value.is_nan() {
            let (mut highest, mut age) = (value, 1);
            for (outcome, steps) in outcomes.iter_mut().zip(&self.config.horizons) {
                while age < *steps {
                    highest = highest.max(self.ridge.past(age - 1));
                    age += 1;
                }
                *outcome = highest;
            }
        }
        outcomes
    }

    /// Makes the forecasts of this step, and notes them to be scored when their time has come.
    fn announce(&mut self) {
        let predictions = self.predictions();
        let levels = self.levels.values();
        let scales = self.scales();
        for ((track, predictions), usual) in self.tracks.iter_mut().zip(&predictions).zip(scales) {
            let point = track.weights.iter().zip(predictions).map(|(weight, said)| weight * said).sum();
            track.point = point;
            let fast = track.fast(usual);
            let noted = &mut track.pending[track.place as usize * SLOT..][..SLOT];
            noted[..MODELS - FLAT].copy_from_slice(&predictions[FLAT..]);
            noted[MODELS - FLAT..].copy_from_slice(&[point, usual, fast]);
        }
        let noted = &mut self.common[self.place as usize * COMMON..][..COMMON];
        noted[..FLAT].copy_from_slice(&predictions[0][..FLAT]);
        noted[FLAT] = self.step;
        noted[FLAT + 1..].copy_from_slice(&levels);
    }

    /// What each model says for each tracked horizon, kept within reach of what the series has shown.
    pub(crate) fn predictions(&self) -> Predictions {
        let horizons = self.config.horizons.as_slice();
        let (floor, ceiling) = self.reach();
        let naive = self.last.unwrap_or(0.0) as f32;
        let kept = |said: f32| if said.is_nan() { naive } else { said.clamp(floor, ceiling) };
        // These say the same for every horizon.
        let mut flat = [f32::NAN; FLAT];
        let [first, second, third] = &mut flat;
        self.naive.forecast(&horizons[..1], std::slice::from_mut(first));
        self.ewma.forecast(&horizons[..1], std::slice::from_mut(second));
        self.slow.forecast(&horizons[..1], std::slice::from_mut(third));
        let flat = flat.map(kept);
        let mut others = [[f32::NAN; MOST_HORIZONS]; MODELS - FLAT];
        self.holt.forecast(horizons, &mut others[0]);
        self.ridge.forecast(horizons, &mut others[1]);
        let mut predictions = [[naive; MODELS]; MOST_HORIZONS];
        for (horizon, said) in predictions.iter_mut().enumerate().take(horizons.len()) {
            said[..FLAT].copy_from_slice(&flat);
            for (said, other) in said[FLAT..].iter_mut().zip(&others) {
                *said = kept(other[horizon]);
            }
        }
        predictions
    }

    /// Usual error at each tracked horizon. Without enough outcomes of its own it is borrowed from the nearest shorter
    /// horizon, growing as a random walk does, or from the size of the value itself.
    fn scales(&self) -> [f32; MOST_HORIZONS] {
        const ENOUGH: f32 = 4.0;
        let mut scales = [0.0; MOST_HORIZONS];
        let mut before = (0.05 * self.last.unwrap_or(0.0) as f32, 1.0);
        for (scale, track) in scales.iter_mut().zip(&self.tracks) {
            let (seen, steps, known) = (track.conformal.seen as f32, track.steps as f32, track.conformal.errors[0]);
            // Outcomes overlap: they tell as much as their number over the square root of the horizon.
            *scale = if seen * seen >= ENOUGH * ENOUGH * steps {
                known
            } else {
                let trust = seen / steps.sqrt() / ENOUGH;
                trust * known + (1.0 - trust) * before.0 * (steps / before.1).sqrt()
            };
            before = (*scale, steps);
        }
        scales
    }

    /// The forecast for `steps` ahead: exact at the configured horizons, by straight lines between them, and beyond the last
    /// with a spread that grows as a random walk's does. `None` before the first sample.
    #[must_use]
    pub fn forecast(&self, steps: usize) -> Option<Forecast> {
        let (last, point) = (self.last?, self.point(steps)?);
        let at = |index: usize| self.told(index).map(|value| f64::from(value.max(0.0)));
        let quantiles = match self.between(steps) {
            Between::Beyond { longest, wider } => at(longest).map(|value| (point + wider * (value - point)).max(0.0)),
            Between::Known { above, share } => {
                let before = above.checked_sub(1).map_or([last; LEVELS.len()], at);
                let after = at(above);
                std::array::from_fn(|i| before[i] + share * (after[i] - before[i]))
            }
        };
        Some(Forecast { steps, point, quantiles })
    }

    /// The point of [`Bank::forecast`] without its quantiles.
    pub(crate) fn point(&self, steps: usize) -> Option<f64> {
        let last = self.last?;
        let at = |index: usize| f64::from(self.tracks[index].point);
        Some(match self.between(steps) {
            Between::Beyond { longest, .. } => at(longest),
            Between::Known { above, share } => {
                let before = above.checked_sub(1).map_or(last, at);
                before + share * (at(above) - before)
            }
        })
    }

    /// Where `steps` ahead lies among the tracked horizons.
    fn between(&self, steps: usize) -> Between {
        let horizons = &self.config.horizons;
        let above = horizons.partition_point(|known| *known < steps);
        if above == horizons.len() {
            let longest = above - 1;
            return Between::Beyond { longest, wider: (steps as f64 / horizons[longest] as f64).sqrt() };
        }
        let from = above.checked_sub(1).map_or(0, |before| horizons[before]);
        Between::Known { above, share: (steps - from) as f64 / (horizons[above] - from) as f64 }
    }

    /// Quantiles at the tracked horizon `index`, made of what was known when its point was.
    fn told(&self, index: usize) -> [f32; LEVELS.len()] {
        let (track, usual) = (&self.tracks[index], self.scales()[index]);
        let basis = Basis {
            point: track.point,
            last: self.last.unwrap_or(0.0) as f32,
            scales: [usual, track.fast(usual), self.step],
            levels: self.levels.values(),
            // The cycle stands at the step after the newest sample.
            phase: self.phase(track.steps - 1),
        };
        track.conformal.quantiles(&basis)
    }

    /// The usual absolute error `steps` ahead, at the tracked horizon nearest above or the last; 0 before the first sample.
    #[must_use]
    pub fn usual_error(&self, steps: usize) -> f64 {
        let index = self.config.horizons.partition_point(|known| *known < steps).min(self.tracks.len() - 1);
        f64::from(self.scales()[index])
    }

    /// The share of each of [`MODEL_NAMES`] in the forecast at the tracked horizon nearest to `steps`.
    #[must_use]
    pub fn weights(&self, steps: usize) -> [f64; MODELS] {
        let index = self.config.horizons.partition_point(|known| *known < steps).min(self.tracks.len() - 1);
        self.tracks[index].weights.map(f64::from)
    }

    /// What may bear on how far a value lies from its forecast at the tracked horizon `index`, in usual errors from the point: into
    /// `row`, which has room for [`CIRCUMSTANCES`]; `said` is [`Bank::predictions`]. Returns point and usual error; `None` before there are any.
    pub(crate) fn circumstances(&self, said: &Predictions, index: usize, row: &mut [f32]) -> Option<(f32, f32)> {
        let (last, track) = (self.last? as f32, self.tracks.get(index)?);
        let (point, scale) = (track.point, self.scales()[index]);
        if scale.is_nan() || scale <= 0.0 || row.len() < CIRCUMSTANCES {
            return None;
        }
        let share = 1.0 / scale;
        let far = |value: f32| (value - point) * share;
        let said = said[index];
        let (levels, [now, ahead]) = (self.levels.values(), self.ridge.seasons(track.steps as usize));
        let features =
            [last, said[1], said[2], said[3], said[4], levels[0], levels[1], levels[2], levels[3]].into_iter();
        let features = features.chain(self.told(index)).chain([self.low as f32, self.high as f32]).map(far);
        let features = features.chain(now).chain(ahead).chain(self.ridge.common());
        let features = features.chain([track.conformal.errors[1], self.step, last].map(|size| size * share));
        let naive = track.losses[0].max(f32::MIN_POSITIVE);
        let features = features.chain([track.losses[4] / naive, scale / naive, track.weights[0]]);
        row[..CIRCUMSTANCES].fill(0.0);
        for (place, feature) in row[..CIRCUMSTANCES].iter_mut().zip(features) {
            *place = if feature.is_finite() { feature.clamp(-1e6, 1e6) } else { 0.0 };
        }
        Some((point, scale))
    }

    /// Quantiles at the tracked horizon `index`.
    pub(crate) fn quantiles(&self, index: usize) -> Option<[f32; LEVELS.len()]> {
        (index < self.tracks.len()).then(|| self.told(index))
    }

    /// The bounds within which forecasts are kept: as far beyond what the series has shown lately as that was wide.
    pub(crate) fn reach(&self) -> (f32, f32) {
        let span = self.high - self.low;
        ((self.low - span).max(0.0) as f32, (self.high + span) as f32)
    }

    /// The newest value that was measured.
    #[must_use]
    pub fn last(&self) -> Option<f64> {
        self.last
    }

    /// How many samples it has seen, missing ones left out.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Bytes that it takes, heap included, its configuration left out.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        let tracks: usize = self.tracks.iter().map(|track| 4 * track.pending.len()).sum();
        let inline = size_of::<Self>() - size_of::<BankConfig>() + self.tracks.len() * size_of::<Track>();
        inline + tracks + 4 * self.common.len() + self.ridge.heap_bytes()
    }

    /// What it was made with.
    #[must_use]
    pub fn config(&self) -> &BankConfig {
        &self.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_later_is_what_was_said_when_the_sample_came() {
        let seasons = vec![12, 288];
        let mut bank = Bank::new(BankConfig { seasons, ..BankConfig::default() }).expect("sound");
        for t in 0..900_u16 {
            let value = (t % 29 != 5).then(|| 20.0 + 10.0 * f64::from(t % 12) + f64::from(t * 37 % 101) / 10.0);
            bank.update(value);
            // What was noted to be scored was noted before the rings went on.
            for (index, track) in bank.tracks.iter().enumerate() {
                let noted = (track.place + track.steps - 1) % track.steps;
                let noted = &track.pending[noted as usize * SLOT..][..SLOT];
                let mut before = bank.clone();
                let (length, cycle) = (bank.cycle[1], &mut before.cycle[0]);
                *cycle = (*cycle + length - 1) % length;
                let basis = Basis {
                    point: noted[MODELS - FLAT],
                    last: bank.last.unwrap_or(0.0) as f32,
                    scales: [noted[SLOT - 2], noted[SLOT - 1], bank.step],
                    levels: bank.levels.values(),
                    phase: before.phase(track.steps),
                };
                assert_eq!(bank.told(index), track.conformal.quantiles(&basis), "at {t}, horizon {}", track.steps);
            }
        }
    }
}
