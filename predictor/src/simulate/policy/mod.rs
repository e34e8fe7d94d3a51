//! Who decides: the predictor's whole loop, a threshold on what is used now, one who knows the future, and nobody.

mod oracle;
mod predictor;
mod reactive;

pub use oracle::Oracle;
pub use predictor::{Predictor, Setting};
pub use reactive::Reactive;

use super::cause::Held;
use super::world::World;
use crate::bank::BankError;
use crate::candidates::{MoveLog, PlanLimits};
use crate::sample::PerResource;
use crate::trigger::{Trigger, TriggerConfig};

/// A machine that is to leave its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Its number.
    pub machine: usize,
    /// The pool that it goes to.
    pub to: usize,
}

/// One who decides which machines change their pool now.
pub trait Policy {
    /// Sees a step and says which machines leave their pool. With `may_act` false it only learns.
    ///
    /// # Errors
    /// [`BankError`] if the period or horizon cannot be forecast.
    fn step(&mut self, world: &World<'_>, may_act: bool) -> Result<Vec<Order>, BankError>;

    /// What it said of a pool at the last step.
    fn said(&self, _pool: usize) -> Held {
        Held::Untold
    }
}

/// Does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Policy for Nobody {
    fn step(&mut self, _: &World<'_>, _: bool) -> Result<Vec<Order>, BankError> {
        Ok(Vec::new())
    }
}

/// Name of a pool.
fn pool_name(pool: usize) -> String {
    format!("pool-{pool:04}")
}

/// What a move would cause at the target is weighed against what it avoids, minute by minute. Hard limits on the target's score and
/// on the room there refuse moves that do more good than harm: with them the same number of moves left a sixth more minutes.
const TARGET_SCORE: f64 = 1.0;
/// Room that is asked for at the target, as a share of its capacity: none.
const TARGET_USE: f64 = 100.0;

/// The rests that all policies keep, and how many migrations each may have under way, a pool.
fn limits(pools: usize) -> PlanLimits {
    PlanLimits {
        machine_cooldown_s: 3_600.0,
        no_return_s: 3_600.0,
        target_use: PerResource::from_fn(|_| TARGET_USE),
        margin_s: 0.0,
        in_flight: 2 * pools,
        in_flight_per_host: 2,
        ..PlanLimits::default()
    }
}

/// Acts when `act_above` is reached, again after a cooldown that all policies share.
fn trigger(act_above: f64, rearm_below: f64) -> Trigger {
    Trigger::new(TriggerConfig {
        act_above,
        rearm_below,
        confirm_steps: 1,
        cooldown_s: 600.0,
        backoff: 1.0,
        ..TriggerConfig::default()
    })
}
