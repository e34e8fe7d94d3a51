//! A threshold on what is used now.

use super::{MoveLog, Order, PlanLimits, Policy, Trigger, limits, pool_name, trigger};
use crate::bank::BankError;
use crate::simulate::cause::Held;
use crate::simulate::world::World;
use crate::trigger::{Decision, Hold};

/// Acts when a pool uses more than a share of its capacity, and moves the smallest machine that brings it below again, or else the
/// largest that there is room for below the same share. It goes to the pool with the most room.
#[derive(Debug)]
pub struct Reactive {
    threshold: f64,
    names: Vec<String>,
    triggers: Vec<Trigger>,
    said: Vec<Held>,
    log: MoveLog,
    limits: PlanLimits,
}

impl Reactive {
    /// Acts at that share of the capacity of each of so many pools.
    #[must_use]
    pub fn new(pools: usize, threshold: f64) -> Self {
        Self {
            threshold,
            names: (0..pools).map(pool_name).collect(),
            triggers: vec![trigger(threshold, 0.95 * threshold); pools],
            said: vec![Held::Calm; pools],
            log: MoveLog::default(),
            limits: limits(pools),
        }
    }

    /// Whom to move where; `room` is what each pool has left below the threshold.
    fn choose(&self, world: &World<'_>, pool: usize, room: &[f64]) -> Result<Order, Held> {
        let others = (0..room.len()).filter(|other| *other != pool);
        let to = others.max_by(|a, b| room[*a].total_cmp(&room[*b])).ok_or(Held::NoTarget)?;
        let excess = -room[pool];
        let fits = |machine: &usize| {
            let load = world.load(*machine, 0);
            load > 0.0 && load <= room[to]
        };
        let free = |machine: &usize| {
            let name = &world.scenario.names[*machine];
            !world.is_moving(*machine) && self.log.forbids(name, &self.names[to], world.now_s(), &self.limits).is_none()
        };
        let fitting: Vec<usize> = world.members(pool).filter(fits).collect();
        let candidates: Vec<usize> = fitting.iter().copied().filter(free).collect();
        let by_load = |a: &usize, b: &usize| world.load(*a, 0).total_cmp(&world.load(*b, 0));
        let enough = candidates.iter().copied().filter(|machine| world.load(*machine, 0) >= excess);
        let machine = enough.min_by(by_load).or_else(|| candidates.iter().copied().max_by(by_load));
        let held = if fitting.is_empty() { Held::NoTarget } else { Held::Resting };
        machine.map(|machine| Order { machine, to }).ok_or(held)
    }
}

impl Policy for Reactive {
    fn step(&mut self, world: &World<'_>, may_act: bool) -> Result<Vec<Order>, BankError> {
        let mut moves = Vec::new();
        let pools = self.names.len();
        let limit = |pool: usize| self.threshold * world.scenario.capacity[pool];
        let mut room: Vec<f64> = (0..pools).map(|pool| limit(pool) - world.sum(pool, 0)).collect();
        for pool in 0..pools {
            let used = world.sum(pool, 0) / world.scenario.capacity[pool];
            let decision = self.triggers[pool].step(used, world.now_s());
            self.said[pool] = match decision {
                Decision::Hold { why: Hold::Cooldown { .. } } => Held::Cooldown,
                Decision::Hold { .. } => Held::Calm,
                Decision::Act { .. } => Held::Moved,
            };
            if !may_act || !matches!(decision, Decision::Act { .. }) {
                continue;
            }
            match self.choose(world, pool, &room) {
                Ok(order) => {
                    self.triggers[pool].acted(world.now_s());
                    let name = &world.scenario.names[order.machine];
                    self.log.note(name, &self.names[pool], world.now_s(), 0.0, &self.limits);
                    // What another pool sends there at the same step has less room.
                    room[order.to] -= world.load(order.machine, 0);
                    moves.push(order);
                }
                Err(held) => self.said[pool] = held,
            }
        }
        Ok(moves)
    }

    fn said(&self, pool: usize) -> Held {
        self.said[pool]
    }
}
