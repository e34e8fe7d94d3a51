//! Recorded traces, and how the predictor would have done on them: what `headroom forecast evaluate` prints.
//!
//! Pure: the trace is given, the report is returned; who measures the cost brings the clock.

use crate::bank::{Bank, BankConfig, BankError, cycles};
use crate::replay::panels::{PanelSummary, replay_panels};
use crate::replay::pool::replay_pools;
use crate::replay::summary::{MachineSummary, PoolSummary, machines, pools};
use crate::replay::{Protocol, replay_machines};
use crate::sample::plausible;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use thiserror::Error;

/// One recorded series, `None` where nothing was measured.
pub type Series = Vec<Option<f64>>;

/// What was recorded of one resource of many machines, all at the same times.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Trace {
    /// Seconds between samples.
    pub period_s: f64,
    /// Names of the machines.
    pub names: Vec<String>,
    /// Their series, all of the same length.
    pub columns: Vec<Series>,
}

impl Trace {
    /// Number of samples of each machine.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.columns.first().map_or(0, Vec::len)
    }

    /// The series of a machine.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<&Series> {
        self.columns.get(self.names.iter().position(|known| known == name)?)
    }
}

/// Why a trace cannot be evaluated.
#[derive(Debug, Error, PartialEq)]
pub enum EvaluateError {
    /// A setting cannot be used.
    #[error(transparent)]
    Bank(#[from] BankError),
    /// A pool names a machine that the trace lacks.
    #[error("pool {pool} has machine {machine:?}, which is not a column of the trace: correct the list of pools")]
    Unknown {
        /// Number of the pool, from 1.
        pool: usize,
        /// The machine.
        machine: String,
    },
    /// The trace ends before the test begins.
    #[error(
        "the trace has {steps} samples and the test starts at sample {from}: start it earlier, or give a longer trace"
    )]
    Short {
        /// Samples.
        steps: usize,
        /// Start of the test.
        from: usize,
    },
}

/// The default configuration for a trace and the protocol's horizons.
#[must_use]
pub fn bank_config(period_s: f64, protocol: &Protocol) -> BankConfig {
    BankConfig { horizons: protocol.horizons.clone(), seasons: cycles(period_s), ..BankConfig::default() }
}

fn long_enough(trace: &Trace, protocol: &Protocol) -> Result<(), EvaluateError> {
    let (steps, from) = (trace.steps(), protocol.test_from);
    if steps <= from.saturating_add(1) { Err(EvaluateError::Short { steps, from }) } else { Ok(()) }
}

/// Forecasts each machine of a trace and scores what was said.
///
/// # Errors
/// [`EvaluateError`] says what is wrong with the trace or the protocol.
pub fn evaluate_machines(trace: &Trace, protocol: &Protocol) -> Result<MachineSummary, EvaluateError> {
    long_enough(trace, protocol)?;
    let config = bank_config(trace.period_s, protocol);
    Ok(machines(&replay_machines(&trace.columns, protocol, &config)?, protocol, trace.period_s))
}

/// Forecasts the sum of each pool's members, and scores the probabilities that it exceeds the pool's capacity.
///
/// # Errors
/// [`EvaluateError`] says what is wrong with the trace, the pools or the protocol.
pub fn evaluate_pools(
    trace: &Trace,
    members: &[Vec<String>],
    protocol: &Protocol,
) -> Result<PoolSummary, EvaluateError> {
    long_enough(trace, protocol)?;
    let config = bank_config(trace.period_s, protocol);
    let sums: Vec<Series> = pool_columns(trace, members)?.iter().map(|columns| sum(columns)).collect();
    let said = replay_pools(&sums, protocol, &config)?;
    Ok(pools(&said, members.len(), protocol, trace.period_s))
}

/// Panels of dear models for at most `panels` machines of a trace, beside their banks and the trees over all machines.
///
/// # Errors
/// [`EvaluateError`] says what is wrong with the trace or the protocol.
pub fn evaluate_panels(trace: &Trace, protocol: &Protocol, panels: usize) -> Result<PanelSummary, EvaluateError> {
    long_enough(trace, protocol)?;
    let config = bank_config(trace.period_s, protocol);
    Ok(replay_panels(&trace.columns, protocol, &config, panels)?)
}

/// The same for the sums of pools.
///
/// # Errors
/// [`EvaluateError`] says what is wrong with the trace, the pools or the protocol.
pub fn evaluate_pool_panels(
    trace: &Trace,
    members: &[Vec<String>],
    protocol: &Protocol,
    panels: usize,
) -> Result<PanelSummary, EvaluateError> {
    let columns = pool_columns(trace, members)?.iter().map(|columns| sum(columns)).collect();
    let sums = Trace { period_s: trace.period_s, names: vec![String::new(); members.len()], columns };
    evaluate_panels(&sums, protocol, panels)
}

