//! Where the minutes of contention that a policy leaves come from: what they are made of, and what kept the policy from acting.
//!
//! Each minute in which a pool is above its capacity is put down to one kind:
//!
//! ```text
//! all pools together above all they have?         yes -> unavoidable (for one pool, the highest above)
//! below without machines that came lately?        yes -> arrival: caused at the target
//! below without the events that are in effect?    yes -> event
//! otherwise                                           -> rise, which nobody announced
//! ```
//!
//! and to what the policy said of that pool at the step before, which was the last at which a move could have helped.

use super::world::World;
use crate::candidates::{Obstacle, Rejection};
use serde::{Deserialize, Serialize};

/// What a minute of contention is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// No placement of the machines avoids it.
    Unavoidable,
    /// Without machines that came lately there would be none.
    Arrival,
    /// Without events there would be none.
    Event,
    /// The rest.
    Rise,
}

/// What a policy said of a pool at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// It does not tell.
    #[default]
    Untold,
    /// Below what it acts on: the contention was not foreseen.
    Calm,
    /// The pool rests after its last move.
    Cooldown,
    /// It expected fewer minutes than a move has to avoid.
    LittleExpected,
    /// Another pool was served first.
    OtherFirst,
    /// A machine moved; it was not enough, or not yet over.
    Moved,
    /// As many migrations ran as may.
    InFlight,
    /// Machines that might have gone rest after earlier moves.
    Resting,
    /// A move that avoids enough would cause too much at the target, or the target takes none.
    NoTarget,
    /// No machine's leaving avoids enough.
    NoMachine,
}

impl Held {
    /// For people.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Untold => "not told",
            Self::Calm => "not foreseen",
            Self::Cooldown => "cooldown of the pool",
            Self::LittleExpected => "too little expected",
            Self::OtherFirst => "another pool was first",
            Self::Moved => "moved, not enough",
            Self::InFlight => "migrations in flight",
            Self::Resting => "machines rest",
            Self::NoTarget => "no room at a target",
            Self::NoMachine => "no machine helps",
        }
    }

    /// What held a plan back that has no move.
    #[must_use]
    pub fn of(rejected: &[Rejection]) -> Self {
        let any = |obstacle: Obstacle| rejected.iter().any(|rejection| rejection.obstacle == obstacle);
        match () {
            () if rejected.is_empty() => Self::InFlight,
            () if any(Obstacle::MuchCaused) || any(Obstacle::Target) => Self::NoTarget,
            () if any(Obstacle::Rest) => Self::Resting,
            () => Self::NoMachine,
        }
    }
}

/// Minutes of one kind and reason.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    /// What they are made of.
    pub kind: Kind,
    /// What the policy said at the step before each.
    pub held: Held,
    /// Minutes.
    pub minutes: f64,
    /// Those of them that were the first of their contention: the pool was not above its capacity at the step before.
    pub first_minutes: f64,
}

/// Adds to the entry of the same kind and reason.
pub(super) fn add(causes: &mut Vec<Cause>, more: Cause) {
    let key = |cause: &Cause| (cause.kind, cause.held);
    match causes.binary_search_by_key(&key(&more), key) {
        Ok(place) => {
            causes[place].minutes += more.minutes;
            causes[place].first_minutes += more.first_minutes;
        }
        Err(place) => causes.insert(place, more),
    }
}

/// Puts the pools above their capacity at this step down to kinds.
pub(super) fn kinds(world: &World<'_>, above: &[usize]) -> Vec<(usize, Kind)> {
    let scenario = world.scenario;
    let all: f64 = (0..scenario.capacity.len()).map(|pool| world.sum(pool, 0)).sum();
    let relative = |pool: &usize| world.sum(*pool, 0) / scenario.capacity[*pool];
    let highest = above.iter().copied().max_by(|a, b| relative(a).total_cmp(&relative(b)));
    let unavoidable = highest.filter(|_| all > scenario.capacity.iter().sum());
    let kind = |pool: usize| {
        let (sum, capacity) = (world.sum(pool, 0), scenario.capacity[pool]);
        let came: f64 =
            world.members(pool).filter(|m| world.came_lately(*m)).map(|machine| world.load(machine, 0)).sum();
        let in_effect = scenario.events.iter().filter(|event| event.happens.contains(&world.t));
        let events: f64 = in_effect.filter(|event| world.pool[event.machine] == pool).map(|event| event.amount).sum();
        match () {
            () if unavoidable == Some(pool) => Kind::Unavoidable,
            () if sum - came <= capacity => Kind::Arrival,
            () if sum - events <= capacity => Kind::Event,
            () => Kind::Rise,
        }
    };
    above.iter().map(|pool| (*pool, kind(*pool))).collect()
}
