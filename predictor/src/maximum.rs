//! How high a series will go within a window: the maximum over it, not the value at its end.
//!
//! A bank of its own forecasts the maximum; here the whole distribution of its error is kept, as the outcomes of the past in usual
//! errors of their time, since a probability of exceeding a capacity needs more than a few quantiles.

use crate::bank::{Bank, BankConfig, BankError, LONGEST_HORIZON, Target};
use crate::calibration::{Calibration, Circumstances, Correction, FEATURES, features, logit};
use crate::forecast::{Distribution, Forecast};
use crate::window::gaps;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Outcomes kept for each window.
const KEPT: usize = 2_048;
/// Outcomes that outweigh what is assumed before there are any.
const ASSUMED: f64 = 6.0;
/// A maximum may be so many times further above its forecast than any was before.
const BEYOND: f64 = 1.5;
/// An outcome counts for so many usual errors at most.
const FURTHEST: f32 = 20.0;

/// Forecasts the maximum of one series over several windows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Maxima {
    bank: Bank,
    windows: Vec<Outcomes>,
    /// Newest values, as many as the longest window and the longest cycle; missing ones are NaN.
    #[serde(with = "gaps")]
    recent: Vec<f32>,
    /// Steps of the longest cycle, 0 without one.
    cycle: usize,
    clock: u64,
    /// What is added to the log-odds of each window by who knows more: [`crate::insight::Insight`].
    #[serde(default)]
    shifts: Vec<f64>,
}

/// Cycles that are remembered.
pub(crate) const CYCLES: usize = 7;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Outcomes {
    steps: usize,
    /// The furthest that a maximum ever was above its forecast.
    #[serde(default)]
    worst: f32,
    /// (maximum - forecast) / usual error, newest outcomes, as a ring.
    scores: Vec<f32>,
    next: usize,
    /// The same in order, so that the distribution is read off and not sorted anew.
    #[serde(skip)]
    sorted: Vec<f32>,
    /// Their distribution, made anew when it has changed enough.
    shape: Option<Distribution>,
    /// Outcomes since then.
    fresh: usize,
    /// What is said now: asked for several times a step.
    #[serde(skip)]
    now: Option<Distribution>,
    /// Forecast and usual error noted at each of the last `steps` steps.
    #[serde(with = "gaps")]
    pending: Vec<f32>,
    calibration: Calibration,
    /// Limit and features noted at each of the last `steps` steps.
    #[serde(with = "gaps")]
    watched: Vec<f32>,
}

/// Numbers noted for a limit that is watched.
const WATCHED: usize = FEATURES + 1;

impl Maxima {
    /// For windows as long as the horizons of `config`.
    ///
    /// # Errors
    /// [`BankError`] names the setting that cannot be used.
    pub fn new(config: &BankConfig) -> Result<Self, BankError> {
        let bank = Bank::new(BankConfig { target: Target::Maximum, ..config.clone() })?;
        let windows: Vec<Outcomes> = config
            .horizons
            .iter()
            .map(|steps| Outcomes {
                steps: *steps,
                worst: 0.0,
                scores: Vec::new(),
                next: 0,
                sorted: Vec::new(),
                shape: None,
                fresh: 0,
                now: None,
                pending: vec![f32::NAN; 2 * steps],
                calibration: Calibration::new(*steps),
                watched: vec![f32::NAN; WATCHED * steps],
            })
            .collect();
        let longest = config.horizons.last().copied().unwrap_or(1);
        let cycle = config.seasons.iter().copied().max().filter(|steps| *steps <= LONGEST_HORIZON).unwrap_or(0);
        let kept = (24 * longest).max(CYCLES * cycle + longest);
        let shifts = vec![0.0; windows.len()];
        Ok(Self { bank, windows, recent: vec![f32::NAN; kept], cycle, clock: 0, shifts })
    }

    /// Takes over what another one of the same windows has learned about its probabilities.
    pub fn inherit(&mut self, other: &Self) {
        for (outcomes, others) in self.windows.iter_mut().zip(&other.windows) {
            outcomes.calibration = others.calibration.clone();
        }
    }

    /// Takes the next sample; `None` if it is missing.
    pub fn update(&mut self, value: Option<f64>) {
        self.replay(value);
        self.refresh();
    }

