//! How many hosts a pool needs, when to provision one, and when it is safe to release one.
//!
//! ```text
//! need(window) = quantile (1 - risk) of the highest use within the window / (what a host gives x threshold), rounded up
//!                                                                                    the most demanding resource decides
//! provision   when need within the lead time of a host exceeds what there is
//! release     when need over the whole window stays below what there is, less one, for a whole hold time, and one host less
//!             still carries what is used now
//! ```
//!
//! The quantile of the *highest* use and not of the sum of the machines' own quantiles: peaks of machines seldom come together
//! (Bashir et al., *Take it to the limit*, `EuroSys` 2021). Provisioning is quick and releasing slow, since a host too much costs
//! money and one too few costs an SLO.

use crate::contention::Contention;
use crate::sample::{PerResource, Resource};
use serde::{Deserialize, Serialize};

/// How a pool is to be sized.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CapacityConfig {
    /// Accepted probability that the pool runs out within a window, above 0 and below 1.
    pub risk: f64,
    /// From the decision until a new host takes machines, in seconds.
    pub lead_s: f64,
    /// For so long a host must have been superfluous before it is released, in seconds.
    pub hold_s: f64,
    /// Share of a host that may be used.
    pub thresholds: PerResource<f64>,
    /// Hosts that a pool keeps at least.
    pub least: usize,
    /// Hosts that a pool may have at most.
    pub most: usize,
}

impl Default for CapacityConfig {
    fn default() -> Self {
        Self {
            risk: 0.05,
            lead_s: 600.0,
            hold_s: 3_600.0,
            thresholds: PerResource { cpu: 0.95, memory: 0.9, io: 0.9, network: 0.9 },
            least: 1,
            most: 1_000,
        }
    }
}

/// What to do about a pool's hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "advice")]
pub enum Advice {
    /// Nothing.
    Keep,
    /// Start so many hosts now.
    Provision {
        /// How many.
        hosts: usize,
    },
    /// Drain one host: one at a time, since each changes what the next decision is made from.
    Release,
    /// Nothing is known of the pool's use or of what a host gives.
    Unknown,
}

/// Need of hosts over a window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Need {
    /// Seconds from now.
    pub within_s: f64,
    /// Hosts.
    pub hosts: usize,
    /// The resource that decides.
    pub resource: Resource,
    /// Its use that is not exceeded but with the accepted risk.
    pub use_at_risk: f64,
}

/// The state of a pool's sizing; ask it once a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sizing {
    config: CapacityConfig,
    /// Since when one host less would have been enough.
    superfluous_since_s: Option<f64>,
}

/// The answer, with its reason in words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recommendation {
    /// What to do.
    pub advice: Advice,
    /// Needs by window, ascending; empty if nothing is known.
    pub needs: Vec<Need>,
    /// Why.
    pub reason: String,
}

/// Hosts needed for each window of a pool's contention at an accepted risk, when each host gives `per_host`. The needs of a longer
/// window are never below those of a shorter one.
#[must_use]
pub fn needs(contention: &Contention, per_host: &PerResource<Option<f64>>, config: &CapacityConfig) -> Vec<Need> {
    let mut needs: Vec<Need> = Vec::new();
    for (resource, state) in contention.resources.iter() {
        let (Some(state), Some(gives)) = (state, per_host[resource]) else { continue };
        let usable = gives * config.thresholds[resource];
        if !(usable.is_finite() && usable > 0.0) {
            continue;
        }
        for (onset, outlook) in state.onset.iter().zip(&state.maxima) {
            let use_at_risk = outlook.quantile(1.0 - config.risk.clamp(1e-6, 1.0 - 1e-6)).max(state.now);
            let hosts = (use_at_risk / usable).ceil().clamp(0.0, 1e9) as usize;
            let need = Need { within_s: onset.after_s, hosts, resource, use_at_risk };
            match needs.iter_mut().find(|known| (known.within_s - onset.after_s).abs() < 1e-9) {
                Some(known) if known.hosts < hosts => *known = need,
                Some(_) => {}
                None => needs.push(need),
            }
        }
    }
    needs.sort_by(|a, b| a.within_s.total_cmp(&b.within_s));
    for i in 1..needs.len() {
        if needs[i].hosts < needs[i - 1].hosts {
            needs[i] = Need { within_s: needs[i].within_s, ..needs[i - 1].clone() };
        }
    }
    for need in &mut needs {
        need.hosts = need.hosts.clamp(config.least, config.most.max(config.least));
    }
    needs
}

impl Sizing {
    /// A sizing that has seen nothing.
    #[must_use]
    pub fn new(config: CapacityConfig) -> Self {
        Self { config, superfluous_since_s: None }
    }

