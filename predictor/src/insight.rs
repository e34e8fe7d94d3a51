//! What pools have in common before they run out: trees over features of many pools correct the probability that each one's
//! forecast gives.
//!
//! [`Maxima`] knows one series. What its probability leaves out (how often the limit was exceeded in the last days, the same hours of
//! the days before, whether use is climbing) is learned here, from all pools that are given to the same [`Insight`]. The
//! correction is a shift of the log-odds, so that probabilities of other limits move with it.

use crate::maximum::{CYCLES, Maxima};
use crate::model::Budget;
use crate::model::boost::{Growth, Loss};
use crate::model::shared::Shared;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Features of one forecast.
const WIDTH: usize = COMMON + 8;
/// Of them the same for every window.
const COMMON: usize = 22;
/// Windows overlap: of neighbouring forecasts one in so many is learned from.
const EVERY: u64 = 3;
/// A correction may change the odds by this factor (as a logarithm) at most.
const FURTHEST: f32 = 3.0;

/// What many pools' pasts say about each window.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Insight {
    windows: Vec<Shared>,
}

/// What one series has said and waits for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Waiting {
    said: VecDeque<Noted>,
    clock: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Noted {
    due: u64,
    window: usize,
    limit: f32,
    row: Vec<f32>,
    offset: f32,
    with_trees: Option<f32>,
}

impl Insight {
    /// For so many windows, keeping so many lessons of each, of so many steps.
    #[must_use]
    pub fn new(windows: usize, lessons: usize, span: usize) -> Self {
        let growth = Growth::default();
        Self { windows: vec![Shared::new(&[Loss::Logistic], growth, WIDTH, [lessons, span], 5_000.0); windows] }
    }

    /// After each sample of a series and [`Maxima::watch`]: learns what came of what was said of it, and corrects what is said now.
    /// `time` is the number of this step, counted alike for all series.
    pub fn follow(&mut self, waiting: &mut Waiting, maxima: &mut Maxima, limit: f64, time: u64) {
        waiting.clock += 1;
        while let Some(noted) = waiting.said.front().filter(|noted| noted.due <= waiting.clock) {
            if let (Some(highest), Some(shared)) = (maxima.highest(noted.window), self.windows.get_mut(noted.window)) {
                let came = if highest > f64::from(noted.limit) { 1.0 } else { 0.0 };
                shared.learn(&noted.row, &[noted.offset], &[noted.with_trees], [came, 1.0], time);
            }
            waiting.said.pop_front();
        }
        let mut notes = Vec::new();
        let common = common(maxima, limit, time);
        for (window, shared) in self.windows.iter().enumerate() {
            let Some((row, offset)) = features(maxima, window, limit, &common) else { continue };
            let with_trees =
                shared.opinion(0, &row, offset).map(|said| said.clamp(offset - FURTHEST, offset + FURTHEST));
            let shift = with_trees.filter(|_| shared.trusted(0)).map_or(0.0, |said| said - offset);
            maxima.shift(window, f64::from(shift));
            if waiting.clock.is_multiple_of(EVERY) {
                let due = waiting.clock + maxima.steps(window) as u64;
                notes.push(Noted { due, window, limit: limit as f32, row: row.to_vec(), offset, with_trees });
            }
        }
        if !notes.is_empty() {
            waiting.said.extend(notes);
            waiting.said.make_contiguous().sort_by_key(|noted| noted.due);
        }
    }

    /// Fits anew what `budget` allows. Call it off the hot path, about once a day.
    pub fn refit(&mut self, budget: &mut Budget) -> usize {
        self.windows.iter_mut().map(|shared| shared.refit(budget)).sum()
    }

    /// Bytes that it takes, lessons included.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.windows.iter().map(Shared::state_bytes).sum()
    }

    /// The models by window.
    #[must_use]
    pub fn windows(&self) -> &[Shared] {
        &self.windows
    }

    /// The same, to be fitted.
    pub(crate) fn windows_mut(&mut self) -> &mut [Shared] {
        &mut self.windows
    }
}

