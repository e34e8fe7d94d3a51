//! Policies at equal numbers of migrations: who migrates more avoids more, so that nothing else is a comparison.

use super::Outcome;
use super::inject::{Injection, events};
use super::policy::{Nobody, Oracle, Policy, Predictor, Reactive};
use super::{Scenario, run};
use crate::bank::BankError;
use crate::cost::MigrationShape;
use crate::evaluate::{EvaluateError, Trace, pool_columns, sum};
use crate::replay::sorted_quantile;
use serde::{Deserialize, Serialize};

/// Scores at which the predictor acts, for its curve.
pub const SCORES: [f64; 6] = [0.05, 0.1, 0.2, 0.35, 0.5, 0.75];
/// Shares of the capacity at which reactive triggers act.
pub const REACTIVE: [f64; 2] = [0.85, 0.95];
/// Steps that the oracle has to avoid for a move.
const ORACLE: [usize; 3] = [1, 3, 6];

/// What is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Steps ahead.
    pub horizon: usize,
    /// Steps before `from` in which policies only learn.
    pub warm: usize,
    /// First step that counts.
    pub from: usize,
    /// A pool's capacity is this quantile of its sum before `from`.
    pub capacity_quantile: f64,
    /// Events, if any.
    pub injection: Option<Injection>,
    /// What a migration has to carry.
    pub shape: MigrationShape,
}

/// One policy with one setting over all pairs of pools.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Policy.
    pub policy: String,
    /// Score, share of the capacity, or steps to be avoided.
    pub setting: f64,
    /// What it left.
    pub outcome: Outcome,
}

/// The predictor beside one other at the other's number of migrations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AtEqualMoves {
    /// The predictor's policy.
    pub policy: String,
    /// The other.
    pub against: String,
    /// Migrations of the other.
    pub moves: f64,
    /// Its violation minutes.
    pub theirs: f64,
    /// The predictor's least with as many or fewer migrations, over its settings and doing nothing. Chosen afterwards, of a few.
    pub ours: f64,
    /// Its migrations at that.
    pub our_moves: f64,
    /// Its setting at that; 0 = nothing is done.
    pub setting: f64,
    /// Ours / theirs.
    pub ratio: f64,
}

/// All policies over all pairs.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Comparison {
    /// Pairs of pools.
    pub pairs: usize,
    /// Events that were put in.
    pub events: usize,
    /// Outcomes.
    pub points: Vec<Point>,
    /// The predictor at others' numbers of migrations.
    pub equal: Vec<AtEqualMoves>,
}

/// Makes pairs of neighbouring pools of a list: each stands beside the next. A machine that is in both counts in the first.
///
/// # Errors
/// [`EvaluateError::Unknown`] names a machine without a column.
pub fn scenarios<'a>(
    trace: &'a Trace,
    members: &[Vec<String>],
    settings: &Settings,
) -> Result<Vec<Scenario<'a>>, EvaluateError> {
    if trace.steps() <= settings.from + settings.horizon {
        return Err(EvaluateError::Short { steps: trace.steps(), from: settings.from });
    }
    let columns = pool_columns(trace, members)?;
    let mut scenarios = Vec::new();
    for (number, (pair, series)) in members.chunks_exact(2).zip(columns.chunks_exact(2)).enumerate() {
        let mut scenario = Scenario {
            period_s: trace.period_s,
            names: Vec::new(),
            series: Vec::new(),
            pools: Vec::new(),
            capacity: [0.0; 2],
            warm_from: settings.from.saturating_sub(settings.warm),
            from: settings.from,
            until: trace.steps(),
            events: Vec::new(),
            shape: settings.shape,
        };
        for pool in [0, 1] {
            for (name, series) in pair[pool].iter().zip(&series[pool]) {
                if !scenario.names.contains(name) {
                    scenario.names.push(name.clone());
                    scenario.series.push(series);
                    scenario.pools.push(pool);
                }
            }
            add_pool(&mut scenario, pool, settings, number as u64);
        }
        if scenario.capacity.iter().all(|capacity| *capacity > 0.0) {
            scenarios.push(scenario);
        }
    }
    Ok(scenarios)
}

fn add_pool(scenario: &mut Scenario<'_>, pool: usize, settings: &Settings, pair: u64) {
    let of_pool: Vec<usize> = (0..scenario.pools.len()).filter(|machine| scenario.pools[*machine] == pool).collect();
    let series: Vec<_> = of_pool.iter().map(|machine| scenario.series[*machine]).collect();
    let mut before: Vec<f64> = sum(&series).into_iter().take(scenario.from).flatten().collect();
    before.sort_by(f64::total_cmp);
    scenario.capacity[pool] = sorted_quantile(&before, settings.capacity_quantile).unwrap_or(0.0);
    if let Some(injection) = settings.injection {
        let seeded = Injection { seed: injection.seed.wrapping_add(2 * pair + pool as u64), ..injection };
        let machines: Vec<(usize, String)> =
            of_pool.iter().map(|machine| (*machine, scenario.names[*machine].clone())).collect();
        let steps = scenario.from..scenario.until;
        scenario.events.extend(events(&seeded, &machines, scenario.capacity[pool], scenario.period_s, steps));
    }
}

