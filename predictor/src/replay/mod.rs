//! Forecasts replayed over recorded series and scored: rolling origins, no look ahead.
//!
//! The bank takes every sample once, in order, and is asked at the origins of the test; what it says is compared with what came. Beside it
//! always stand what costs nothing: the naive forecast, naive with the residuals of the past, and the quantile of the last day.

pub mod panels;
pub mod pool;
pub mod summary;

use crate::bank::{Bank, BankConfig, BankError};
use crate::experience::{Experience, LESSONS};
use crate::fleet::{Fleet, Member};
use crate::model::Budget;
use crate::quantile::{pinball, sorted_quantile};
use crate::sample::plausible;
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
    /// Steps between two fits of what is learned from all series together; 0 for never.
    pub refit_every: usize,
    /// The capacity of a pool is this quantile of its sum before the test.
    pub capacity_quantile: f64,
}

/// Days of the default protocol: the test starts here,
const TEST_FROM_DAY: f64 = 46.0;
/// and so many days before it are for the residuals of the baselines.
const CALIBRATION_DAYS: f64 = 14.0;

impl Protocol {
    /// The protocol for a trace of `steps` samples that are `period_s` seconds apart: horizons of `minutes` (rounded to whole
    /// steps, at least one), test from day 46, or from `test_from_day`, or for a shorter trace from its middle; 14 days before it
    /// for calibration, or half of what there is; origins every hour and, for pools, every quarter of an hour; quiet after an
    /// hour.
    #[must_use]
    pub fn new(period_s: f64, steps: usize, minutes: &[f64], test_from_day: Option<f64>) -> Self {
        let of = |seconds: f64| ((seconds / period_s).round() as usize).max(1);
        let mut horizons: Vec<usize> = minutes.iter().map(|minutes| of(60.0 * minutes)).collect();
        horizons.sort_unstable();
        horizons.dedup();
        let day = of(86_400.0);
        let in_days = |days: f64| (days.max(0.0) * 86_400.0 / period_s).round() as usize;
        let usual = in_days(TEST_FROM_DAY);
        let test_from = match test_from_day {
            Some(days) => in_days(days),
            None if steps > usual.saturating_add(day) => usual,
            None => steps / 2,
        };
        let calibration = in_days(CALIBRATION_DAYS).min(test_from / 2);
        Self {
            horizons,
            day,
            calibrate_from: test_from - calibration,
            test_from,
            test_until: usize::MAX,
            origin_every: of(3_600.0),
            pool_origin_every: of(900.0),
            quiet: of(3_600.0),
            refit_every: of(7.0 * 86_400.0),
            capacity_quantile: 0.975,
        }
    }
}

/// Methods that cost nothing: all but the predictor, which comes first, and the bank, which comes last.
const SIMPLE: usize = Method::ALL.len() - 2;

/// Whose forecasts are scored side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The bank, its upper quantiles corrected by the trees where these win.
    Predictor,
    /// The last value goes on; its quantile by past residuals in units of the recent mean step.
    Naive,
    /// The same with past residuals as they were.
    NaivePlain,
    /// The value of the same time a day before; its quantile by past residuals.
    DailyNaive,
    /// Mean of the last day, and 1.645 standard deviations above it.
    NSigma,
    /// Median and 0.95 quantile of the last day.
    TrailingQuantile,
    /// The online bank alone, without the trees over all machines.
    Bank,
}

impl Method {
    /// All of them; the predictor first, then what it is compared with.
    pub const ALL: [Self; 7] = [
        Self::Predictor,
        Self::Naive,
        Self::NaivePlain,
        Self::DailyNaive,
        Self::NSigma,
        Self::TrailingQuantile,
        Self::Bank,
    ];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Predictor => "predictor",
            Self::Naive => "naive",
            Self::NaivePlain => "naive_plain",
            Self::DailyNaive => "daily_naive",
            Self::NSigma => "n_sigma",
            Self::TrailingQuantile => "trailing_quantile",
            Self::Bank => "bank",
        }
    }
}