    /// What to do about a pool that has `hosts` hosts, each giving `per_host`, and `coming` more on their way.
    pub fn step(
        &mut self,
        contention: &Contention,
        per_host: &PerResource<Option<f64>>,
        hosts: usize,
        coming: usize,
    ) -> Recommendation {
        let needs = needs(contention, per_host, &self.config);
        let (Some(last), Some(soon)) = (
            needs.last().cloned(),
            needs.iter().find(|need| need.within_s >= self.config.lead_s).or(needs.last()).cloned(),
        ) else {
            self.superfluous_since_s = None;
            let reason = "nothing is known of its use or of what a host gives".to_owned();
            return Recommendation { advice: Advice::Unknown, needs, reason };
        };
        let now_s = contention.now_s;
        let there = hosts + coming;
        let told = |need: &Need| {
            format!(
                "{} {} within {:.0} s at a risk of {:.1} % take {} hosts",
                need.resource.quantity(need.use_at_risk),
                need.resource,
                need.within_s,
                100.0 * self.config.risk,
                need.hosts
            )
        };
        if soon.hosts > there {
            self.superfluous_since_s = None;
            let missing = soon.hosts - there;
            let reason = format!("{}, and there are {hosts} and {coming} coming", told(&soon));
            return Recommendation { advice: Advice::Provision { hosts: missing }, needs, reason };
        }
        if coming > 0 || last.hosts >= hosts || hosts <= self.config.least {
            self.superfluous_since_s = None;
            let reason = format!("{}, and there are {hosts}", told(&last));
            return Recommendation { advice: Advice::Keep, needs, reason };
        }
        // A clock that was set back must not make a host superfluous at once.
        let since = self.superfluous_since_s.map_or(now_s, |since| since.min(now_s));
        self.superfluous_since_s = Some(since);
        if now_s - since < self.config.hold_s {
            let left = self.config.hold_s - (now_s - since);
            let reason = format!("{} of {hosts}, released if it stays so for {left:.0} s", told(&last));
            return Recommendation { advice: Advice::Keep, needs, reason };
        }
        // The next one has to prove itself anew.
        self.superfluous_since_s = Some(now_s);
        let reason = format!("{} of {hosts}, and have for {:.0} s", told(&last), now_s - since);
        Recommendation { advice: Advice::Release, needs, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::Correction;
    use crate::contention::{Onset, Outlook, ResourceContention};
    use crate::forecast::Distribution;

    /// CPU whose highest use within 10, 60 and 1440 minutes is evenly within a core below `highs`.
    fn contention(now_s: f64, highs: [f64; 3]) -> Contention {
        let windows = [600.0, 3_600.0, 86_400.0];
        let outlook = |high: &f64| {
            let values = (0..400).map(|i| high - 1.0 + f64::from(i) / 400.0).collect();
            Outlook::new(Distribution::from_values(values).expect("values"), Correction::NONE, &[])
        };
        let state = ResourceContention {
            capacity: 100.0,
            limit: 95.0,
            now: 1.0,
            probability: 0.0,
            onset: windows.map(|after_s| Onset { after_s, probability: 0.0 }).to_vec(),
            path: Vec::new(),
            maxima: highs.iter().map(outlook).collect(),
        };
        Contention {
            now_s,
            horizon_s: 86_400.0,
            score: 0.0,
            any: 0.0,
            weighted_mean: 0.0,
            resources: PerResource { cpu: Some(state), ..PerResource::default() },
            reasons: Vec::new(),
        }
    }

    const HOST: PerResource<Option<f64>> = PerResource { cpu: Some(4.0), memory: None, io: None, network: None };

    fn config() -> CapacityConfig {
        let thresholds = PerResource { cpu: 1.0, memory: 1.0, io: 1.0, network: 1.0 };
        CapacityConfig { thresholds, hold_s: 100.0, ..CapacityConfig::default() }
    }

    #[test]
    fn the_need_follows_the_risk_and_never_falls_with_the_window() {
        let pool = contention(0.0, [3.9, 8.5, 4.0]);
        let found = needs(&pool, &HOST, &config());
        assert_eq!(found.iter().map(|need| need.hosts).collect::<Vec<_>>(), [1, 3, 3], "{found:?}");
        // Within 60 minutes at most 8.5, and with half of the risk at most 8.0: two hosts.
        let bold = needs(&pool, &HOST, &CapacityConfig { risk: 0.6, ..config() });
        assert_eq!(bold[1].hosts, 2, "{bold:?}");
    }

    #[test]
    fn hosts_are_provisioned_for_the_lead_time_and_released_after_the_hold_time() {
        let mut sizing = Sizing::new(CapacityConfig { lead_s: 3_000.0, ..config() });
        let rising = contention(0.0, [3.0, 11.0, 30.0]);
        let said = sizing.step(&rising, &HOST, 1, 0);
        assert_eq!(said.advice, Advice::Provision { hosts: 2 }, "of the next hour and not of the day: {said:?}");
        assert_eq!(sizing.step(&rising, &HOST, 1, 2).advice, Advice::Keep, "they are coming");
        let mut releases = Vec::new();
        for t in 0..350 {
            let calm = contention(f64::from(t), [3.0, 3.5, 3.9]);
            let hosts = 3 - releases.len();
            if sizing.step(&calm, &HOST, hosts, 0).advice == Advice::Release {
                releases.push(t);
            }
        }
        assert_eq!(releases, [100, 200], "one at a time, and one host stays");
    }

    #[test]
    fn a_peak_later_in_the_day_keeps_a_host_and_the_unknown_is_said() {
        let mut sizing = Sizing::new(config());
        for t in 0..500 {
            let said = sizing.step(&contention(f64::from(t), [1.5, 1.5, 7.5]), &HOST, 2, 0);
            assert_eq!(said.advice, Advice::Keep, "{said:?}");
        }
        let unknown = sizing.step(&contention(0.0, [1.5; 3]), &PerResource::default(), 2, 0);
        assert_eq!(unknown.advice, Advice::Unknown);
        let nonsense = PerResource { cpu: Some(f64::NAN), ..PerResource::default() };
        assert_eq!(sizing.step(&contention(0.0, [1.5; 3]), &nonsense, 2, 0).advice, Advice::Unknown);
    }
}