/// Runs all policies over all scenarios; `told` hears of each run that is over.
///
/// # Errors
/// [`BankError`] if the period or horizon cannot be forecast.
pub fn compare(
    scenarios: &[Scenario<'_>],
    horizon: usize,
    mut told: impl FnMut(usize),
) -> Result<Comparison, BankError> {
    let events = scenarios.iter().map(|scenario| scenario.events.len()).sum();
    let mut all = Comparison { pairs: scenarios.len(), events, ..Comparison::default() };
    let mut runs = 0;
    let mut over = |policy: &str, setting: f64, make: &dyn Fn(f64) -> Result<Box<dyn Policy>, BankError>| {
        let mut outcome = Outcome::default();
        for scenario in scenarios {
            outcome += run(scenario, &mut *make(scenario.period_s)?)?;
            runs += 1;
            told(runs);
        }
        all.points.push(Point { policy: policy.to_owned(), setting, outcome });
        Ok::<(), BankError>(())
    };
    over("none", 0.0, &|_| Ok(Box::new(Nobody)))?;
    for threshold in REACTIVE {
        over("reactive", threshold, &|_| Ok(Box::new(Reactive::new(threshold))))?;
    }
    for least in ORACLE {
        over("oracle", least as f64, &|_| Ok(Box::new(Oracle::new(horizon, least))))?;
    }
    for declared in [false, true] {
        if declared && events == 0 {
            continue;
        }
        let name = if declared { "predictor, events declared" } else { "predictor" };
        for score in SCORES {
            let make = |period_s: f64| -> Result<Box<dyn Policy>, BankError> {
                Ok(Box::new(Predictor::new(period_s, horizon, score, declared)?))
            };
            over(name, score, &make)?;
        }
    }
    all.equal = at_equal_moves(&all.points);
    Ok(all)
}

/// How many runs [`compare`] makes.
#[must_use]
pub fn runs(scenarios: usize, with_events: bool) -> usize {
    scenarios * (1 + REACTIVE.len() + ORACLE.len() + SCORES.len() * if with_events { 2 } else { 1 })
}

fn at_equal_moves(points: &[Point]) -> Vec<AtEqualMoves> {
    let Some(none) = points.iter().find(|point| point.policy == "none") else { return Vec::new() };
    let mut equal = Vec::new();
    for policy in ["predictor", "predictor, events declared"] {
        let curve: Vec<&Point> = points.iter().filter(|point| point.policy == policy).collect();
        if curve.is_empty() {
            continue;
        }
        for other in points.iter().filter(|point| point.policy == "reactive" || point.policy == "oracle") {
            let (moves, theirs) = (other.outcome.moves, other.outcome.violation_minutes);
            let best = best_within(&curve, none, moves);
            let ours = best.outcome.violation_minutes;
            equal.push(AtEqualMoves {
                policy: policy.to_owned(),
                against: format!("{} {}", other.policy, other.setting),
                moves,
                theirs,
                ours,
                our_moves: best.outcome.moves,
                setting: best.setting,
                ratio: if theirs > 0.0 { ours / theirs } else { f64::from(u8::from(ours > 0.0)) },
            });
        }
    }
    equal
}

/// The point with the fewest violation minutes, and of those the fewest moves, that has at most `moves` moves.
fn best_within<'a>(curve: &[&'a Point], none: &'a Point, moves: f64) -> &'a Point {
    curve.iter().copied().filter(|point| point.outcome.moves <= moves).fold(none, |best, point| {
        let key = |point: &Point| (point.outcome.violation_minutes, point.outcome.moves);
        if key(point) < key(best) { point } else { best }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(policy: &str, setting: f64, moves: f64, violation_minutes: f64) -> Point {
        Point { policy: policy.into(), setting, outcome: Outcome { moves, violation_minutes, minutes: 1_000.0 } }
    }

    #[test]
    fn the_predictor_never_gets_more_moves_than_the_other() {
        let points = [
            point("none", 0.0, 0.0, 100.0),
            point("reactive", 0.85, 10.0, 40.0),
            point("reactive", 0.95, 1.0, 80.0),
            point("predictor", 0.2, 20.0, 10.0),
            point("predictor", 0.5, 9.0, 30.0),
            point("predictor", 0.75, 4.0, 30.0),
        ];
        let equal = at_equal_moves(&points);
        assert_eq!(equal.len(), 2, "without declared events there is one predictor");
        assert_eq!((equal[0].ours, equal[0].our_moves, equal[0].setting, equal[0].ratio), (30.0, 4.0, 0.75, 0.75));
        assert_eq!(
            (equal[1].ours, equal[1].setting, equal[1].ratio),
            (100.0, 0.0, 1.25),
            "with one move it can do nothing"
        );
    }
}