/// The series of each pool's members.
///
/// # Errors
/// [`EvaluateError::Unknown`] names the first member that has no column.
pub fn pool_columns<'a>(trace: &'a Trace, members: &[Vec<String>]) -> Result<Vec<Vec<&'a Series>>, EvaluateError> {
    let places: HashMap<&str, &Series> = trace.names.iter().map(String::as_str).zip(&trace.columns).collect();
    let column = |pool: usize, machine: &String| {
        places
            .get(machine.as_str())
            .copied()
            .ok_or_else(|| EvaluateError::Unknown { pool: pool + 1, machine: machine.clone() })
    };
    members
        .iter()
        .enumerate()
        .map(|(pool, machines)| machines.iter().map(|machine| column(pool, machine)).collect())
        .collect()
}

/// The sum of machines, a gap bridged by the value before it.
#[must_use]
pub fn sum(columns: &[&Series]) -> Series {
    let mut last = vec![None; columns.len()];
    let steps = columns.iter().map(|column| column.len()).min().unwrap_or(0);
    (0..steps)
        .map(|t| {
            for (last, column) in last.iter_mut().zip(columns) {
                *last = plausible(column[t]).or(*last);
            }
            last.iter().flatten().copied().reduce(|a, b| a + b)
        })
        .collect()
}

/// What the bank costs.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Cost {
    /// One sample taken and all horizons with their quantiles read, in nanoseconds of one core.
    pub ns_per_update_and_forecast: f64,
    /// State of one machine and resource in bytes, heap included.
    pub state_bytes: usize,
}

/// Banks measured at once: more than a cache holds, as on a host that watches many machines.
const BANKS: usize = 1_000;
/// Samples before the measurement: then the regression is solved as seldom as in the long run.
const WARM: usize = 1_000;
/// Parts of the measurement; the quickest counts, since what else runs on the machine only ever adds.
const PARTS: usize = 8;

