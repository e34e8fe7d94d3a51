//! Several seasons and a trend, taken apart by local regression.
//!
//! STL (Cleveland, Cleveland, McRae and Terpenning, *Journal of Official Statistics* 6, 1990) applied to one season after the other, each
//! with the others taken out (MSTL: Bandara, Hyndman and Bergmeir, 2021). Forecasts repeat the last cycle of each season on top of
//! exponential smoothing of the rest.

use super::ets::Ets;
use super::fit::{Dear, History};
use super::{Budget, CostClass, Model};
use serde::{Deserialize, Serialize};

/// Rounds over all seasons.
const ROUNDS: usize = 2;
/// Cycles that the regression over one phase reaches, as in MSTL: 11, 15, ...
const REACH: usize = 11;
/// Points of a window at which a local regression is made; straight lines between them.
const POINTS: usize = 10;
/// Cycles that have to be seen.
const CYCLES: usize = 3;

/// A fitted decomposition and the state of its rest.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Mstl {
    cycles: Vec<usize>,
    seasons: Vec<Season>,
    rest: Ets,
    fitted: bool,
}

/// The last cycle of one season; the next sample's deviation is at `place`.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
struct Season {
    deviations: Vec<f64>,
    place: usize,
}

impl Mstl {
    /// For cycles of these numbers of steps; those that the history is too short for are left out.
    #[must_use]
    pub fn new(cycles: &[usize]) -> Self {
        Self { cycles: cycles.to_vec(), ..Self::default() }
    }

    fn season(&self, ahead: usize) -> f64 {
        let at = |season: &Season| season.deviations[(season.place + ahead) % season.deviations.len()];
        self.seasons.iter().map(at).sum()
    }
}

/// Local linear regression with tricube weights over the `window` nearest neighbours (Cleveland 1979).
fn loess(values: &[f64], window: usize) -> Vec<f64> {
    let count = values.len();
    let jump = (window / POINTS).max(1);
    let at = |place: usize| {
        let half = window.max(3) / 2;
        let (from, to) = (place.saturating_sub(half), (place + half + 1).min(count));
        // At an end the window reaches as far to the other side.
        let reach = (place - from).max(to - 1 - place).max(1) as f64 + 1.0;
        let (mut weight, mut x, mut y, mut xx, mut xy) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (t, value) in values.iter().enumerate().take(to).skip(from) {
            let distance = t as f64 - place as f64;
            let w = (1.0 - (distance.abs() / reach).powi(3)).powi(3);
            weight += w;
            x += w * distance;
            y += w * value;
            xx += w * distance * distance;
            xy += w * distance * value;
        }
        let spread = weight * xx - x * x;
        let slope = if spread > 1e-12 { (weight * xy - x * y) / spread } else { 0.0 };
        (y - slope * x) / weight
    };
    let mut smooth = vec![0.0; count];
    let (mut before, mut known) = (0, at(0));
    while before + 1 < count {
        let next = (before + jump).min(count - 1);
        let value = at(next);
        for (passed, smooth) in smooth[before..=next].iter_mut().enumerate() {
            *smooth = known + (value - known) * passed as f64 / (next - before) as f64;
        }
        (before, known) = (next, value);
    }
    if count == 1 {
        smooth[0] = known;
    }
    smooth
}

/// Mean over each `length` neighbours.
fn moving_mean(values: &[f64], length: usize) -> Vec<f64> {
    let mut sum: f64 = values.iter().take(length).sum();
    let mut means = vec![sum / length as f64];
    for (old, new) in values.iter().zip(values.iter().skip(length)) {
        sum += new - old;
        means.push(sum / length as f64);
    }
    means
}

/// Means over whole cycles, in which nothing of the cycle is left; the first and the last one are repeated at the ends.
fn without_cycle(values: &[f64], cycle: usize) -> Vec<f64> {
    let longer: Vec<f64> =
        values[..cycle].iter().chain(values).chain(&values[values.len() - cycle..]).copied().collect();
    moving_mean(&moving_mean(&moving_mean(&longer, cycle), cycle), 3)
}

/// The seasonal part of a series with one cycle: phase by phase over the cycles, then without what is slow in it.
fn seasonal(values: &[f64], cycle: usize, reach: usize) -> Vec<f64> {
    // A window somewhat longer than a cycle and a half, as Cleveland et al. advise.
    let trend_window = (1.5 * cycle as f64 / (1.0 - 1.5 / reach as f64)).ceil() as usize | 1;
    let mut trend = vec![0.0; values.len()];
    let mut season = vec![0.0; values.len()];
    for _ in 0..2 {
        for phase in 0..cycle {
            let places = || (phase..values.len()).step_by(cycle);
            let detrended: Vec<f64> = places().map(|t| values[t] - trend[t]).collect();
            for (t, value) in places().zip(loess(&detrended, reach)) {
                season[t] = value;
            }
        }
        let slow = loess(&without_cycle(&season, cycle), trend_window);
        season.iter_mut().zip(&slow).for_each(|(season, slow)| *season -= slow);
        let left: Vec<f64> = values.iter().zip(&season).map(|(value, season)| value - season).collect();
        trend = loess(&left, trend_window);
    }
    season
}

