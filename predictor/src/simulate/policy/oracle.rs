//! One who knows the future.

use super::{MoveLog, Order, PlanLimits, Policy, limits, pool_name};
use crate::bank::BankError;
use crate::simulate::world::World;

/// Knows what comes: moves the machine that avoids most violations within twice the horizon, if it avoids at least `least` steps of
/// them. It looks at one move at a time, so that it is a strong reference and not the optimum.
#[derive(Debug)]
pub struct Oracle {
    horizon: usize,
    least: usize,
    names: Vec<String>,
    log: MoveLog,
    limits: PlanLimits,
}

impl Oracle {
    /// Looks `horizon` steps ahead over so many pools.
    #[must_use]
    pub fn new(pools: usize, horizon: usize, least: usize) -> Self {
        let names = (0..pools).map(pool_name).collect();
        Self { horizon, least: least.max(1), names, log: MoveLog::default(), limits: limits(pools) }
    }

    /// Sums of a pool over twice the horizon.
    fn ahead(&self, world: &World<'_>, pool: usize) -> Vec<f64> {
        (1..=2 * self.horizon).map(|ahead| world.sum(pool, ahead)).collect()
    }
}

/// Steps in which a pool is above its capacity with a machine's load times `sign` added.
fn above(world: &World<'_>, (pool, sums): (usize, &[f64]), machine: usize, sign: f64) -> usize {
    let capacity = world.scenario.capacity[pool];
    let steps = sums.iter().zip(1..).filter(|(sum, ahead)| **sum + sign * world.load(machine, *ahead) > capacity);
    steps.count()
}

impl Policy for Oracle {
    fn step(&mut self, world: &World<'_>, may_act: bool) -> Result<Vec<Order>, BankError> {
        let mut orders = Vec::new();
        if !may_act || world.in_flight() > 0 {
            return Ok(orders);
        }
        let pools = self.names.len();
        let sums: Vec<Vec<f64>> = (0..pools).map(|pool| self.ahead(world, pool)).collect();
        // A pool that a machine leaves or comes to at this step is not looked at again.
        let mut touched = vec![false; pools];
        for pool in 0..pools {
            let capacity = world.scenario.capacity[pool];
            if touched[pool] || !sums[pool].iter().take(self.horizon).any(|sum| *sum > capacity) {
                continue;
            }
            let mut best: Option<(usize, Order)> = None;
            for machine in world.members(pool) {
                let name = &world.scenario.names[machine];
                let here = |sign: f64| above(world, (pool, &sums[pool]), machine, sign);
                let avoided = here(0.0) - here(-1.0);
                let targets = (0..pools).filter(|to| *to != pool && !touched[*to]);
                for to in
                    targets.filter(|to| self.log.forbids(name, &self.names[*to], world.now_s(), &self.limits).is_none())
                {
                    let there = |sign: f64| above(world, (to, &sums[to]), machine, sign);
                    let net = avoided.saturating_sub(there(1.0) - there(0.0));
                    if net >= self.least && best.is_none_or(|(most, _)| net > most) {
                        best = Some((net, Order { machine, to }));
                    }
                }
            }
            if let Some((_, order)) = best {
                let name = &world.scenario.names[order.machine];
                self.log.note(name, &self.names[pool], world.now_s(), 0.0, &self.limits);
                (touched[pool], touched[order.to]) = (true, true);
                orders.push(order);
            }
        }
        Ok(orders)
    }
}
