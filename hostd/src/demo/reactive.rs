//! What would have happened without a forecast: the recorded demand of a pool, replayed against a plain threshold.
//!
//! The replay is kind to the threshold: its migration takes as long as the one that was measured, although that one ran
//! on a pool that was not yet short of processor.

use serde::Serialize;

/// Demand of the machines that began in the pool, wherever they run now.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Demand {
    /// Seconds since the start of the load.
    pub at_s: f64,
    /// Processor cores that these machines used.
    pub cores: f64,
}

/// A reactive trigger.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Threshold {
    /// Share of the capacity that fires it.
    pub share: f64,
    /// In so many successive samples.
    pub samples: usize,
}

impl Default for Threshold {
    fn default() -> Self {
        Self { share: 0.95, samples: 3 }
    }
}

/// What the threshold would have suffered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Replay {
    /// When demand exceeded the capacity and stayed there for two samples or more; `None` if it never did.
    pub contention_at_s: Option<f64>,
    /// When the threshold would have fired.
    pub fired_at_s: Option<f64>,
    /// When its migration would have ended.
    pub relieved_at_s: Option<f64>,
    /// Seconds in which demand exceeded the capacity until then, or until the end of the record.
    pub violation_s: f64,
    /// The record ends before the relief: the violation is at least as long as told.
    pub cut_short: bool,
}

/// Replays `record` (ascending in time) against a threshold whose migration takes `migration_s`.
pub fn replay(record: &[Demand], capacity_cores: f64, threshold: Threshold, migration_s: f64) -> Replay {
    let contention_at_s = first_run(record, 2, |cores| cores > capacity_cores).map(|run| run[0].at_s);
    let fired = first_run(record, threshold.samples.max(1), |cores| cores >= threshold.share * capacity_cores);
    let fired_at_s = fired.and_then(<[Demand]>::last).map(|sample| sample.at_s);
    let relieved_at_s = fired_at_s.map(|at| at + migration_s);
    let end = relieved_at_s.unwrap_or(f64::INFINITY);
    let over = record.windows(2).filter(|pair| pair[0].cores > capacity_cores && pair[0].at_s < end);
    let violation_s = over.map(|pair| pair[1].at_s.min(end) - pair[0].at_s).sum();
    let recorded_until = record.last().map_or(0.0, |sample| sample.at_s);
    let over_at_end = record.last().is_some_and(|sample| sample.cores > capacity_cores);
    Replay { contention_at_s, fired_at_s, relieved_at_s, violation_s, cut_short: over_at_end && end > recorded_until }
}

/// The first `length` successive samples for which `holds`.
fn first_run(record: &[Demand], length: usize, holds: impl Fn(f64) -> bool) -> Option<&[Demand]> {
    record.windows(length).find(|run| run.iter().all(|sample| holds(sample.cores)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One sample a second.
    fn record(cores: &[f64]) -> Vec<Demand> {
        cores.iter().enumerate().map(|(second, cores)| Demand { at_s: second as f64, cores: *cores }).collect()
    }

    #[test]
    fn a_step_over_the_capacity_hurts_until_the_threshold_has_moved_a_machine() {
        let replay = replay(&record(&[0.5, 0.5, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2]), 1.0, Threshold::default(), 2.0);
        assert_eq!(replay.contention_at_s, Some(2.0));
        assert_eq!(replay.fired_at_s, Some(4.0));
        assert_eq!(replay.relieved_at_s, Some(6.0));
        assert!((replay.violation_s - 4.0).abs() < 1e-9, "{replay:?}");
        assert!(!replay.cut_short);
    }

    #[test]
    fn a_slow_ramp_gives_the_threshold_time() {
        let ramp: Vec<f64> = (0..60).map(|second| 0.8 + 0.005 * f64::from(second)).collect();
        let replay = replay(&record(&ramp), 1.0, Threshold::default(), 2.0);
        assert_eq!(replay.violation_s, 0.0);
        assert!(replay.fired_at_s < replay.contention_at_s);
    }

    #[test]
    fn one_sample_over_the_capacity_is_no_contention_but_is_counted() {
        let replay = replay(&record(&[0.5, 1.1, 0.5, 0.5]), 1.0, Threshold::default(), 2.0);
        assert_eq!((replay.contention_at_s, replay.fired_at_s), (None, None));
        assert!((replay.violation_s - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_record_that_ends_early_says_so() {
        let replay = replay(&record(&[0.5, 1.2, 1.2, 1.2]), 1.0, Threshold::default(), 30.0);
        assert!(replay.cut_short);
        assert!((replay.violation_s - 2.0).abs() < 1e-9, "{replay:?}");
    }

    #[test]
    fn an_empty_record_is_quiet() {
        assert_eq!(replay(&[], 1.0, Threshold::default(), 1.0), Replay::default());
    }
}