/// Sums of one method over the origins of one machine and horizon.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Sums {
    /// Absolute error of the point.
    pub error: f64,
    /// 0.95 pinball loss.
    pub pinball: f64,
    /// Outcomes not above the 0.95 quantile.
    pub covered: f64,
}

impl Sums {
    fn add(&mut self, point: f64, q95: f64, outcome: f64) {
        self.error += (outcome - point).abs();
        self.pinball += pinball(0.95, q95, outcome);
        self.covered += f64::from(u8::from(outcome <= q95));
    }
}

/// Sums for one machine and horizon; means are these over `count`.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct HorizonSums {
    /// Origins that had an outcome.
    pub count: f64,
    /// In the order of [`Method::ALL`].
    pub methods: [Sums; Method::ALL.len()],
}

/// Scores of one machine and resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineScore {
    /// Mean absolute error of naive one step ahead before the test.
    pub scale: f64,
    /// One for each horizon.
    pub horizons: Vec<HorizonSums>,
}

fn quantile(mut values: Vec<f64>, level: f64) -> Option<f64> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    sorted_quantile(&values, level)
}

/// Replays the series of machines, all of them step by step together, since they learn from each other. Machines with nothing to
/// score are left out.
///
/// # Errors
/// [`BankError`] if `config` cannot be used.
pub fn replay_machines(
    columns: &[Vec<Option<f64>>],
    protocol: &Protocol,
    config: &BankConfig,
) -> Result<Vec<MachineScore>, BankError> {
    // The bank takes what no meter can give for a gap: it must be none of the outcomes either.
    let columns: Vec<Vec<Option<f64>>> =
        columns.iter().map(|column| column.iter().map(|value| plausible(*value)).collect()).collect();
    let machines = columns.iter().map(|column| Replay::new(column, protocol, config));
    let mut machines = machines.collect::<Result<Vec<_>, _>>()?;
    let Experience { mut fleet, .. } = Experience::new(config, LESSONS);
    for t in 0..columns.iter().map(Vec::len).max().unwrap_or(0) {
        for (number, machine) in machines.iter_mut().enumerate() {
            machine.step(t, number as u64, protocol, &mut fleet);
        }
        if protocol.refit_every > 0 && (t + 1).is_multiple_of(protocol.refit_every) {
            fleet.refit(&mut Budget::unlimited());
        }
    }
    let scored = machines.into_iter().filter(|machine| machine.sums.iter().any(|sums| sums.count > 0.0));
    let score = |machine: Replay<'_>| MachineScore {
        scale: naive_scale(machine.baselines.values, protocol.test_from),
        horizons: machine.sums,
    };
    Ok(scored.map(score).collect())
}

/// One machine of a replay.
struct Replay<'a> {
    bank: Bank,
    member: Member,
    baselines: Baselines<'a>,
    sums: Vec<HorizonSums>,
}

impl<'a> Replay<'a> {
    fn new(values: &'a [Option<f64>], protocol: &'a Protocol, config: &BankConfig) -> Result<Self, BankError> {
        Ok(Self {
            bank: Bank::new(config.clone())?,
            member: Member::default(),
            baselines: Baselines::new(values, protocol),
            sums: vec![HorizonSums::default(); protocol.horizons.len()],
        })
    }

    fn step(&mut self, t: usize, number: u64, protocol: &Protocol, fleet: &mut Fleet) {
        let values = self.baselines.values;
        let Some(value) = values.get(t) else { return };
        self.bank.update(*value);
        fleet.follow(&mut self.member, &self.bank, *value, t as u64, number);
        let origin = t >= protocol.test_from
            && t < protocol.test_until
            && (t - protocol.test_from).is_multiple_of(protocol.origin_every);
        let Some(said) = Some(t).filter(|_| origin).and_then(|t| self.baselines.at(t)) else { return };
        for (index, (sums, ahead)) in self.sums.iter_mut().zip(&protocol.horizons).enumerate() {
            let Some(outcome) = values.get(t.saturating_add(*ahead)).copied().flatten() else { continue };
            let Some(forecast) = fleet.forecast(&self.member, &self.bank, index, t as u64) else { continue };
            sums.count += 1.0;
            let bank = self.bank.forecast(*ahead).unwrap_or(forecast);
            let mut all = [(forecast.point, forecast.quantile(0.95)); Method::ALL.len()];
            all[1..=SIMPLE].copy_from_slice(&said.ahead(&self.baselines, index, *ahead));
            all[1 + SIMPLE] = (bank.point, bank.quantile(0.95));
            for (sums, (point, q95)) in sums.methods.iter_mut().zip(all) {
                sums.add(point, q95, outcome);
            }
        }
    }
}

