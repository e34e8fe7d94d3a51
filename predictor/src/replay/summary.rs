//! Scores of many machines and pools in one table.

use super::pool::{Bin, ProbabilityScore, Said, reliability, score};
use super::{MachineScore, Method, Protocol, Sums};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A number for each horizon, which is named in minutes.
pub type ByHorizon = BTreeMap<String, f64>;

/// Scores of one resource over all machines. Ratios are of means over machines, each machine in units of its own scale (MASE:
/// Hyndman and Koehler, *International Journal of Forecasting* 22, 2006), so that large machines do not outweigh the others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MachineSummary {
    /// Machines scored.
    pub machines: usize,
    /// Mean absolute error over that of naive.
    pub mae_over_naive: ByHorizon,
    /// 0.95 pinball loss over that of naive with its past residuals in units of the recent mean step.
    pub pinball95_over_naive: ByHorizon,
    /// Share of outcomes not above the 0.95 quantile.
    pub coverage95: ByHorizon,
    /// Machines, in per cent, of which that share is off by more than three points.
    pub machines_off_percent: ByHorizon,
    /// Mean absolute scaled error.
    pub mase: ByHorizon,
    /// As `mae_over_naive`, of sums over machines.
    pub mae_over_naive_by_sum: ByHorizon,
    /// As `pinball95_over_naive`, of sums over machines.
    pub pinball95_over_naive_by_sum: ByHorizon,
    /// The same four of what it is compared with, by the names of [`Method`].
    pub baselines: BTreeMap<String, MethodSummary>,
}

/// Scores of one method.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MethodSummary {
    /// Mean absolute error over that of naive.
    pub mae_over_naive: ByHorizon,
    /// 0.95 pinball loss over that of naive with scaled residuals.
    pub pinball95_over_naive: ByHorizon,
    /// Share of outcomes not above the 0.95 quantile.
    pub coverage95: ByHorizon,
    /// Machines, in per cent, of which that share is off by more than three points.
    pub machines_off_percent: ByHorizon,
}

/// Scores of all pools together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolSummary {
    /// Pools scored.
    pub pools: usize,
    /// Brier score.
    pub brier: ByHorizon,
    /// Expected calibration error.
    pub ece: ByHorizon,
    /// 1 - Brier / Brier of the base rate.
    pub skill: ByHorizon,
    /// The same of origins at which the pool was quiet.
    pub skill_from_quiet: ByHorizon,
    /// Area under the ROC curve of these.
    pub auc_from_quiet: ByHorizon,
    /// Share of origins before an exceedance.
    pub base_rate: ByHorizon,
    /// What was said and what came.
    pub reliability: BTreeMap<String, Vec<Bin>>,
    /// Brier score of what it is compared with: `without_trees` (each pool's own forecast), `naive` (last value and past residuals of
    /// the maximum), `n_sigma`, `reactive_85` and `reactive_95` (certain of what is above that share of the capacity now),
    /// `base_rate`.
    pub baselines: BTreeMap<String, ByHorizon>,
}

/// The key of a horizon.
fn minutes(steps: usize, period_s: f64) -> String {
    let minutes = (steps as f64 * period_s / 60.0 * 100.0).round() / 100.0;
    format!("{minutes}")
}

/// One method's scores at one horizon.
struct Scored {
    mase: f64,
    pinball: f64,
    error_sum: f64,
    pinball_sum: f64,
    coverage: f64,
    off_percent: f64,
}

/// Over machines of known scale, each with its number of origins and its sums.
fn scored(known: &[(f64, f64, Sums)]) -> Scored {
    let machines = known.len().max(1) as f64;
    let mean = |of: &dyn Fn(&Sums) -> f64| {
        known.iter().map(|(scale, count, sums)| of(sums) / count / scale).sum::<f64>() / machines
    };
    let covered = || known.iter().map(|(_, count, sums)| sums.covered / count);
    let off = covered().filter(|covered| (covered - 0.95).abs() > 0.03).count() as f64;
    Scored {
        mase: mean(&|sums| sums.error),
        pinball: mean(&|sums| sums.pinball),
        error_sum: known.iter().map(|(_, _, sums)| sums.error).sum(),
        pinball_sum: known.iter().map(|(_, _, sums)| sums.pinball).sum(),
        coverage: covered().sum::<f64>() / machines,
        off_percent: 100.0 * off / machines,
    }
}

