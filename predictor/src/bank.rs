//! Several forecasters for one series, combined by how well each has done lately.

mod circumstances;
mod config;
mod told;
mod track;

pub use crate::model::Target;
pub(crate) use circumstances::CIRCUMSTANCES;
pub use config::{BankConfig, BankError, LONGEST_HORIZON, MOST_HORIZONS, cycles};

use crate::conformal::{Levels, Phased};
use crate::fetch::fetch;
use crate::model::{Model, ewma::Ewma, holt::Holt, naive::Naive, ridge::Ridge};
use crate::sample::plausible;
use crate::season::Season;
use crate::window::gaps;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use track::{COMMON, FLAT, SLOT, Track};

/// Number of forecasters in the bank.
const MODELS: usize = 5;
/// Their names, in the order of weights and losses.
pub const MODEL_NAMES: [&str; MODELS] = [Naive::NAME, Ewma::NAME, "slow ewma", Holt::NAME, Ridge::NAME];
/// What each model says for each tracked horizon.
pub(crate) type Predictions = [[f32; MODELS]; MOST_HORIZONS];
/// The most parts of a cycle that have a mean of their own.
const MOST_PARTS: usize = 288;

/// Forecasts one series of a machine or a pool. See the module's description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bank {
    /// Shared by banks that were made together.
    config: Arc<BankConfig>,
    ewma: Ewma,
    slow: Ewma,
    holt: Holt,
    ridge: Ridge,
    tracks: Box<[Track]>,
    /// Corrections by phase: for each phase those of all tracks.
    phases: Box<[Phased]>,
    levels: Levels,
    /// Usual size of one step.
    step: f32,
    /// Place of this step among those of which `noted` has what was the same for all horizons.
    place: u32,
    /// The same for each horizon, among so many steps.
    places: [u16; MOST_HORIZONS],
    /// Place of this step in the shortest cycle, its length, and in how many phases it is told apart.
    cycle: [u32; 3],
    /// The newest value that was measured.
    last: Option<f64>,
    samples: u64,
    /// Slowly forgetting extremes: forecasts stay within reach of them.
    low: f64,
    high: f64,
    /// What was said and waits for its outcome, as rings of so many steps: first, for the longest horizon, what was the same for all
    /// of them, then what was said for each.
    #[serde(with = "gaps")]
    noted: Box<[f32]>,
}

impl Bank {
    /// A bank that has seen nothing.
    ///
    /// # Errors
    /// [`BankError`] names the setting that cannot be used.
    pub fn new(config: BankConfig) -> Result<Self, BankError> {
        Self::shared(&Arc::new(config))
    }

    /// As [`Bank::new`], for one of many banks with the same configuration, which then is in a cache for all of them.
    ///
    /// # Errors
    /// The same.
    pub fn shared(config: &Arc<BankConfig>) -> Result<Self, BankError> {
        config.check()?;
        let longest = config.horizons.last().copied().unwrap_or(1);
        let noted = COMMON * longest + SLOT * config.horizons.iter().sum::<usize>();
        let seasons =
            config.seasons.iter().map(|length| Season::new(*length, MOST_PARTS, config.season_rate)).collect();
        let tracks = config.horizons.iter().map(|_| Track::new()).collect();
        Ok(Self {
            ewma: Ewma::new(0.3),
            slow: Ewma::new(0.03),
            holt: Holt::new(0.5, 0.1, 0.97),
            ridge: Ridge::new(&config.horizons, seasons, config.ridge_decay, config.ridge_penalty, config.refit_every)
                .of(config.target),
            tracks,
            phases: vec![Phased::default(); config.phases() * config.horizons.len()].into(),
            levels: Levels::default(),
            noted: vec![f32::NAN; noted].into(),
            step: 0.0,
            place: 0,
            places: [0; MOST_HORIZONS],
            cycle: [0, config.cycle(), config.phases() as u32],
            config: Arc::clone(config),
            last: None,
            samples: 0,
            low: f64::MAX,
            high: f64::MIN,
        })
    }

    /// The same, before its first sample, which solves its regressions so many steps earlier: banks that began together, each with its own
    /// number, do not all solve them at the same step.
    #[must_use]
    pub fn staggered(self, steps: u32) -> Self {
        Self { ridge: self.ridge.staggered(steps), ..self }
    }