    /// As [`Maxima::update`] for one of many samples of the past: what is only needed to answer is made at the end, by
    /// [`Maxima::refresh`]. A replay of 2,048 samples would otherwise sort the outcomes a thousand times.
    pub(crate) fn replay(&mut self, value: Option<f64>) {
        let length = self.recent.len();
        let place = (self.clock % length as u64) as usize;
        self.recent[place] = value.map_or(f32::NAN, |value| value as f32);
        self.bank.update(value);
        for outcomes in &mut self.windows {
            outcomes.now = None;
            let slot = (self.clock % outcomes.steps as u64) as usize * 2;
            let (point, scale) = (outcomes.pending[slot], outcomes.pending[slot + 1]);
            if value.is_some() {
                let seen = (0..outcomes.steps).map(|age| self.recent[(place + length - age) % length]);
                let highest = seen.fold(f32::NAN, f32::max);
                if point.is_finite() && scale > 0.0 {
                    outcomes.worst = outcomes.worst.max(highest - point);
                    // A jump that nobody expected has raised the usual error by now: in that of before it would count twice.
                    let scale = scale.max(self.bank.usual_error(outcomes.steps) as f32);
                    outcomes.push(((highest - point) / scale).clamp(-FURTHEST, FURTHEST));
                }
                let watched = (self.clock % outcomes.steps as u64) as usize * WATCHED;
                let watched = &outcomes.watched[watched..watched + WATCHED];
                if watched[0].is_finite() {
                    outcomes.calibration.learn(&watched[1..], highest > watched[0]);
                }
            }
            // What was said is compared with one outcome, also if nobody watches any more: a window later it would be another's.
            outcomes.watched[(self.clock % outcomes.steps as u64) as usize * WATCHED] = f32::NAN;
            let (point, scale) = base(&self.bank, outcomes.steps).unwrap_or((f64::NAN, f64::NAN));
            outcomes.pending[slot] = point as f32;
            outcomes.pending[slot + 1] = scale as f32;
        }
        self.clock += 1;
    }

    /// Makes what answers are made from anew after [`Maxima::replay`].
    pub(crate) fn refresh(&mut self) {
        for outcomes in &mut self.windows {
            outcomes.refresh();
            outcomes.now = outcomes.distribution(&self.bank);
        }
    }

    /// The distribution of the maximum over the next `steps` steps (the window asked for when this was made that is nearest
    /// above, or the longest). `None` before the first sample.
    #[must_use]
    pub fn distribution(&self, steps: usize) -> Option<Distribution> {
        self.said_now(self.window(steps)).map(Cow::into_owned)
    }