/// What does not depend on the window.
struct Common {
    past: Vec<f32>,
    row: [f32; COMMON],
}

/// Collects features, with 0 for what is not known.
struct Row<'a> {
    row: &'a mut [f32],
    place: usize,
}

impl Row<'_> {
    fn add(&mut self, value: f32) {
        if let Some(place) = self.row.get_mut(self.place) {
            *place = if value.is_finite() { value.clamp(-1e6, 1e6) } else { 0.0 };
        }
        self.place += 1;
    }
}

/// The last hours and days: levels, peaks, unrest, how often and how long ago it was too much, and the time.
fn common(maxima: &Maxima, limit: f64, time: u64) -> Common {
    let past = maxima.past();
    let (longest, cycle) = maxima.spans();
    let (limit, share) = (limit as f32, 1.0 / limit as f32);
    let mut row = [0.0; COMMON];
    let mut features = Row { row: &mut row, place: 0 };
    let now = past.first().copied().unwrap_or(f32::NAN);
    features.add(now * share);
    let (mut sum, mut squares, mut highest, mut count, mut from) = (0.0, 0.0, f32::MIN, 0.0, 0);
    for steps in [longest.div_ceil(4), longest, 3 * longest, 24 * longest] {
        let until = steps.min(past.len());
        for value in past[from..until].iter().filter(|value| !value.is_nan()).map(|value| value * share) {
            (sum, squares, count) = (sum + value, squares + value * value, count + 1.0);
            highest = f32::max(highest, value);
        }
        from = until;
        let mean = sum / f32::max(count, 1.0);
        features.add(mean);
        features.add(highest);
        features.add((squares / f32::max(count, 1.0) - mean * mean).max(0.0).sqrt());
    }
    for ago in [longest.div_ceil(12), longest.div_ceil(4), longest] {
        features.add(past.get(ago).map_or(0.0, |then| (now - then) * share));
    }
    let since = past.iter().position(|value| *value > limit).unwrap_or(past.len());
    features.add((1.0 + since as f32).ln());
    let above = |steps: usize| past[..steps.min(past.len())].iter().filter(|value| **value > limit).count();
    features.add(above(cycle) as f32);
    features.add(above(past.len()) as f32);
    let part = |length: usize| if length > 0 { (time % length as u64) as f32 / length as f32 } else { 0.0 };
    features.add(part(cycle));
    features.add(part(CYCLES * cycle));
    features.add(part(cycle / 24));
    Common { past, row }
}

/// What may bear on whether `limit` is exceeded within a window, and the log-odds that are said of it.
fn features(maxima: &Maxima, window: usize, limit: f64, common: &Common) -> Option<([f32; WIDTH], f32)> {
    common.past.first().filter(|now| !now.is_nan())?;
    if limit <= 0.0 || !limit.is_finite() {
        return None;
    }
    let [said, raw, point, error] = maxima.said(window, limit)?;
    let mut row = [0.0; WIDTH];
    row[..COMMON].copy_from_slice(&common.row);
    let mut features = Row { row: &mut row[COMMON..], place: 0 };
    features.add(said as f32);
    features.add(raw as f32);
    features.add(((limit - point) / error.max(1e-9 * limit)) as f32);
    features.add((error / limit) as f32);
    same_time(maxima, window, limit as f32, &common.past, &mut features);
    Some((row, said as f32))
}

