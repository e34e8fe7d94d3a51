//! Times and sizes on generated data.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use predictor::evaluate::measure_cost;
use predictor::fleet::{Fleet, Member};
use predictor::model::additive::Additive;
use predictor::model::arima::Arima;
use predictor::model::ets::Ets;
use predictor::model::fit::{Dear, History};
use predictor::model::forest::Forest;
use predictor::model::lstm::Lstm;
use predictor::model::mstl::Mstl;
use predictor::model::{Budget, Model};
use predictor::{BankConfig, BankError, Maxima, PerResource, PoolConfig, Pools, Resource, Sample};
use serde::Serialize;

/// One bank, as `headroom forecast evaluate` measures it.
#[derive(Debug, Serialize)]
pub struct Bank {
    pub ns_per_update_and_forecast: f64,
    pub state_bytes: usize,
}

/// All machines of a large installation at one step, on one core.
#[derive(Debug, Serialize)]
pub struct Tick {
    pub machines: usize,
    pub resources: usize,
    pub pools: usize,
    /// Banks alone, their update: every sample taken.
    pub update: Times,
    /// Banks alone, what they say: three horizons with their quantiles read.
    pub forecasts: Times,
    /// The distributions of the pools' maxima alone: updated, watched and asked for a probability.
    pub distributions: Times,
    /// Whole pools as hostd runs them, all of that in it: members, events, sums, maxima, probabilities, lessons for trees.
    pub whole: Times,
    /// The same once trees are fitted, which some forecasts of each machine ask.
    pub whole_with_trees: Times,
}

