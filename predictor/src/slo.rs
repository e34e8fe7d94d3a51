//! Who is likely to suffer when a pool runs short: machines whose share of what they ask for falls below what was promised.
//!
//! CPU that is short is shared out evenly: each machine gets what it asks for up to a level at which all is used (max-min
//! fairness, as the kernel's scheduler with equal weights; Bertsekas and Gallager, *Data Networks*, 6.5). So small machines do not suffer
//! from large ones, and a machine suffers from the moment when the pool's demand reaches an amount that can be computed. The
//! probability of that amount comes from the pool's forecast of its maximum.

use crate::contention::Outlook;
use serde::{Deserialize, Serialize};

/// What is known of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Demand {
    /// Its name.
    pub machine: String,
    /// What it is expected to ask for, in the resource's unit.
    pub expected: f64,
    /// Share of what it asks for that it was promised, 0 to 1.
    pub promised: f64,
}

/// How a machine is likely to fare.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Risk {
    /// Its name.
    pub machine: String,
    /// Probability that it gets less than promised at some time within the window.
    pub probability: f64,
    /// The pool's demand from which on that is so; `None` if never.
    pub from_demand: Option<f64>,
    /// In words and numbers.
    pub reason: String,
}

/// The level at which demands, each times `factor`, are cut so that their sum is `capacity`; infinite if all fit.
fn level(sorted: &[f64], factor: f64, capacity: f64) -> f64 {
    let mut left = capacity;
    for (served, demand) in sorted.iter().enumerate() {
        let fair = left / (sorted.len() - served) as f64;
        if factor * demand > fair {
            return fair;
        }
        left -= factor * demand;
    }
    f64::INFINITY
}

/// The risks of all machines of a pool with that capacity, the highest first. `outlook` is the pool's maximum within the window; all
/// machines are taken to grow with it in proportion.
#[must_use]
pub fn risks(demands: &[Demand], capacity: f64, outlook: &Outlook) -> Vec<Risk> {
    let sound = |value: f64| if value.is_finite() { value.max(0.0) } else { 0.0 };
    let mut sorted: Vec<f64> = demands.iter().map(|demand| sound(demand.expected)).collect();
    sorted.sort_by(f64::total_cmp);
    let total: f64 = sorted.iter().sum();
    let mut risks: Vec<Risk> =
        demands.iter().map(|demand| risk(demand, sound(demand.expected), &sorted, total, capacity, outlook)).collect();
    risks.sort_by(|a, b| b.probability.total_cmp(&a.probability).then_with(|| a.machine.cmp(&b.machine)));
    risks
}

fn risk(demand: &Demand, expected: f64, sorted: &[f64], total: f64, capacity: f64, outlook: &Outlook) -> Risk {
    let promised = if demand.promised.is_nan() { 1.0 } else { demand.promised.clamp(0.0, 1.0) };
    let missed = |factor: f64| level(sorted, factor, capacity.max(0.0)) < promised * factor * expected;
    // No pool's demand grows a thousandfold within a window.
    let furthest = 1_000.0;
    if expected <= 0.0 || total <= 0.0 || !missed(furthest) {
        return Risk {
            machine: demand.machine.clone(),
            probability: 0.0,
            from_demand: None,
            reason: "its share is served whatever the others ask for".to_owned(),
        };
    }
    let (mut kept, mut lost) = (0.0, furthest);
    for _ in 0..60 {
        let middle = 0.5 * (kept + lost);
        if missed(middle) { lost = middle } else { kept = middle }
    }
    let from = lost * total;
    let probability = outlook.exceedance(from);
    let reason = format!(
        "gets less than {:.0} % of the {expected:.2} that it asks for once the pool asks for {from:.2} of {capacity:.2}: {:.0} % \
         probable",
        100.0 * promised,
        100.0 * probability
    );
    Risk { machine: demand.machine.clone(), probability, from_demand: Some(from), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::Correction;
    use crate::forecast::Distribution;

    fn outlook() -> Outlook {
        // The maximum is evenly between 0 and 20.
        let values = (0..1_000).map(|i| f64::from(i) / 50.0).collect();
        Outlook::new(Distribution::from_values(values).expect("values"), Correction::NONE, &[])
    }

    fn demand(machine: &str, expected: f64, promised: f64) -> Demand {
        Demand { machine: machine.into(), expected, promised }
    }

    #[test]
    fn the_large_suffer_before_the_small_and_the_modest_promise_holds_longer() {
        let demands = [demand("small", 1.0, 1.0), demand("large", 5.0, 1.0), demand("batch", 4.0, 0.5)];
        let risks = risks(&demands, 12.0, &outlook());
        let of = |name: &str| risks.iter().find(|risk| risk.machine == name).expect("known");
        assert_eq!(risks[0].machine, "large", "{risks:?}");
        // All of it: 12 of the pool's 10 times 1.2.
        assert!((of("large").from_demand.expect("some") - 12.0).abs() < 0.01, "{risks:?}");
        assert!((of("large").probability - 0.4).abs() < 0.02, "{risks:?}");
        // Cut at a level L, with f, 5f and 4f asked for: batch gets half when L = 2f, that is 12 = f + 2f + 2f, f = 2.4.
        assert!((of("batch").from_demand.expect("some") - 24.0).abs() < 0.05, "{risks:?}");
        // The small one when even a third is less than it asks for: f = 4.
        assert!((of("small").from_demand.expect("some") - 40.0).abs() < 0.05, "{risks:?}");
        assert!(of("small").probability < of("batch").probability + 1e-9);
        assert!(of("large").reason.contains("40 %"), "{}", of("large").reason);
    }

    #[test]
    fn nothing_asked_for_nothing_missed_and_nonsense_is_survived() {
        let demands = [demand("idle", 0.0, 1.0), demand("odd", f64::NAN, f64::NAN), demand("one", 2.0, 1.0)];
        for capacity in [4.0, 0.0, f64::NAN, f64::INFINITY, -1.0] {
            for risk in risks(&demands, capacity, &outlook()) {
                assert!((0.0..=1.0).contains(&risk.probability), "{capacity}: {risk:?}");
                assert!(risk.machine == "one" || risk.probability == 0.0, "{capacity}: {risk:?}");
            }
        }
        assert!(risks(&[], 4.0, &outlook()).is_empty());
    }
}