/// What costs nothing, for one series.
struct Baselines<'a> {
    protocol: &'a Protocol,
    values: &'a [Option<f64>],
    filled: Vec<Option<f64>>,
    steps: Vec<f64>,
    /// 0.95 quantiles of the residuals before the test for each horizon: naive's in mean steps, naive's, and those of a day ago.
    residuals: Vec<[f64; 3]>,
}

/// What the baselines know at one origin.
struct Known {
    t: usize,
    last: f64,
    mean: f64,
    deviation: f64,
    median: f64,
    q95: f64,
}

impl<'a> Baselines<'a> {
    fn new(values: &'a [Option<f64>], protocol: &'a Protocol) -> Self {
        let filled = fill_forward(values);
        let steps = mean_steps(&filled, protocol.day);
        let mut all = Self { protocol, values, filled, steps, residuals: Vec::new() };
        all.residuals = protocol.horizons.iter().map(|ahead| all.quantiles(*ahead)).collect();
        all
    }

    fn quantiles(&self, ahead: usize) -> [f64; 3] {
        let until = self.protocol.test_from.min(self.values.len()).saturating_sub(ahead);
        let q95 = |residual: &dyn Fn(usize) -> Option<f64>| {
            quantile((self.protocol.calibrate_from..until).filter_map(residual).collect(), 0.95).unwrap_or(0.0)
        };
        let naive = |t: usize| Some(self.values[t + ahead]? - self.filled[t]?);
        let scaled = |t: usize| Some(naive(t)? / self.steps[t]).filter(|_| self.steps[t] > 0.0);
        let daily = |t: usize| Some(self.values[t + ahead]? - self.day_before(t, ahead)?);
        [q95(&scaled), q95(&naive), q95(&daily)]
    }

    fn day_before(&self, t: usize, ahead: usize) -> Option<f64> {
        self.filled[(t + ahead).checked_sub(self.protocol.day)?.min(t)]
    }

    fn at(&self, t: usize) -> Option<Known> {
        let last = self.filled[t]?;
        let from = (t + 1).saturating_sub(self.protocol.day);
        let mut day: Vec<f64> = self.values[from..=t].iter().flatten().copied().collect();
        if day.is_empty() {
            return Some(Known { t, last, mean: last, deviation: 0.0, median: last, q95: last });
        }
        day.sort_by(f64::total_cmp);
        let count = day.len() as f64;
        let mean = day.iter().sum::<f64>() / count;
        let deviation = (day.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt();
        let median = sorted_quantile(&day, 0.5)?;
        Some(Known { t, last, mean, deviation, median, q95: sorted_quantile(&day, 0.95)? })
    }
}

impl Known {
    /// Point and 0.95 quantile of the methods that cost nothing, in the order of [`Method::ALL`].
    fn ahead(&self, of: &Baselines<'_>, index: usize, ahead: usize) -> [(f64, f64); SIMPLE] {
        let [scaled, plain, daily] = of.residuals[index];
        let before = of.day_before(self.t, ahead).unwrap_or(self.last);
        [
            (self.last, self.last + scaled * of.steps[self.t]),
            (self.last, self.last + plain),
            (before, before + daily),
            (self.mean, self.mean + 1.645 * self.deviation),
            (self.median, self.q95),
        ]
    }
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

fn naive_scale(values: &[Option<f64>], until: usize) -> f64 {
    let end = until.min(values.len());
    let (sum, count) = values[..end]
        .windows(2)
        .filter_map(|pair| Some((pair[1]? - pair[0]?).abs()))
        .fold((0.0, 0.0), |(sum, count), step| (sum + step, count + 1.0));
    if count > 0.0 { sum / count } else { 0.0 }
}