    /// Takes the sample of the next step; `None`, and anything that cannot be a measurement, is a missing one. Nothing is
    /// scored or learned at a missing sample, but time passes.
    pub fn update(&mut self, value: Option<f64>) {
        let value = plausible(value);
        let outcomes = self.outcomes(value);
        if let Some(value) = value {
            let decay = 1.0 - std::f32::consts::LN_2 / self.config.loss_half_life as f32;
            let phased = self.phased(0, 0).unwrap_or(self.phases.len());
            let (common, mut own) = self.noted.split_at(COMMON * self.longest());
            let mut phased = self.phases[phased..].iter_mut();
            let rings = self.config.horizons.iter().copied().zip(self.places);
            for ((track, outcome), (steps, own_place)) in self.tracks.iter_mut().zip(outcomes).zip(rings) {
                let place = self.place as usize;
                let then = if place >= steps { place - steps } else { place + common.len() / COMMON - steps };
                let (noted, others) = own.split_at(SLOT * steps);
                own = others;
                let noted = &noted[usize::from(own_place) * SLOT..][..SLOT];
                track.learn(outcome, &common[then * COMMON..][..COMMON], noted, decay, phased.next(), &self.config);
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
        self.ewma.update(value);
        self.slow.update(value);
        self.holt.update(value);
        self.ridge.update(value);
        if self.last.is_some() {
            self.announce();
        }
        self.advance();
    }

    /// Steps of the longest horizon.
    fn longest(&self) -> usize {
        self.config.horizons.last().copied().unwrap_or(1)
    }

    /// Asks for what the next sample is going to need, itself left out, which has to be there already; then comes [`Bank::fetch_seasons`].
    pub(crate) fn fetch(&self) {
        fetch(&*self.tracks);
        if let Some(first) = self.phased(0, 0) {
            fetch(&self.phases[first..][..self.tracks.len()]);
        }
        let (longest, place) = (self.longest(), self.place as usize);
        let mut from = COMMON * longest;
        for (steps, own) in self.config.horizons.iter().copied().zip(self.places) {
            let then = if place >= steps { place - steps } else { place + longest - steps };
            fetch(&self.noted[then * COMMON..][..COMMON]);
            fetch(&self.noted[from + usize::from(own) * SLOT..][..SLOT]);
            from += SLOT * steps;
        }
        fetch(&self.noted[place * COMMON..][..COMMON]);
        self.ridge.fetch();
    }

    /// Asks for what could not be asked for before the rest was there.
    pub(crate) fn fetch_seasons(&self) {
        self.ridge.fetch_seasons(&self.config.horizons);
    }

    /// One step further in all rings. Counted and not divided: a division takes as long as ten multiplications.
    fn advance(&mut self) {
        let next = |place: u32, length: u32| if place + 1 >= length { 0 } else { place + 1 };
        self.place = next(self.place, self.longest() as u32);
        self.cycle[0] = next(self.cycle[0], self.cycle[1]);
        for (place, steps) in self.places.iter_mut().zip(&self.config.horizons) {
            // No horizon has more steps than fit.
            *place = next(u32::from(*place), *steps as u32) as u16;
        }
    }

    /// Where `phases` has what belongs to the track of that number at the phase of the shortest cycle `ahead` of this step, if there is
    /// a cycle.
    fn phased(&self, track: usize, ahead: u32) -> Option<usize> {
        let [place, length, phases] = self.cycle;
        if phases == 0 {
            return None;
        }
        let place = place + ahead;
        let place = if place < length { place } else { place % length };
        let phase = if phases == length { place } else { place * phases / length };
        Some(phase as usize * self.tracks.len() + track)
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
        let (common, mut own) = self.noted.split_at_mut(COMMON * self.config.horizons.last().copied().unwrap_or(1));
        let rings = self.config.horizons.iter().zip(self.places);
        let tracks = self.tracks.iter_mut().zip(&predictions).zip(scales);
        for (((track, predictions), usual), (steps, place)) in tracks.zip(rings) {
            let point = track.weights.iter().zip(predictions).map(|(weight, said)| weight * said).sum();
            track.point = point;
            let fast = track.fast(usual);
            let (ring, others) = std::mem::take(&mut own).split_at_mut(SLOT * steps);
            own = others;
            let noted = &mut ring[usize::from(place) * SLOT..][..SLOT];
            noted[..MODELS - FLAT].copy_from_slice(&predictions[FLAT..]);
            noted[MODELS - FLAT..].copy_from_slice(&[point, usual, fast]);
        }
        let noted = &mut common[self.place as usize * COMMON..][..COMMON];
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
        *first = naive;
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
        for ((scale, track), steps) in scales.iter_mut().zip(&self.tracks).zip(&self.config.horizons) {
            let (seen, steps, known) = (track.conformal.seen as f32, *steps as f32, track.conformal.errors[0]);
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
        let inline = size_of::<Self>() + size_of_val(&*self.tracks);
        inline + size_of_val(&*self.noted) + size_of_val(&*self.phases) + self.ridge.heap_bytes()
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
    use crate::conformal::Basis;

    #[test]
    fn what_is_asked_for_later_is_what_was_said_when_the_sample_came() {
        let seasons = vec![12, 288];
        let mut bank = Bank::new(BankConfig { seasons, ..BankConfig::default() }).expect("sound");
        for t in 0..900_u16 {
            let value = (t % 29 != 5).then(|| 20.0 + 10.0 * f64::from(t % 12) + f64::from(t * 37 % 101) / 10.0);
            bank.update(value);
            // What was noted to be scored was noted before the rings went on.
            let mut from = COMMON * bank.longest();
            for (index, track) in bank.tracks.iter().enumerate() {
                let steps = bank.config.horizons[index];
                let place = (usize::from(bank.places[index]) + steps - 1) % steps;
                let noted = &bank.noted[from + place * SLOT..][..SLOT];
                from += SLOT * steps;
                let mut before = bank.clone();
                let (length, cycle) = (bank.cycle[1], &mut before.cycle[0]);
                *cycle = (*cycle + length - 1) % length;
                let basis = Basis {
                    point: noted[MODELS - FLAT],
                    last: bank.last.unwrap_or(0.0) as f32,
                    scales: [noted[SLOT - 2], noted[SLOT - 1], bank.step],
                    levels: bank.levels.values(),
                };
                let phased = before.phased(index, steps as u32).map(|place| &bank.phases[place]);
                let quantiles = track.conformal.quantiles(&basis, phased);
                assert_eq!(bank.told(index), quantiles, "at {t}, horizon {steps}");
            }
        }
    }
}