    /// The same for the window of that number, not copied.
    fn said_now(&self, window: usize) -> Option<Cow<'_, Distribution>> {
        let outcomes = self.windows.get(window)?;
        match &outcomes.now {
            Some(now) => Some(Cow::Borrowed(now)),
            None => outcomes.distribution(&self.bank).map(Cow::Owned),
        }
    }

    /// The number of the shortest window of at least so many steps, or of the longest.
    fn window(&self, steps: usize) -> usize {
        let last = self.windows.len().saturating_sub(1);
        self.windows.iter().position(|outcomes| outcomes.steps >= steps).unwrap_or(last)
    }

    /// Watches a limit: what is said of it is compared with what comes, and corrected from then on. Call it after each sample.
    pub fn watch(&mut self, limit: f64) {
        for index in 0..self.windows.len() {
            let steps = self.windows[index].steps;
            let raw = self.said_now(index).map(|distribution| distribution.exceedance(limit));
            let slot = ((self.clock + steps as u64 - 1) % steps as u64) as usize * WATCHED;
            let known = self.circumstances(steps, limit);
            let watched = &mut self.windows[index].watched[slot..slot + WATCHED];
            watched.fill(f32::NAN);
            if let Some(raw) = raw.filter(|_| limit.is_finite()) {
                watched[0] = limit as f32;
                watched[1..].copy_from_slice(&features(raw, known));
            }
        }
    }

    /// The sample `age` steps before the newest.
    fn back(&self, age: usize) -> Option<f64> {
        let length = self.recent.len() as u64;
        if age as u64 >= length.min(self.clock) {
            return None;
        }
        let value = self.recent[((self.clock + length - 1 - age as u64) % length) as usize];
        (!value.is_nan()).then_some(f64::from(value))
    }

    fn circumstances(&self, steps: usize, limit: f64) -> Circumstances {
        let above = |age: usize| self.back(age).is_some_and(|value| value > limit);
        let longest = self.windows.last().map_or(1, |outcomes| outcomes.steps);
        let first = self.cycle.saturating_sub(1);
        let last = self.cycle.saturating_sub(steps.min(self.cycle));
        Circumstances { quiet: !(0..longest).any(above), a_cycle_ago: self.cycle > 0 && (last..=first).any(above) }
    }

    /// The correction of raw probabilities of exceeding about `limit` within `steps` steps.
    #[must_use]
    pub fn correction(&self, steps: usize, limit: f64) -> Correction {
        let index = self.window(steps);
        let Some(learned) = self.learned(index, limit) else { return Correction::NONE };
        Correction { shift: learned.shift + self.shifts.get(index).copied().unwrap_or(0.0), ..learned }
    }

    /// The correction without what others know.
    fn learned(&self, index: usize, limit: f64) -> Option<Correction> {
        let outcomes = self.windows.get(index)?;
        Some(outcomes.calibration.correction(self.circumstances(outcomes.steps, limit)))
    }

    /// Adds to the log-odds of one window until told otherwise.
    pub(crate) fn shift(&mut self, window: usize, by: f64) {
        if let Some(shift) = self.shifts.get_mut(window) {
            *shift = by;
        }
    }

    /// Length of a window.
    pub(crate) fn steps(&self, window: usize) -> usize {
        self.windows.get(window).map_or(1, |outcomes| outcomes.steps)
    }

    /// The highest of the newest samples, as many as a window is long.
    pub(crate) fn highest(&self, window: usize) -> Option<f64> {
        (0..self.steps(window)).filter_map(|age| self.back(age)).reduce(f64::max)
    }

    /// The newest samples first, as many as are remembered; missing ones are NaN.
    pub(crate) fn past(&self) -> Vec<f32> {
        let known = self.recent.len().min(usize::try_from(self.clock).unwrap_or(usize::MAX));
        let place = (self.clock % self.recent.len() as u64) as usize;
        let (newer, older) = self.recent.split_at(place);
        newer.iter().rev().chain(older.iter().rev()).take(known).copied().collect()
    }

    /// Steps of the longest window and of the longest cycle (0 without one).
    pub(crate) fn spans(&self) -> (usize, usize) {
        (self.windows.last().map_or(1, |outcomes| outcomes.steps), self.cycle)
    }

    /// What is said of a window without what others know: log-odds before and after the correction, forecast of the maximum, its
    /// usual error.
    pub(crate) fn said(&self, window: usize, limit: f64) -> Option<[f64; 4]> {
        let steps = self.windows.get(window)?.steps;
        let raw = self.said_now(window)?.exceedance(limit);
        let (point, error) = base(&self.bank, steps)?;
        Some([logit(self.learned(window, limit)?.apply(raw)), logit(raw), point, error])
    }

    /// The probability that the maximum over the next `steps` steps is above `limit`, corrected.
    #[must_use]
    pub fn exceedance(&self, steps: usize, limit: f64) -> Option<f64> {
        Some(self.correction(steps, limit).apply(self.said_now(self.window(steps))?.exceedance(limit)))
    }

    /// The same without what others know.
    #[must_use]
    pub fn exceedance_alone(&self, steps: usize, limit: f64) -> Option<f64> {
        let index = self.window(steps);
        Some(self.learned(index, limit)?.apply(self.said_now(index)?.exceedance(limit)))
    }

    /// Point and quantiles of the maximum over the next `steps` steps.
    #[must_use]
    pub fn forecast(&self, steps: usize) -> Option<Forecast> {
        Some(self.said_now(self.window(steps))?.forecast(steps))
    }
}

fn base(bank: &Bank, steps: usize) -> Option<(f64, f64)> {
    Some((bank.point(steps)?, bank.usual_error(steps)))
}

/// Before anything is known: quantiles of the maximum of a few Laplace errors.
const ASSUMED_SCORES: [f64; 10] = [-0.5, 0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 1.9, 2.6, 4.0];

