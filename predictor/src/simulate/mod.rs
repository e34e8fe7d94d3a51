//! Decisions replayed over a recorded trace: how many minutes of contention does a policy leave, and with how many migrations?
//!
//! ```text
//!            trace + injected events                     policy: predictor | reactive | oracle | none
//!                      |                                            |
//! step t:  migrations that are over arrive -> loads of both pools -> violation minutes -> decision -> migration starts,
//!                                                                                     lasts as the cost model says
//! ```
//!
//! Two or more pools stand beside each other and each may send machines to any other. What a machine uses does not depend on where
//! it runs. A machine counts at its source until its migration is over. All policies have the same machines, capacities, events,
//! durations, and rests of machines; they differ in when they act and whom they move.

pub mod cause;
pub mod compare;
pub mod inject;
pub mod policy;
mod world;

use crate::bank::BankError;
use crate::cost::CostModel;
use cause::{Cause, Held};
use policy::Policy;
use serde::{Deserialize, Serialize};
pub use world::{Injected, Scenario, World};

/// What a policy left behind.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Minutes in which a pool used more than its capacity, summed over pools.
    pub violation_minutes: f64,
    /// Migrations.
    pub moves: f64,
    /// Minutes counted, summed over pools.
    pub minutes: f64,
    /// Where the violation minutes come from.
    #[serde(default)]
    pub causes: Vec<Cause>,
}

impl std::ops::AddAssign<&Self> for Outcome {
    fn add_assign(&mut self, other: &Self) {
        self.violation_minutes += other.violation_minutes;
        self.moves += other.moves;
        self.minutes += other.minutes;
        other.causes.iter().for_each(|more| cause::add(&mut self.causes, *more));
    }
}

/// Runs a policy through a scenario.
///
/// # Errors
/// [`BankError`] if the period or horizon cannot be forecast.
pub fn run(scenario: &Scenario<'_>, policy: &mut dyn Policy) -> Result<Outcome, BankError> {
    play(World::new(scenario), policy)
}

/// As [`run`] from where `world` stands: for a policy that has learned what there was before.
///
/// # Errors
/// [`BankError`] if the period or horizon cannot be forecast.
pub fn play(mut world: World<'_>, policy: &mut dyn Policy) -> Result<Outcome, BankError> {
    let scenario = world.scenario;
    let mut outcome = Outcome::default();
    let seconds = CostModel::default().predict(&scenario.shape).total_ms / 1_000.0;
    let pools = scenario.capacity.len();
    let (mut before, mut said) = (vec![false; pools], vec![Held::default(); pools]);
    while world.t < scenario.until {
        let counts = world.t >= scenario.from;
        let above: Vec<usize> = (0..pools).filter(|pool| world.sum(*pool, 0) > scenario.capacity[*pool]).collect();
        if counts {
            let minutes = scenario.period_s / 60.0;
            outcome.minutes += pools as f64 * minutes;
            outcome.violation_minutes += above.len() as f64 * minutes;
            for (pool, kind) in cause::kinds(&world, &above) {
                let first_minutes = if before[pool] { 0.0 } else { minutes };
                cause::add(&mut outcome.causes, Cause { kind, held: said[pool], minutes, first_minutes });
            }
        }
        before = (0..pools).map(|pool| above.contains(&pool)).collect();
        for order in policy.step(&world, counts)? {
            if counts && !world.is_moving(order.machine) && order.to != world.pool[order.machine] {
                world.start(order.machine, order.to, seconds);
                outcome.moves += 1.0;
            }
        }
        said = (0..pools).map(|pool| policy.said(pool)).collect();
        world.advance();
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests;