impl Tick {
    /// All that was measured, with names for people.
    pub fn stages(&self) -> [(&'static str, &Times); 5] {
        [
            ("banks: update", &self.update),
            ("banks: forecasts read", &self.forecasts),
            ("distributions of maxima", &self.distributions),
            ("whole pools", &self.whole),
            ("whole pools, trees fitted", &self.whole_with_trees),
        ]
    }
}

/// Times of ticks in milliseconds.
#[derive(Debug, Serialize)]
pub struct Times {
    pub median_ms: f64,
    pub p99_ms: f64,
    pub slowest_ms: f64,
    pub ticks: usize,
}

/// The dear models.
#[derive(Debug, Serialize)]
pub struct Models {
    /// Fitted to a fortnight of five minutes.
    pub fits: Vec<Fit>,
    /// One machine's upper quantiles corrected by fitted trees, a level.
    pub trees_ns: f64,
}

#[derive(Debug, Serialize)]
pub struct Fit {
    pub name: &'static str,
    pub ms: f64,
    pub state_bytes: usize,
}

/// Ticks before and during a measurement. A regression is solved about every hundredth step.
const WARM: usize = 200;
const MEASURED: usize = 100;

/// Time that this thread has run in nanoseconds, so that other work on the computer is not counted; wall time if the kernel does
/// not say.
fn run_time_ns(since: Instant) -> u64 {
    let wall = || u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let said = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok();
    said.map_or_else(wall, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

fn timed<T>(since: Instant, work: impl FnOnce() -> T) -> (T, f64) {
    let start = run_time_ns(since);
    let done = work();
    (done, run_time_ns(since).saturating_sub(start) as f64)
}

/// Between 0 and 1, the same in every run.
fn noise(state: &mut u64) -> f64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f64 / (1_u64 << 24) as f64
}

pub fn bank() -> Result<Bank> {
    let since = Instant::now();
    let config = BankConfig { seasons: predictor::bank::cycles(300.0), ..BankConfig::default() };
    let cost = measure_cost(&config, || run_time_ns(since)).context("the default configuration")?;
    Ok(Bank { ns_per_update_and_forecast: cost.ns_per_update_and_forecast, state_bytes: cost.state_bytes })
}

/// Of times in nanoseconds.
fn summary(mut times: Vec<f64>) -> Times {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let place = (share * times.len() as f64) as usize;
        times.get(place.min(times.len().saturating_sub(1))).map_or(0.0, |time| time / 1e6)
    };
    Times { median_ms: at(0.5), p99_ms: at(0.99), slowest_ms: at(1.0), ticks: times.len() }
}

pub fn tick(machines: usize) -> Result<Tick> {
    let pools = machines.div_ceil(100);
    let (update, forecasts) = banks(machines)?;
    let distributions = distributions(pools)?;
    let (whole, whole_with_trees) = pool_ticks(machines, pools)?;
    Ok(Tick {
        machines,
        resources: Resource::ALL.len(),
        pools,
        update,
        forecasts,
        distributions,
        whole,
        whole_with_trees,
    })
}

/// The maxima of all pools' sums, as a pool asks for them.
fn distributions(pools: usize) -> Result<Times> {
    const LIMIT: f64 = 60.0;
    let config = BankConfig::for_horizon(300.0, 12);
    let all = (0..pools * Resource::ALL.len()).map(|_| Maxima::new(&config));
    let mut all = all.collect::<Result<Vec<_>, _>>()?;
    let (since, mut state, mut times) = (Instant::now(), 5, Vec::new());
    for t in 0..WARM + MEASURED {
        let values: Vec<f64> = all.iter().map(|_| 50.0 + 10.0 * noise(&mut state)).collect();
        let (kept, took) = timed(since, || {
            let mut kept = 0.0;
            for (maxima, value) in all.iter_mut().zip(&values) {
                maxima.update(Some(*value));
                maxima.watch(LIMIT);
                let said = config.horizons.iter().filter_map(|steps| maxima.exceedance(*steps, LIMIT));
                kept += said.sum::<f64>();
            }
            kept
        });
        std::hint::black_box(kept);
        if t >= WARM {
            times.push(took);
        }
    }
    Ok(summary(times))
}

fn banks(machines: usize) -> Result<(Times, Times)> {
    let config = BankConfig { seasons: predictor::bank::cycles(300.0), ..BankConfig::default() };
    let count = machines * Resource::ALL.len();
    // As a pool does with its machines: not all regressions at the same step.
    let shared = Arc::new(config.clone());
    let banks = (0..count).map(|number| Ok(predictor::Bank::shared(&shared)?.staggered(number as u32)));
    let mut banks = banks.collect::<Result<Vec<_>, BankError>>()?;
    let (since, mut state, mut updates, mut reads) = (Instant::now(), 1, Vec::new(), Vec::new());
    for t in 0..WARM + MEASURED {
        let values: Vec<f64> = (0..count).map(|_| 50.0 + 10.0 * noise(&mut state)).collect();
        let ((), updated) = timed(since, || {
            banks.iter_mut().zip(&values).for_each(|(bank, value)| bank.update(Some(*value)));
        });
        let (kept, read) = timed(since, || {
            let said =
                |bank: &predictor::Bank, steps: usize| bank.forecast(steps).map_or(0.0, |said| said.quantiles[2]);
            banks.iter().flat_map(|bank| config.horizons.iter().map(|steps| said(bank, *steps))).sum::<f64>()
        });
        std::hint::black_box(kept);
        if t >= WARM {
            updates.push(updated);
            reads.push(read);
        }
    }
    Ok((summary(updates), summary(reads)))
}

/// Whole pools, without trees and with them.
fn pool_ticks(machines: usize, pools: usize) -> Result<(Times, Times)> {
    let config = PoolConfig { step_s: 300.0, horizon_steps: 12, ..PoolConfig::default() };
    let mut all = Pools::new(config)?;
    let names: Vec<String> = (0..pools).map(|pool| format!("pool-{pool:03}")).collect();
    let of = machines.div_ceil(pools);
    let capacity = PerResource::from_fn(|_| Some(60.0 * of as f64));
    let (since, mut state, mut times) = (Instant::now(), 2, [Vec::new(), Vec::new()]);
    for t in 0..WARM + 2 * MEASURED {
        if t == WARM + MEASURED {
            anyhow::ensure!(
                all.refit(&mut Budget::unlimited()) > 0,
                "no trees could be fitted to what the ticks taught"
            );
        }
        let samples: Vec<Vec<Sample>> = (0..pools)
            .map(|_| {
                let sample = |machine: usize| Sample {
                    machine: format!("machine-{machine:05}"),
                    values: PerResource::from_fn(|_| Some(50.0 + 10.0 * noise(&mut state))),
                };
                (0..of).map(sample).collect()
            })
            .collect();
        let (done, took) = timed(since, || {
            names.iter().zip(&samples).try_for_each(|(pool, samples)| {
                let tick = predictor::Tick { now_s: 300.0 * t as f64, capacity, samples, events: &[] };
                all.tick(pool, &tick).map(|contention| drop(std::hint::black_box(contention)))
            })
        });
        done?;
        if t >= WARM {
            times[(t - WARM) / MEASURED].push(took);
        }
    }
    let [without, with] = times;
    Ok((summary(without), summary(with)))
}

pub fn models() -> Result<Models> {
    let (since, mut state) = (Instant::now(), 3);
    let wave = |t: u32, length: u32| (f64::from(t % length) * std::f64::consts::TAU / f64::from(length)).sin();
    let mut value = |t: u32| 60.0 + 5.0 * wave(t, 12) + 20.0 * wave(t, 288) + 4.0 * noise(&mut state);
    let series: Vec<Option<f64>> = (0..14 * 288).map(|t| Some(value(t))).collect();
    let mut fits = vec![
        fit(since, Ets::new(288), &series)?,
        fit(since, Mstl::new(&[12, 288]), &series)?,
        fit(since, Arima::default(), &series)?,
        fit(since, Additive::new(&[12, 288]), &series)?,
        fit(since, Forest::new(&[1, 3, 12], &[12, 288]), &series)?,
    ];
    if Lstm::CAN_BE_FITTED {
        fits.push(fit(since, Lstm::new(&[1, 3, 12], &[12, 288], 1), &series)?);
    }
    Ok(Models { fits, trees_ns: trees(since)? })
}

fn fit<D: Dear + Model>(since: Instant, mut model: D, series: &[Option<f64>]) -> Result<Fit> {
    let history = History::new(series, 0, &[]);
    let (done, took) = timed(since, || model.fit(&history, &mut Budget::unlimited()));
    anyhow::ensure!(done, "{} could not be fitted to a fortnight", D::NAME);
    Ok(Fit { name: D::NAME, ms: took / 1e6, state_bytes: model.state_bytes() })
}

/// What a forecast with fitted trees takes beyond one without, for each of the three levels that are corrected.
fn trees(since: Instant) -> Result<f64> {
    const LEVELS: f64 = 3.0;
    const ROUNDS: usize = 20_000;
    let config = BankConfig { horizons: vec![1], ..BankConfig::default() };
    let (mut fleet, mut bank) = (Fleet::new(1, &[12, 288], 10_000, 0), predictor::Bank::new(config)?);
    let (mut member, mut state) = (Member::default(), 4);
    for t in 0..40_000 {
        let value = Some(50.0 + 10.0 * noise(&mut state));
        bank.update(value);
        fleet.follow(&mut member, &bank, value, t, 0);
    }
    let read = |fleet: &Fleet| {
        let mut kept = 0.0;
        for t in 0..ROUNDS {
            kept += fleet.forecast(&member, &bank, 0, t as u64).map_or(0.0, |forecast| forecast.quantiles[2]);
        }
        std::hint::black_box(kept);
    };
    let ((), without) = timed(since, || read(&fleet));
    anyhow::ensure!(fleet.refit(&mut Budget::unlimited()) > 0, "trees could not be fitted");
    let ((), with) = timed(since, || read(&fleet));
    Ok((with - without).max(0.0) / ROUNDS as f64 / LEVELS)
}