impl Outcomes {
    /// What the outcomes so far make of the forecast of `bank`, which is that of the maximum.
    fn distribution(&self, bank: &Bank) -> Option<Distribution> {
        let (point, scale) = base(bank, self.steps)?;
        let assumed = || Distribution::from_values(ASSUMED_SCORES.iter().map(|score| point + scale * score).collect());
        let Some(shape) = &self.shape else { return assumed() };
        // A jump after a quiet time is many of the usual errors of that time, and raises the usual error: applied to that one it
        // would become a much larger jump than any that was ever seen.
        let learned = shape.scaled(point, scale).capped(point + BEYOND * f64::from(self.worst).max(scale));
        // Windows overlap, so that their outcomes tell less than their number.
        let count = self.scores.len() as f64 / (self.steps as f64).sqrt();
        if count >= 8.0 * ASSUMED {
            return Some(learned);
        }
        Distribution::mixture(&[(count, learned), (ASSUMED, assumed()?)])
    }

    fn push(&mut self, score: f32) {
        self.order();
        let place = |sorted: &[f32], score: f32| sorted.partition_point(|known| known.total_cmp(&score).is_lt());
        if self.scores.len() < KEPT {
            self.scores.push(score);
            self.sorted.insert(place(&self.sorted, score), score);
        } else {
            let from = place(&self.sorted, self.scores[self.next]);
            let to = place(&self.sorted, score);
            // Of equal ones the first leaves: what is between the two places moves by one.
            if to > from {
                self.sorted.copy_within(from + 1..to, from);
                self.sorted[to - 1] = score;
            } else {
                self.sorted.copy_within(to..from, to + 1);
                self.sorted[to] = score;
            }
            self.scores[self.next] = score;
        }
        self.next = (self.next + 1) % KEPT;
        self.fresh += 1;
    }

    /// Puts them in order if they are not, as after they were read from a store.
    fn order(&mut self) {
        if self.sorted.len() != self.scores.len() {
            self.sorted.clone_from(&self.scores);
            self.sorted.sort_unstable_by(f32::total_cmp);
        }
    }

    /// Makes the distribution anew if that is due. Not at every outcome, although it only reads: what is said stays the same for a while.
    fn refresh(&mut self) {
        let due = self.fresh * 50 >= self.scores.len() || self.shape.is_none();
        if due && self.fresh > 0 {
            self.order();
            self.shape = Distribution::from_sorted(&self.sorted);
            self.fresh = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_kept_in_order_as_a_sort_would_put_them() {
        let mut outcomes = Maxima::new(&BankConfig::default()).expect("sound").windows.remove(0);
        let mut state = 3_u32;
        for number in 0..3 * KEPT {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Many are equal, and some the same but for the sign of zero.
            let score = ((state >> 24) as f32 - 128.0) / 16.0;
            outcomes.push(if score == 0.0 && state.is_multiple_of(2) { -score } else { score });
            if number % 37 == 0 || number + 1 == KEPT {
                let mut expected = outcomes.scores.clone();
                expected.sort_by(f32::total_cmp);
                let same = expected.iter().zip(&outcomes.sorted).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same && expected.len() == outcomes.sorted.len(), "after {number}");
                let values = outcomes.scores.iter().map(|score| f64::from(*score)).collect();
                assert_eq!(Distribution::from_sorted(&outcomes.sorted), Distribution::from_values(values));
            }
            if number == KEPT + 100 {
                let stored = serde_json::to_string(&outcomes).expect("can be stored");
                outcomes = serde_json::from_str(&stored).expect("and read");
            }
        }
    }

    #[test]
    fn what_was_said_of_a_limit_is_learned_from_once() {
        let mut maxima = Maxima::new(&BankConfig::default()).expect("sound");
        let value = |t: u32| Some(f64::from(t * 7919 % 101));
        for t in 0..600 {
            maxima.update(value(t));
            maxima.watch(95.0);
        }
        let learned =
            |maxima: &Maxima| maxima.windows.iter().map(|window| window.calibration.clone()).collect::<Vec<_>>();
        // Nobody watches from here on: what is open is learned within the longest window, and then nothing more.
        for t in 600..612 {
            maxima.update(value(t));
        }
        let known = learned(&maxima);
        for t in 612..700 {
            maxima.update(Some(if t % 5 == 0 { 100.0 } else { 1.0 }));
        }
        assert_eq!(learned(&maxima), known);
    }
}