impl Model for Mstl {
    const NAME: &'static str = "mstl";

    fn update(&mut self, value: Option<f64>) {
        if self.fitted {
            let season = self.season(0);
            self.rest.update(value.map(|value| value - season));
            for season in &mut self.seasons {
                season.place = (season.place + 1) % season.deviations.len();
            }
        }
    }

    fn forecast(&self, horizons: &[usize], out: &mut [f32]) {
        if self.fitted {
            self.rest.forecast(horizons, out);
            for (steps, out) in horizons.iter().zip(out) {
                *out += self.season(steps.saturating_sub(1)) as f32;
            }
        }
    }
}

impl Dear for Mstl {
    const COST: CostClass = CostClass::Moderate;

    fn work(&self, history: &History<'_>) -> u64 {
        let count = history.values.len() as u64;
        let regressions = (ROUNDS * 2 * self.cycles.len()) as u64 * 3 * count * (POINTS as u64 + 2);
        regressions + Ets::new(0).work(history)
    }

    fn fit(&mut self, history: &History<'_>, budget: &mut Budget) -> bool {
        let Some(values) = history.filled() else { return false };
        let enough = |cycle: &&usize| **cycle >= 2 && values.len() >= CYCLES * **cycle;
        let cycles: Vec<usize> = self.cycles.iter().filter(enough).copied().collect();
        if cycles.is_empty() || !budget.spend(self.work(history)) {
            return false;
        }
        let mut parts = vec![vec![0.0; values.len()]; cycles.len()];
        for _ in 0..ROUNDS {
            for (index, cycle) in cycles.iter().enumerate() {
                let others = |t: usize| {
                    let others = parts.iter().enumerate().filter(|(other, _)| *other != index);
                    others.map(|(_, part)| part[t]).sum::<f64>()
                };
                let left: Vec<f64> = values.iter().enumerate().map(|(t, value)| value - others(t)).collect();
                parts[index] = seasonal(&left, *cycle, REACH + 4 * index);
            }
        }
        let rest = |t: usize| Some(values[t] - parts.iter().map(|part| part[t]).sum::<f64>());
        let rest: Vec<Option<f64>> = (0..values.len()).map(rest).collect();
        let mut smoothing = Ets::new(0);
        // It was paid for above.
        if !smoothing.fit(&History::new(&rest, history.first, &[]), &mut Budget::unlimited()) {
            return false;
        }
        let last =
            |(part, cycle): (&Vec<f64>, &usize)| Season { deviations: part[part.len() - cycle..].to_vec(), place: 0 };
        self.seasons = parts.iter().zip(&cycles).map(last).collect();
        self.rest = smoothing;
        self.fitted = true;
        true
    }

    fn state_bytes(&self) -> usize {
        let seasons = self.seasons.iter().map(|season| size_of::<Season>() + 8 * season.deviations.len());
        size_of::<Self>() + seasons.sum::<usize>() + self.rest.state_bytes() - size_of::<Ets>()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fit::test::{error_over_naive, noise};
    use super::*;

    #[test]
    fn a_line_is_left_by_local_regression() {
        let values: Vec<f64> = (0..500).map(|t| 3.0 + 0.5 * f64::from(t)).collect();
        for (smooth, value) in loess(&values, 51).iter().zip(&values) {
            assert!((smooth - value).abs() < 1e-6);
        }
        assert_eq!(loess(&[4.0], 7), [4.0]);
    }

    #[test]
    fn two_seasons_on_a_trend_are_told_apart() {
        let mut state = 9;
        let wave = |t: u32, length: u32| (f64::from(t % length) * std::f64::consts::TAU / f64::from(length)).sin();
        let series: Vec<Option<f64>> = (0..2_400)
            .map(|t| {
                let value = 200.0 + 0.02 * f64::from(t) + 10.0 * wave(t, 12) + 40.0 * wave(t, 144);
                (t % 97 != 5).then(|| value + noise(&mut state))
            })
            .collect();
        let mut mstl = Mstl::new(&[12, 144]);
        assert!(mstl.fit(&History::new(&series[..1_728], 0, &[]), &mut Budget::unlimited()));
        let height = |season: &Season| season.deviations.iter().copied().fold(f64::MIN, f64::max);
        let heights = [height(&mstl.seasons[0]), height(&mstl.seasons[1])];
        assert!((heights[0] - 10.0).abs() < 1.5 && (heights[1] - 40.0).abs() < 3.0, "{heights:?}");
        assert!(error_over_naive(Mstl::new(&[12, 144]), &series, 1_728, 6) < 0.15);
    }
}