/// The same time of the cycles before: how high it was, and how often too high.
fn same_time(maxima: &Maxima, window: usize, limit: f32, past: &[f32], features: &mut Row<'_>) {
    let (steps, cycle) = (maxima.steps(window), maxima.spans().1);
    let (mut sum, mut exceeded, mut known, mut first, mut last) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for number in (1..=CYCLES).filter(|_| cycle > 0) {
        let Some(then) = past.get((number * cycle).saturating_sub(steps)..number * cycle) else { break };
        let highest = then.iter().copied().fold(f32::NAN, f32::max) / limit;
        if highest.is_nan() {
            continue;
        }
        (sum, known) = (sum + highest, known + 1.0);
        exceeded += if highest > 1.0 { 1.0 } else { 0.0 };
        first = if number == 1 { highest } else { first };
        last = if number == CYCLES { highest } else { last };
    }
    for feature in [sum / f32::max(known, 1.0), exceeded, first, last] {
        features.add(feature);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bank::BankConfig;

    fn noise(state: &mut u64) -> f64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 40) as f64 / (1_u64 << 24) as f64
    }

    /// A small bump is followed half a window later by a large one, with even odds; nothing else ever exceeds the limit.
    fn series(seed: u64, steps: usize) -> Vec<f64> {
        let mut state = seed;
        let mut values: Vec<f64> = (0..steps).map(|_| 50.0 + noise(&mut state)).collect();
        let mut t = 30;
        while t + 20 < steps {
            values[t] += 12.0;
            if noise(&mut state) < 0.5 {
                values[t + 7] += 50.0;
            }
            t += 40 + (60.0 * noise(&mut state)) as usize;
        }
        values
    }

    /// Brier score of what is said of a limit of 90 within 12 steps, over the last part of four series.
    fn brier(insight: &mut Insight, budget: u64) -> f64 {
        let series: Vec<Vec<f64>> = (1..=4).map(|seed| series(seed, 6_000)).collect();
        let config = BankConfig { horizons: vec![12], ..BankConfig::default() };
        let mut maxima: Vec<Maxima> = series.iter().map(|_| Maxima::new(&config).expect("sound")).collect();
        let mut waiting = vec![Waiting::default(); series.len()];
        let (mut sum, mut count) = (0.0, 0.0);
        for t in 0..5_980 {
            for ((series, maxima), waiting) in series.iter().zip(&mut maxima).zip(&mut waiting) {
                maxima.update(Some(series[t]));
                maxima.watch(90.0);
                insight.follow(waiting, maxima, 90.0, t as u64);
                if t >= 4_000 {
                    let came = series[t + 1..=t + 12].iter().any(|value| *value > 90.0);
                    let said = maxima.exceedance(12, 90.0).expect("samples");
                    sum += (said - f64::from(u8::from(came))).powi(2);
                    count += 1.0;
                }
            }
            if t % 1_000 == 999 {
                insight.refit(&mut Budget::new(budget));
            }
        }
        sum / count
    }

    #[test]
    fn what_only_the_pools_together_show_is_learned_from_them() {
        let mut without = Insight::new(1, 20_000, 0);
        let alone = brier(&mut without, 0);
        assert!(without.windows()[0].opinion(0, &[0.0; WIDTH], 0.0).is_none(), "no budget, no trees");
        let mut insight = Insight::new(1, 20_000, 0);
        let together = brier(&mut insight, u64::MAX);
        assert!(together < 0.9 * alone, "{together} against {alone}");
        assert!(insight.windows()[0].trusted(0) && insight.state_bytes() > 100_000);
        let stored = serde_json::to_string(&insight).expect("can be stored");
        let restored: Insight = serde_json::from_str(&stored).expect("and read");
        assert_eq!(
            restored.windows()[0].opinion(0, &[0.5; WIDTH], 0.1),
            insight.windows()[0].opinion(0, &[0.5; WIDTH], 0.1)
        );
    }

    #[test]
    fn lessons_are_bounded_and_limits_that_cannot_be_teach_nothing() {
        let mut insight = Insight::new(1, 100, 0);
        brier(&mut insight, u64::MAX);
        assert_eq!(insight.windows()[0].len(), 100);
        let mut maxima = Maxima::new(&BankConfig::default()).expect("sound");
        let (mut waiting, mut insight) = (Waiting::default(), Insight::new(3, 100, 0));
        for limit in [0.0, -1.0, f64::NAN, f64::INFINITY].into_iter().cycle().take(200) {
            maxima.update(Some(3.0));
            insight.follow(&mut waiting, &mut maxima, limit, 0);
        }
        assert!(insight.windows().iter().all(Shared::is_empty) && waiting.said.is_empty());
    }
}