/// Measures the cost of a bank; `now_ns` is the time that this thread has run, in nanoseconds.
///
/// # Errors
/// [`BankError`] if `config` cannot be used.
pub fn measure_cost(config: &BankConfig, mut now_ns: impl FnMut() -> u64) -> Result<Cost, BankError> {
    let mut banks = (0..BANKS).map(|_| Bank::new(config.clone())).collect::<Result<Vec<_>, _>>()?;
    let mut state = 1_u64;
    let mut rounds = |banks: &mut Vec<Bank>, rounds: usize| {
        let mut kept = 0.0;
        for _ in 0..rounds {
            for bank in banks.iter_mut() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                bank.update(Some(50.0 + (state >> 40) as f64 / 1e6));
                for steps in &config.horizons {
                    kept += bank.forecast(*steps).map_or(0.0, |forecast| forecast.quantiles[2]);
                }
            }
        }
        std::hint::black_box(kept);
    };
    rounds(&mut banks, WARM);
    // Each part holds one solution of the regression at every horizon.
    let each = config.refit_every.clamp(1, 1_000) as usize;
    let mut quickest = f64::MAX;
    for _ in 0..PARTS {
        let start = now_ns();
        rounds(&mut banks, each);
        quickest = quickest.min(now_ns().saturating_sub(start) as f64 / (BANKS * each) as f64);
    }
    Ok(Cost { ns_per_update_and_forecast: quickest, state_bytes: banks[0].state_bytes() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three machines of twenty days at five minutes, two of them with a daily cycle; the third fails for a day.
    fn trace() -> Trace {
        let mut state = 1_u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / (1_u64 << 24) as f64
        };
        let mut column = |cycle: f64, gap: bool| -> Series {
            (0..20 * 288)
                .map(|t| {
                    let day = (f64::from(t) * std::f64::consts::TAU / 288.0).sin();
                    let value = 30.0 + cycle * day + 4.0 * noise();
                    (!(gap && (3_500..3_788).contains(&t))).then_some(value)
                })
                .collect()
        };
        let columns = vec![column(20.0, false), column(15.0, false), column(0.0, true)];
        Trace { period_s: 300.0, names: ["a", "b", "c"].map(str::to_owned).to_vec(), columns }
    }

    #[test]
    fn a_short_trace_is_tested_from_its_middle_and_the_cycle_is_found() {
        let trace = trace();
        let protocol = Protocol::new(trace.period_s, trace.steps(), &[5.0, 15.0, 60.0], None);
        assert_eq!((protocol.horizons.clone(), protocol.test_from), (vec![1, 3, 12], 10 * 288));
        let summary = evaluate_machines(&trace, &protocol).expect("sound");
        assert_eq!(summary.machines, 3);
        assert!(summary.mae_over_naive["60"] < 0.5, "{:?}", summary.mae_over_naive);
        assert!(summary.pinball95_over_naive["60"] < 0.6, "{:?}", summary.pinball95_over_naive);
        assert!((summary.coverage95["5"] - 0.95).abs() < 0.03, "{:?}", summary.coverage95);
        assert_eq!(summary.baselines["naive"].mae_over_naive["5"], 1.0);
        assert!(summary.baselines["daily_naive"].mae_over_naive["60"] < 1.0, "it has a daily cycle");
        let members = vec![vec!["a".to_owned(), "b".to_owned(), "c".to_owned()]];
        let pool = evaluate_pools(&trace, &members, &protocol).expect("sound");
        assert!(pool.brier["60"] < pool.baselines["naive"]["60"], "{pool:?}");
        assert!(pool.brier["60"] < pool.baselines["n_sigma"]["60"]);
        assert!(pool.ece["60"] < 0.05);
    }

    #[test]
    fn what_cannot_be_evaluated_is_named() {
        let trace = trace();
        let protocol = Protocol::new(trace.period_s, trace.steps(), &[5.0], Some(30.0));
        assert!(matches!(evaluate_machines(&trace, &protocol), Err(EvaluateError::Short { .. })));
        let protocol = Protocol::new(trace.period_s, trace.steps(), &[5.0], None);
        let refused = evaluate_pools(&trace, &[vec!["nobody".to_owned()]], &protocol);
        assert!(refused.is_err_and(|error| error.to_string().contains("nobody")));
        let protocol = Protocol::new(trace.period_s, trace.steps(), &[], None);
        assert!(matches!(evaluate_machines(&trace, &protocol), Err(EvaluateError::Bank(BankError::Horizons(_)))));
    }

    #[test]
    fn what_no_meter_gives_changes_no_score() {
        let mut trace = trace();
        let protocol = Protocol::new(trace.period_s, trace.steps(), &[5.0, 60.0], None);
        // Origins are an hour apart: all of these are outcomes, and some of them origins.
        let places: Vec<usize> = (protocol.test_from..trace.steps()).step_by(37).collect();
        places.iter().for_each(|place| trace.columns[0][*place] = None);
        let with_gaps = evaluate_machines(&trace, &protocol).expect("sound");
        for (place, bad) in places.iter().zip([f64::INFINITY, -1.0, f64::NAN, 1e300].iter().cycle()) {
            trace.columns[0][*place] = Some(*bad);
        }
        assert_eq!(evaluate_machines(&trace, &protocol).expect("sound"), with_gaps);
        assert_eq!(sum(&[&vec![Some(1.0), Some(f64::INFINITY)], &vec![Some(2.0), Some(-7.0)]]), [Some(3.0); 2]);
        let far = Protocol::new(1e-300, trace.steps(), &[5.0], Some(f64::INFINITY));
        assert!(matches!(evaluate_machines(&trace, &far), Err(EvaluateError::Short { .. })));
    }

    /// What is said at an origin must not depend on anything after it: the days before are scored alike when those after change.
    #[test]
    fn what_comes_later_changes_nothing_that_was_said_before() {
        let mut trace = trace();
        let mut protocol = Protocol::new(trace.period_s, trace.steps(), &[5.0, 60.0], None);
        protocol.test_until = protocol.test_from + 5 * 288;
        let members = vec![vec!["a".to_owned(), "b".to_owned(), "c".to_owned()]];
        let machines = evaluate_machines(&trace, &protocol).expect("sound");
        let pools = evaluate_pools(&trace, &members, &protocol).expect("sound");
        for column in &mut trace.columns {
            column[protocol.test_until + 12..].fill(Some(1e6));
        }
        assert_eq!(evaluate_machines(&trace, &protocol).expect("sound"), machines);
        assert_eq!(evaluate_pools(&trace, &members, &protocol).expect("sound"), pools);
    }

    #[test]
    fn the_cost_is_what_the_clock_says() {
        let mut now = 0;
        let config = BankConfig { refit_every: 1, ..BankConfig::default() };
        let cost = measure_cost(&config, || {
            now += 3_000_000;
            now
        });
        assert_eq!(cost.expect("sound").ns_per_update_and_forecast, 3_000.0);
    }
}
