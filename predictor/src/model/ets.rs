//! Exponential smoothing with trend and season, chosen by an information criterion.
//!
//! The additive state space models of Hyndman, Koehler, Ord and Snyder (*Forecasting with Exponential Smoothing*, Springer 2008, chapter
//! 2): simple (A,N,N), damped trend (A,Ad,N), season (A,N,A) and both (A,Ad,A: Holt-Winters, *Management Science* 6, 1960). Smoothing
//! parameters by descent along one coordinate after the other from a coarse grid; which components, by AICc.

use super::fit::{Dear, History};
use super::{Budget, CostClass, Model};
use serde::{Deserialize, Serialize};

/// Passes over the series for one set of components: the grid and the descent.
const PASSES: u64 = 120;
/// The longest season that is fitted.
const LONGEST: usize = 2_016;

/// Smoothing of level, trend and season, and what is left of the trend a step later.
type Rates = [f64; 4];

/// A fitted model and its state after the newest sample.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Ets {
    rates: Rates,
    trended: bool,
    /// Steps of the season; 0 without one.
    season: usize,
    level: f64,
    trend: f64,
    /// Deviations by phase; the next sample's is at `place`.
    seasonal: Vec<f64>,
    place: usize,
    fitted: bool,
}

impl Ets {
    /// For a season of so many steps, which is used only if it pays; 0 = none.
    #[must_use]
    pub fn new(season: usize) -> Self {
        Self { season: if season > LONGEST { 0 } else { season }, ..Self::default() }
    }

    fn start(values: &[f64], trended: bool, season: usize, rates: Rates) -> Self {
        let first = &values[..values.len().min(season.max(10))];
        let level = first.iter().sum::<f64>() / first.len().max(1) as f64;
        let seasonal = first.iter().take(season).map(|value| value - level).collect();
        Self { rates, trended, season, level, trend: 0.0, seasonal, place: 0, fitted: true }
    }

    fn deviation(&self, ahead: usize) -> f64 {
        match self.seasonal.len() {
            0 => 0.0,
            length => self.seasonal[(self.place + ahead) % length],
        }
    }

    /// Takes a sample and returns what it was off by.
    fn step(&mut self, value: Option<f64>) -> f64 {
        let [alpha, beta, gamma, phi] = self.rates;
        let drift = if self.trended { phi * self.trend } else { 0.0 };
        let error = value.map_or(0.0, |value| value - self.level - drift - self.deviation(0));
        self.level += drift + alpha * error;
        self.trend = if self.trended { drift + alpha * beta * error } else { 0.0 };
        let length = self.seasonal.len();
        if length > 0 {
            self.seasonal[self.place] += gamma * error;
            self.place = (self.place + 1) % length;
        }
        error
    }

    /// Mean square of what each sample after the first season was off by.
    fn loss(values: &[f64], trended: bool, season: usize, rates: Rates) -> f64 {
        let mut model = Self::start(values, trended, season, rates);
        let mut sum = 0.0;
        for (t, value) in values.iter().enumerate() {
            let error = model.step(Some(*value));
            sum += if t >= season { error * error } else { 0.0 };
        }
        sum / (values.len() - season).max(1) as f64
    }

    /// The best rates for these components, and their loss.
    fn best(values: &[f64], trended: bool, season: usize) -> (Rates, f64) {
        let mut best = ([0.5, 0.1, 0.1, 0.95], f64::MAX);
        let consider = |rates: Rates, best: &mut (Rates, f64)| {
            let loss = Self::loss(values, trended, season, rates);
            let better = loss < best.1;
            if better {
                *best = (rates, loss);
            }
            better
        };
        for alpha in [0.05, 0.2, 0.5, 0.8, 0.98] {
            for gamma in if season > 0 { &[0.02, 0.1, 0.3][..] } else { &[0.0][..] } {
                consider([alpha, 0.1, *gamma, 0.95], &mut best);
            }
        }
        let mut width = 0.1;
        for _ in 0..5 {
            for place in 0..4 {
                let used = match place {
                    0 => true,
                    2 => season > 0,
                    _ => trended,
                };
                for sign in [1.0, -1.0] {
                    let mut rates = best.0;
                    let (low, high) = if place == 3 { (0.8, 0.99) } else { (0.001, 0.999) };
                    rates[place] = f64::clamp(rates[place] + sign * width, low, high);
                    if used && consider(rates, &mut best) {
                        break;
                    }
                }
            }
            width *= 0.6;
        }
        best
    }
}

