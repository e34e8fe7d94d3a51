//! Policies at equal numbers of migrations: who migrates more avoids more, so that nothing else is a comparison.

use super::Outcome;
use super::inject::{Injection, events};
use super::policy::{Nobody, Oracle, Policy, Predictor, Reactive, Setting};
use super::{Scenario, World, play, run};
use crate::bank::BankError;
use crate::cost::MigrationShape;
use crate::evaluate::{EvaluateError, Trace, pool_columns, sum};
use crate::quantile::sorted_quantile;
use serde::{Deserialize, Serialize};

/// Violation minutes that a move of the predictor has to avoid, for its curve.
pub const BENEFITS: [f64; 6] = [2.0, 3.0, 5.0, 7.0, 12.0, 20.0];
/// The score at which it looks for a move.
pub const ACT_ABOVE: f64 = 0.1;
/// Shares of the capacity at which reactive triggers act.
pub const REACTIVE: [f64; 2] = [0.85, 0.95];
/// Steps that the oracle has to avoid for a move.
const ORACLE: [usize; 3] = [1, 3, 6];

/// What is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// At most so many pools may send machines to each other; at least two.
    pub together: usize,
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

/// One policy with one setting over all groups of pools.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Policy.
    pub policy: String,
    /// Minutes that a move has to avoid, share of the capacity, or steps to be avoided.
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
    /// The same without the minutes that no placement avoids.
    #[serde(default)]
    pub avoidable_ratio: f64,
    /// The minutes that no placement avoids / theirs: no policy reaches less, with any number of migrations.
    #[serde(default)]
    pub least_ratio: f64,
    /// The oracle's least with as many or fewer migrations / theirs.
    #[serde(default)]
    pub oracle_ratio: f64,
}

/// All policies over all groups.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Comparison {
    /// Groups of pools.
    pub groups: usize,
    /// Events that were put in.
    pub events: usize,
    /// Violation minutes that no placement of the machines avoids: all pools together use more than all have, so that one of
    /// them exceeds its capacity. All policies have them.
    #[serde(default)]
    pub unavoidable_minutes: f64,
    /// Outcomes.
    pub points: Vec<Point>,
    /// The predictor at others' numbers of migrations.
    pub equal: Vec<AtEqualMoves>,
}

/// Makes groups of neighbouring pools of a list, the last of those that are left if they are at least two. A machine that is in several
/// pools of a group counts in the first.
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
    let together = settings.together.max(2);
    let groups = members.chunks(together).zip(columns.chunks(together)).enumerate();
    for (number, (group, series)) in groups.filter(|(_, (group, _))| group.len() > 1) {
        let mut scenario = Scenario {
            period_s: trace.period_s,
            names: Vec::new(),
            series: Vec::new(),
            pools: Vec::new(),
            capacity: vec![0.0; group.len()],
            warm_from: settings.from.saturating_sub(settings.warm),
            from: settings.from,
            until: trace.steps(),
            events: Vec::new(),
            shape: settings.shape,
        };
        for pool in 0..group.len() {
            for (name, series) in group[pool].iter().zip(&series[pool]) {
                if !scenario.names.contains(name) {
                    scenario.names.push(name.clone());
                    scenario.series.push(series);
                    scenario.pools.push(pool);
                }
            }
            add_pool(&mut scenario, pool, settings, (number * together) as u64);
        }
        if scenario.capacity.iter().all(|capacity| *capacity > 0.0) {
            scenarios.push(scenario);
        }
    }
    Ok(scenarios)
}

fn add_pool(scenario: &mut Scenario<'_>, pool: usize, settings: &Settings, earlier_pools: u64) {
    let of_pool: Vec<usize> = (0..scenario.pools.len()).filter(|machine| scenario.pools[*machine] == pool).collect();
    let series: Vec<_> = of_pool.iter().map(|machine| scenario.series[*machine]).collect();
    let mut before: Vec<f64> = sum(&series).into_iter().take(scenario.from).flatten().collect();
    before.sort_by(f64::total_cmp);
    scenario.capacity[pool] = sorted_quantile(&before, settings.capacity_quantile).unwrap_or(0.0);
    if let Some(injection) = settings.injection {
        let seeded = Injection { seed: injection.seed.wrapping_add(earlier_pools + pool as u64), ..injection };
        let machines: Vec<(usize, String)> =
            of_pool.iter().map(|machine| (*machine, scenario.names[*machine].clone())).collect();
        let steps = scenario.from..scenario.until;
        scenario.events.extend(events(&seeded, &machines, scenario.capacity[pool], scenario.period_s, steps));
    }
}

/// What all policies left of one scenario, in an order that is the same for all scenarios.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcomes {
    points: Vec<Point>,
    events: usize,
    unavoidable_minutes: f64,
}