/// A ratio that has to be a number in JSON too: 0 / 0 is 1, since both did alike.
fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 {
        a / b
    } else if a > 0.0 {
        f64::MAX
    } else {
        1.0
    }
}

/// The table for machines; those whose series never moved before the test have no scale and are left out.
#[must_use]
pub fn machines(scores: &[MachineScore], protocol: &Protocol, period_s: f64) -> MachineSummary {
    let scores: Vec<&MachineScore> = scores.iter().filter(|score| score.scale > 0.0).collect();
    let mut summary = MachineSummary { machines: scores.len(), ..MachineSummary::default() };
    for (index, steps) in protocol.horizons.iter().enumerate() {
        let key = minutes(*steps, period_s);
        let of = |method: usize| -> Scored {
            let at = |score: &&MachineScore| {
                let sums = score.horizons[index];
                (sums.count > 0.0).then(|| (score.scale, sums.count, sums.methods[method]))
            };
            scored(&scores.iter().filter_map(at).collect::<Vec<_>>())
        };
        let naive = of(1);
        for (place, method) in Method::ALL.into_iter().enumerate() {
            let score = of(place);
            let mae = ratio(score.mase, naive.mase);
            let pinball = ratio(score.pinball, naive.pinball);
            if method == Method::Predictor {
                summary.mae_over_naive.insert(key.clone(), mae);
                summary.pinball95_over_naive.insert(key.clone(), pinball);
                summary.coverage95.insert(key.clone(), score.coverage);
                summary.machines_off_percent.insert(key.clone(), score.off_percent);
                summary.mase.insert(key.clone(), score.mase);
                let by_sum = ratio(score.error_sum, naive.error_sum);
                summary.mae_over_naive_by_sum.insert(key.clone(), by_sum);
                let by_sum = ratio(score.pinball_sum, naive.pinball_sum);
                summary.pinball95_over_naive_by_sum.insert(key.clone(), by_sum);
                continue;
            }
            let known = summary.baselines.entry(method.name().to_owned()).or_default();
            known.mae_over_naive.insert(key.clone(), mae);
            known.pinball95_over_naive.insert(key.clone(), pinball);
            known.coverage95.insert(key.clone(), score.coverage);
            known.machines_off_percent.insert(key.clone(), score.off_percent);
        }
    }
    summary
}

/// The table for pools: `said` has one list a window with the origins of all pools.
#[must_use]
pub fn pools(said: &[Vec<Said>], pools: usize, protocol: &Protocol, period_s: f64) -> PoolSummary {
    let mut summary = PoolSummary { pools, ..PoolSummary::default() };
    for (steps, said) in protocol.horizons.iter().zip(said) {
        let key = minutes(*steps, period_s);
        let pairs = |of: &dyn Fn(&Said) -> f64, quiet_only: bool| -> Vec<(f64, bool)> {
            let origins = said.iter().filter(|said| said.quiet || !quiet_only);
            origins.map(|said| (of(said), said.happened)).collect()
        };
        let ours = pairs(&|said| said.probability, false);
        let all: ProbabilityScore = score(&ours);
        let quiet = score(&pairs(&|said| said.probability, true));
        summary.brier.insert(key.clone(), all.brier);
        summary.ece.insert(key.clone(), all.ece);
        summary.skill.insert(key.clone(), all.skill);
        summary.base_rate.insert(key.clone(), all.base_rate);
        summary.skill_from_quiet.insert(key.clone(), quiet.skill);
        summary.auc_from_quiet.insert(key.clone(), quiet.auc);
        summary.reliability.insert(key.clone(), reliability(&ours));
        let mut baseline = |name: &str, of: &dyn Fn(&Said) -> f64| {
            let brier = score(&pairs(of, false)).brier;
            summary.baselines.entry(name.to_owned()).or_default().insert(key.clone(), brier);
        };
        baseline("without_trees", &|said| said.alone);
        baseline("naive", &|said| said.naive);
        baseline("n_sigma", &|said| said.sigma);
        baseline("reactive_85", &|said| said.reactive(0.85));
        baseline("reactive_95", &|said| said.reactive(0.95));
        baseline("base_rate", &|_| all.base_rate);
    }
    summary
}