impl Model for Ets {
    const NAME: &'static str = "ets";

    fn update(&mut self, value: Option<f64>) {
        if self.fitted {
            self.step(value);
        }
    }

    fn forecast(&self, horizons: &[usize], out: &mut [f32]) {
        if !self.fitted {
            return;
        }
        let phi = self.rates[3];
        for (steps, out) in horizons.iter().zip(out) {
            let damped = phi * (1.0 - phi.powi((*steps).min(1 << 30) as i32)) / (1.0 - phi);
            let drift = if self.trended { damped * self.trend } else { 0.0 };
            *out = (self.level + drift + self.deviation(steps.saturating_sub(1))) as f32;
        }
    }
}

impl Dear for Ets {
    const COST: CostClass = CostClass::Moderate;

    fn work(&self, history: &History<'_>) -> u64 {
        4 * PASSES * history.values.len() as u64
    }

    fn fit(&mut self, history: &History<'_>, budget: &mut Budget) -> bool {
        let Some(values) = history.filled().filter(|values| values.len() >= 20) else { return false };
        if !budget.spend(self.work(history)) {
            return false;
        }
        let count = values.len() as f64;
        let seasons = if self.season >= 2 && values.len() >= 3 * self.season { vec![0, self.season] } else { vec![0] };
        let mut chosen: Option<(f64, Self)> = None;
        for season in seasons {
            for trended in [false, true] {
                let (rates, loss) = Self::best(&values, trended, season);
                // Sum over the same samples for all, so that those without a season do not count more of them.
                let parameters =
                    2.0 + if trended { 3.0 } else { 0.0 } + if season > 0 { 1.0 + season as f64 } else { 0.0 };
                let penalty = 2.0 * parameters * count / (count - parameters - 1.0).max(1.0);
                let criterion = count * loss.max(1e-300).ln() + penalty;
                if chosen.as_ref().is_none_or(|(best, _)| criterion < *best) {
                    chosen = Some((criterion, Self::start(&values, trended, season, rates)));
                }
            }
        }
        let Some((_, mut model)) = chosen else { return false };
        for value in &values {
            model.step(Some(*value));
        }
        let season = self.season;
        *self = model;
        self.season = season;
        true
    }

    fn state_bytes(&self) -> usize {
        size_of::<Self>() + 8 * self.seasonal.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fit::test::{error_over_naive, noise};
    use super::*;

    #[test]
    fn a_season_on_a_slow_level_is_found() {
        let mut state = 3;
        let mut level = 100.0;
        let series: Vec<Option<f64>> = (0..1_200)
            .map(|t| {
                level += noise(&mut state);
                let season = 20.0 * (f64::from(t % 24) * std::f64::consts::TAU / 24.0).sin();
                (t % 50 != 7).then(|| level + season + noise(&mut state))
            })
            .collect();
        let (with, without) =
            (error_over_naive(Ets::new(24), &series, 900, 6), error_over_naive(Ets::new(0), &series, 900, 6));
        assert!(with < 0.25 && with < 0.5 * without, "{with} {without}");
    }

    #[test]
    fn noise_about_a_level_gets_neither_trend_nor_season() {
        let mut state = 4;
        let series: Vec<Option<f64>> = (0..600).map(|_| Some(50.0 + noise(&mut state))).collect();
        let mut ets = Ets::new(24);
        assert!(ets.fit(&History::new(&series[..500], 0, &[]), &mut Budget::unlimited()));
        assert!(!ets.trended && ets.seasonal.is_empty() && ets.rates[0] < 0.2, "{ets:?}");
        assert!(error_over_naive(Ets::new(24), &series, 400, 1) < 0.8);
    }
}
