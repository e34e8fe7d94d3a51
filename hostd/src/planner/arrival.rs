//! What this host's own forecast says about a machine that is to arrive.

use predictor::Resource;

use super::convert::{capacity_of, values_of};
use super::{Planner, known};
use crate::api::types::Usage;

impl Planner {
    /// What speaks against taking `machine` in, in words; `None` if nothing does, or nothing is known yet. A migration that
    /// was planned is refused for it, one that an operator asked for is made and carries it as a warning.
    pub fn concern(&self, machine: &str, usage: Option<&Usage>) -> Option<String> {
        let state = self.states.iter().find(|state| state.pool == self.config.pool)?;
        let host = state.hosts.iter().find(|host| host.host == self.host)?;
        let capacity = capacity_of(&host.capacity);
        let measured = values_of(usage);
        let (share, horizon_s) = (self.config.planner.target_use, self.config.planner.horizon_s);
        for resource in Resource::ALL {
            let Some(capacity) = capacity[resource] else { continue };
            let present = host.machines.iter().filter(|present| present.name != machine);
            let present: f64 = present.filter_map(|present| self.expected_demand(&present.name, resource)).sum();
            let Some(demand) = self.expected_demand(machine, resource).or(measured[resource]) else { continue };
            if demand > 0.0 && present + demand > capacity * share {
                return Some(format!(
                    "within {horizon_s:.0} s host `{}` is expected to use {} {resource} with `{machine}` (90 %), and {} are \
                     to be used at most; choose a host with more room",
                    self.host,
                    resource.quantity(present + demand),
                    resource.quantity(capacity * share)
                ));
            }
        }
        let contention = self.contentions.get(&self.config.pool).filter(|contention| known(contention))?;
        (contention.score >= self.config.planner.start_score).then(|| {
            format!(
                "pool `{}` itself is expected to run out within {horizon_s:.0} s (score {:.2}); choose another pool",
                self.config.pool, contention.score
            )
        })
    }
}