/// Runs all policies over one scenario, the predictor once more with the declarations if there are events; `told` hears of each run
/// that is over. Scenarios know nothing of each other: a caller with several cores can run them side by side and [`join`] what comes out.
///
/// # Errors
/// [`BankError`] if the period or horizon cannot be forecast.
pub fn outcomes(
    scenario: &Scenario<'_>,
    horizon: usize,
    with_events: bool,
    told: impl Fn(),
) -> Result<Outcomes, BankError> {
    let pools = scenario.capacity.len();
    let mut points = Vec::new();
    let mut note = |policy: &str, setting: f64, outcome: Outcome| {
        points.push(Point { policy: policy.to_owned(), setting, outcome });
        told();
    };
    let play_all = |policy: &mut dyn Policy| run(scenario, policy);
    note("none", 0.0, play_all(&mut Nobody)?);
    for threshold in REACTIVE {
        note("reactive", threshold, play_all(&mut Reactive::new(pools, threshold))?);
    }
    for least in ORACLE {
        note("oracle", least as f64, play_all(&mut Oracle::new(pools, horizon, least))?);
    }
    let warm = Predictor::warm(scenario, horizon)?;
    let names = ["predictor", "predictor, events declared"];
    for (declared, name) in names.into_iter().enumerate().take(if with_events { 2 } else { 1 }) {
        for benefit_minutes in BENEFITS {
            let setting = Setting { act_above: ACT_ABOVE, benefit_minutes };
            let mut predictor = warm.with(setting, declared == 1);
            note(name, benefit_minutes, play(World::at(scenario, scenario.from), &mut predictor)?);
        }
    }
    Ok(Outcomes { points, events: scenario.events.len(), unavoidable_minutes: unavoidable_minutes(scenario) })
}

/// Minutes in which all pools together use more than all have: one of them at least exceeds its capacity.
fn unavoidable_minutes(scenario: &Scenario<'_>) -> f64 {
    let mut world = World::at(scenario, scenario.from);
    let capacity: f64 = scenario.capacity.iter().sum();
    let mut minutes = 0.0;
    while world.t < scenario.until {
        if (0..scenario.capacity.len()).map(|pool| world.sum(pool, 0)).sum::<f64>() > capacity {
            minutes += scenario.period_s / 60.0;
        }
        world.t += 1;
    }
    minutes
}

/// Sums what [`outcomes`] gave for each scenario, and compares.
#[must_use]
pub fn join(all: &[Outcomes]) -> Comparison {
    let mut points: Vec<Point> = all.first().map(|first| first.points.clone()).unwrap_or_default();
    for others in all.iter().skip(1) {
        for (point, other) in points.iter_mut().zip(&others.points) {
            point.outcome += &other.outcome;
        }
    }
    let unavoidable_minutes = all.iter().map(|one| one.unavoidable_minutes).sum();
    let equal = at_equal_moves(&points, unavoidable_minutes);
    Comparison { groups: all.len(), events: all.iter().map(|one| one.events).sum(), unavoidable_minutes, points, equal }
}

/// How many runs [`outcomes`] makes over so many scenarios.
#[must_use]
pub fn runs(scenarios: usize, with_events: bool) -> usize {
    scenarios * (1 + REACTIVE.len() + ORACLE.len() + BENEFITS.len() * if with_events { 2 } else { 1 })
}

fn at_equal_moves(points: &[Point], unavoidable: f64) -> Vec<AtEqualMoves> {
    let Some(none) = points.iter().find(|point| point.policy == "none") else { return Vec::new() };
    let of = |name: &str| points.iter().filter(|point| point.policy == name).collect::<Vec<&Point>>();
    let oracle = of("oracle");
    let mut equal = Vec::new();
    for policy in ["predictor", "predictor, events declared"] {
        let curve = of(policy);
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
                ratio: over(ours, theirs),
                avoidable_ratio: over(ours - unavoidable, theirs - unavoidable),
                least_ratio: over(unavoidable, theirs),
                oracle_ratio: over(best_within(&oracle, none, moves).outcome.violation_minutes, theirs),
            });
        }
    }
    equal
}

/// A ratio; with nothing below, 0 if there is nothing above either, else 1.
fn over(ours: f64, theirs: f64) -> f64 {
    if theirs > 0.0 { ours / theirs } else { f64::from(u8::from(ours > 0.0)) }
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
        Point {
            policy: policy.into(),
            setting,
            outcome: Outcome { moves, violation_minutes, minutes: 1_000.0, causes: Vec::new() },
        }
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
        let equal = at_equal_moves(&points, 10.0);
        assert_eq!(equal.len(), 2, "without declared events there is one predictor");
        assert_eq!((equal[0].ours, equal[0].our_moves, equal[0].setting, equal[0].ratio), (30.0, 4.0, 0.75, 0.75));
        assert_eq!(equal[0].avoidable_ratio, 20.0 / 30.0);
        assert_eq!((equal[0].least_ratio, equal[0].oracle_ratio), (0.25, 2.5), "there is no oracle but doing nothing");
        assert_eq!(
            (equal[1].ours, equal[1].setting, equal[1].ratio),
            (100.0, 0.0, 1.25),
            "with one move it can do nothing"
        );
    }
}
