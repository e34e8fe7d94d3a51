//! Forecasts replayed over recorded series and scored: rolling origins, no look ahead.
//!
//! The bank takes every sample once, in order, and is asked at the origins of the test; what it says is compared with what came. Beside it
//! always stand what costs nothing: the naive forecast, naive with the residuals of the past, and the quantile of the last day.

pub mod pool;
pub mod summary;

use crate::bank::{Bank, BankConfig, BankError};
use serde::{Deserialize, Serialize};

/// When to score. All in steps of the series' period.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Protocol {
    /// Horizons of single values, and windows of maxima.
    pub horizons: Vec<usize>,
    /// Steps of a day.
    pub day: usize,
    /// Residuals of the baselines are collected from here to the test.
    pub calibrate_from: usize,
    /// First origin.
    pub test_from: usize,
    /// No origin from here on.
    pub test_until: usize,
    /// Steps between origins of machines.
    pub origin_every: usize,
    /// Steps between origins of pools.
    pub pool_origin_every: usize,
    /// A pool is quiet after so many steps without exceedance.
    pub quiet: usize,
    /// The capacity of a pool is this quantile of its sum before the test.
    pub capacity_quantile: f64,
}

impl Protocol {
    /// The protocol for a trace of 300 s steps: calibration in days 32 to 46, test from day 46, origins every hour and every
    /// quarter of an hour.
    #[must_use]
    pub fn five_minutes() -> Self {
        Self {
            horizons: vec![1, 3, 12],
            day: 288,
            calibrate_from: 32 * 288,
            test_from: 46 * 288,
            test_until: usize::MAX,
            origin_every: 12,
            pool_origin_every: 3,
            quiet: 12,
            capacity_quantile: 0.975,
        }
    }
}

/// Sums for one machine and horizon; means are these over `count`.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct HorizonSums {
    /// Origins that had an outcome.
    pub count: f64,
    /// Absolute error of the bank's point.
    pub error: f64,
    /// Absolute error of naive.
    pub naive_error: f64,
    /// 0.95 pinball loss of the bank.
    pub pinball: f64,
    /// The same of naive with its past residuals in units of the recent mean step.
    pub naive_pinball: f64,
    /// The same of naive with its past residuals as they were.
    pub plain_pinball: f64,
    /// The same of the 0.95 quantile of the last day.
    pub trailing_pinball: f64,
    /// Outcomes not above the bank's 0.95 quantile.
    pub covered: f64,
}

/// Scores of one machine and resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineScore {
    /// Mean absolute error of naive one step ahead before the test.
    pub scale: f64,
    /// One for each horizon.
    pub horizons: Vec<HorizonSums>,
}

/// Pinball loss of `quantile` at `level`.
#[must_use]
pub fn pinball(level: f64, quantile: f64, outcome: f64) -> f64 {
    let above = outcome - quantile;
    if above >= 0.0 { level * above } else { (level - 1.0) * above }
}

/// The quantile of sorted values by straight lines; `None` if there are none.
#[must_use]
pub fn sorted_quantile(sorted: &[f64], level: f64) -> Option<f64> {
    let place = level.clamp(0.0, 1.0) * sorted.len().checked_sub(1)? as f64;
    let below = place as usize;
    let above = (below + 1).min(sorted.len() - 1);
    Some(sorted[below] + (place - below as f64) * (sorted[above] - sorted[below]))
}

fn quantile(mut values: Vec<f64>, level: f64) -> Option<f64> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    sorted_quantile(&values, level)
}

/// Replays one machine's series. `None` if it has nothing to score.
///
/// # Errors
/// [`BankError`] if `config` cannot be used.
pub fn replay_machine(
    values: &[Option<f64>],
    protocol: &Protocol,
    config: &BankConfig,
) -> Result<Option<MachineScore>, BankError> {
    let mut bank = Bank::new(config.clone())?;
    let filled = fill_forward(values);
    let steps = mean_steps(&filled, protocol.day);
    let baselines: Vec<[f64; 2]> =
        protocol.horizons.iter().map(|ahead| residual_quantiles(values, &filled, &steps, *ahead, protocol)).collect();
    let mut sums = vec![HorizonSums::default(); protocol.horizons.len()];
    for (t, value) in values.iter().enumerate() {
        bank.update(*value);
        let origin = t >= protocol.test_from
            && t < protocol.test_until
            && (t - protocol.test_from).is_multiple_of(protocol.origin_every);
        let Some(last) = filled[t].filter(|_| origin) else { continue };
        let trailing =
            quantile(values[(t + 1).saturating_sub(protocol.day)..=t].iter().flatten().copied().collect(), 0.95);
        for ((sums, ahead), baseline) in sums.iter_mut().zip(&protocol.horizons).zip(&baselines) {
            let Some(outcome) = values.get(t + ahead).copied().flatten() else { continue };
            let Some(forecast) = bank.forecast(*ahead) else { continue };
            let q95 = forecast.quantile(0.95);
            sums.count += 1.0;
            sums.error += (outcome - forecast.point).abs();
            sums.naive_error += (outcome - last).abs();
            sums.pinball += pinball(0.95, q95, outcome);
            sums.naive_pinball += pinball(0.95, last + baseline[0] * steps[t], outcome);
            sums.plain_pinball += pinball(0.95, last + baseline[1], outcome);
            sums.trailing_pinball += pinball(0.95, trailing.unwrap_or(last), outcome);
            sums.covered += f64::from(u8::from(outcome <= q95));
        }
    }
    let scored = sums.iter().any(|sums| sums.count > 0.0);
    let scale = naive_scale(values, protocol.test_from);
    Ok(scored.then_some(MachineScore { scale, horizons: sums }))
}

fn fill_forward(values: &[Option<f64>]) -> Vec<Option<f64>> {
    let mut last = None;
    values
        .iter()
        .map(|value| {
            last = value.or(last);
            last
        })
        .collect()
}

/// Recent mean absolute step, a day's memory.
fn mean_steps(filled: &[Option<f64>], day: usize) -> Vec<f64> {
    let (mut mean, mut last, mut seen) = (0.0, None, 0.0);
    filled
        .iter()
        .map(|value| {
            if let (Some(value), Some(last)) = (value, last) {
                seen += 1.0;
                let rate = f64::max(1.0 / seen, 2.0 / (day as f64 + 1.0));
                mean += (f64::abs(value - last) - mean) * rate;
            }
            last = value.or(last);
            mean
        })
        .collect()
}

/// 0.95 quantiles of naive's residuals before the test: in units of the recent mean step, and as they are.
fn residual_quantiles(
    values: &[Option<f64>],
    filled: &[Option<f64>],
    steps: &[f64],
    ahead: usize,
    protocol: &Protocol,
) -> [f64; 2] {
    let until = protocol.test_from.min(values.len()).saturating_sub(ahead);
    let residuals = |scaled: bool| {
        let all = (protocol.calibrate_from..until).filter_map(|t| {
            let residual = values[t + ahead]? - filled[t]?;
            if !scaled {
                return Some(residual);
            }
            (steps[t] > 0.0).then(|| residual / steps[t])
        });
        quantile(all.collect(), 0.95).unwrap_or(0.0)
    };
    [residuals(true), residuals(false)]
}

fn naive_scale(values: &[Option<f64>], until: usize) -> f64 {
    let end = until.min(values.len());
    let (sum, count) = values[..end]
        .windows(2)
        .filter_map(|pair| Some((pair[1]? - pair[0]?).abs()))
        .fold((0.0, 0.0), |(sum, count), step| (sum + step, count + 1.0));
    if count > 0.0 { sum / count } else { 0.0 }
}
