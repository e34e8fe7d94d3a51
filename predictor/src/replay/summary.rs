//! Scores of many machines and pools in one table.

use super::pool::{ProbabilityScore, Said, score};
use super::{MachineScore, Protocol};
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
    /// As `pinball95_over_naive`, with naive's past residuals as they were, in no units.
    pub pinball95_over_plain_naive: ByHorizon,
    /// 0.95 pinball loss of the last day's 0.95 quantile over that of naive with scaled residuals.
    pub trailing_pinball95_over_naive: ByHorizon,
}

/// Scores of all pools together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolSummary {
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
    /// Brier score of the last value with past residuals of the maximum.
    pub naive_brier: ByHorizon,
    /// Brier score of N-sigma.
    pub sigma_brier: ByHorizon,
}

fn minutes(steps: usize, period_s: f64) -> String {
    format!("{}", steps as f64 * period_s / 60.0)
}

/// The table for machines; those whose series never moved before the test have no scale and are left out.
#[must_use]
pub fn machines(scores: &[MachineScore], protocol: &Protocol, period_s: f64) -> MachineSummary {
    let scores: Vec<&MachineScore> = scores.iter().filter(|score| score.scale > 0.0).collect();
    let mut summary = MachineSummary { machines: scores.len(), ..MachineSummary::default() };
    for (index, steps) in protocol.horizons.iter().enumerate() {
        let key = minutes(*steps, period_s);
        let known: Vec<_> = scores
            .iter()
            .map(|score| (score.scale, score.horizons[index]))
            .filter(|(_, sums)| sums.count > 0.0)
            .collect();
        let count = known.len().max(1) as f64;
        let scaled = |of: fn(&super::HorizonSums) -> f64| {
            known.iter().map(|(scale, sums)| of(sums) / sums.count / scale).sum::<f64>() / count
        };
        let sum = |of: fn(&super::HorizonSums) -> f64| known.iter().map(|(_, sums)| of(sums)).sum::<f64>();
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { f64::NAN };
        let covered: Vec<f64> = known.iter().map(|(_, sums)| sums.covered / sums.count).collect();
        let off = covered.iter().filter(|covered| (*covered - 0.95).abs() > 0.03).count() as f64;
        let mut put = |to: fn(&mut MachineSummary) -> &mut ByHorizon, value: f64| {
            to(&mut summary).insert(key.clone(), value);
        };
        put(|s| &mut s.mae_over_naive, ratio(scaled(|s| s.error), scaled(|s| s.naive_error)));
        put(|s| &mut s.pinball95_over_naive, ratio(scaled(|s| s.pinball), scaled(|s| s.naive_pinball)));
        put(|s| &mut s.coverage95, covered.iter().sum::<f64>() / count);
        put(|s| &mut s.machines_off_percent, 100.0 * off / count);
        put(|s| &mut s.mase, scaled(|s| s.error));
        put(|s| &mut s.mae_over_naive_by_sum, ratio(sum(|s| s.error), sum(|s| s.naive_error)));
        put(|s| &mut s.pinball95_over_naive_by_sum, ratio(sum(|s| s.pinball), sum(|s| s.naive_pinball)));
        put(|s| &mut s.pinball95_over_plain_naive, ratio(scaled(|s| s.pinball), scaled(|s| s.plain_pinball)));
        put(
            |s| &mut s.trailing_pinball95_over_naive,
            ratio(scaled(|s| s.trailing_pinball), scaled(|s| s.naive_pinball)),
        );
    }
    summary
}

/// The table for pools: `said` has one list a window with the origins of all pools.
#[must_use]
pub fn pools(said: &[Vec<Said>], protocol: &Protocol, period_s: f64) -> PoolSummary {
    let mut summary = PoolSummary::default();
    for (steps, said) in protocol.horizons.iter().zip(said) {
        let key = minutes(*steps, period_s);
        let scored = |of: fn(&Said) -> f64, quiet_only: bool| -> ProbabilityScore {
            let origins = said.iter().filter(|said| said.quiet || !quiet_only);
            score(&origins.map(|said| (of(said), said.happened)).collect::<Vec<_>>())
        };
        let (all, quiet) = (scored(|said| said.probability, false), scored(|said| said.probability, true));
        summary.brier.insert(key.clone(), all.brier);
        summary.ece.insert(key.clone(), all.ece);
        summary.skill.insert(key.clone(), all.skill);
        summary.base_rate.insert(key.clone(), all.base_rate);
        summary.skill_from_quiet.insert(key.clone(), quiet.skill);
        summary.auc_from_quiet.insert(key.clone(), quiet.auc);
        summary.naive_brier.insert(key.clone(), scored(|said| said.naive, false).brier);
        summary.sigma_brier.insert(key, scored(|said| said.sigma, false).brier);
    }
    summary
}
