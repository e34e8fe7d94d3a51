//! What is simulated: pools, machines, events, and where everything is at a step.

use crate::cost::MigrationShape;
use crate::evaluate::Series;
use crate::events::Event;

/// A declared event, and what becomes of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Injected {
    /// Number of the machine that it is about.
    pub machine: usize,
    /// As it is declared.
    pub declared: Event,
    /// Steps in which it is in effect; empty if it does not happen.
    pub happens: std::ops::Range<usize>,
    /// What it adds.
    pub amount: f64,
}

/// Pools that may send machines to each other, and the machines.
#[derive(Clone, Debug)]
pub struct Scenario<'a> {
    /// Seconds between samples.
    pub period_s: f64,
    /// Names of the machines.
    pub names: Vec<String>,
    /// What each used, in a unit that can be summed.
    pub series: Vec<&'a Series>,
    /// Pool of each at the start, by number from 0.
    pub pools: Vec<usize>,
    /// Capacities of the pools.
    pub capacity: Vec<f64>,
    /// First step that a policy sees, to learn from.
    pub warm_from: usize,
    /// First step that counts, and in which it may act.
    pub from: usize,
    /// The step after the last.
    pub until: usize,
    /// Events of the machines.
    pub events: Vec<Injected>,
    /// What a migration has to carry.
    pub shape: MigrationShape,
}

/// A machine on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Moving {
    arrives_s: f64,
    to: usize,
}

/// How the pools stand at one step.
#[derive(Clone, Debug)]
pub struct World<'a> {
    /// What does not change.
    pub scenario: &'a Scenario<'a>,
    /// The step.
    pub t: usize,
    /// Pool of each machine now.
    pub pool: Vec<usize>,
    moving: Vec<Option<Moving>>,
    /// When each machine came to where it is, if it was not there from the start.
    came_s: Vec<Option<f64>>,
    filled: Vec<Vec<f64>>,
}

/// A machine counts for so long as one that came lately, in seconds: twice the hour that forecasts usually look ahead.
const LATELY_S: f64 = 7_200.0;

impl<'a> World<'a> {
    /// At the first step that a policy sees.
    #[must_use]
    pub fn new(scenario: &'a Scenario<'a>) -> Self {
        Self::at(scenario, scenario.warm_from)
    }

    /// At a step, with all machines where they start.
    #[must_use]
    pub fn at(scenario: &'a Scenario<'a>, t: usize) -> Self {
        let filled = (0..scenario.series.len()).map(|machine| loads(scenario, machine)).collect();
        let count = scenario.series.len();
        Self { scenario, t, pool: scenario.pools.clone(), moving: vec![None; count], came_s: vec![None; count], filled }
    }

    /// Seconds since the start of the trace.
    #[must_use]
    pub fn now_s(&self) -> f64 {
        self.t as f64 * self.scenario.period_s
    }

    /// What a machine uses `ahead` steps from now; truth, for oracles and for the score.
    #[must_use]
    pub fn load(&self, machine: usize, ahead: usize) -> f64 {
        self.filled[machine].get(self.t + ahead).copied().unwrap_or(0.0)
    }

    /// What was measured of a machine at this step.
    #[must_use]
    pub fn measured(&self, machine: usize) -> Option<f64> {
        self.scenario.series[machine].get(self.t).copied().flatten().map(|_| self.load(machine, 0))
    }

    /// Sum of a pool with its present members, `ahead` steps from now.
    #[must_use]
    pub fn sum(&self, pool: usize, ahead: usize) -> f64 {
        self.members(pool).map(|machine| self.load(machine, ahead)).sum()
    }

    /// Machines that count in a pool.
    pub fn members(&self, pool: usize) -> impl Iterator<Item = usize> {
        self.pool.iter().enumerate().filter(move |(_, of)| **of == pool).map(|(machine, _)| machine)
    }

    /// Whether a machine is on its way.
    #[must_use]
    pub fn is_moving(&self, machine: usize) -> bool {
        self.moving[machine].is_some()
    }

    /// Migrations under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.moving.iter().flatten().count()
    }

    /// Whether a machine came to its pool within the last two hours.
    #[must_use]
    pub fn came_lately(&self, machine: usize) -> bool {
        self.came_s[machine].is_some_and(|came_s| self.now_s() - came_s < LATELY_S)
    }

    /// A machine sets out for pool `to` and arrives in `seconds`.
    pub(super) fn start(&mut self, machine: usize, to: usize, seconds: f64) {
        self.moving[machine] = Some(Moving { arrives_s: self.now_s() + seconds, to });
    }

    /// To the next step: migrations that are over have arrived.
    pub(super) fn advance(&mut self) {
        self.t += 1;
        let now_s = self.now_s();
        for ((moving, pool), came_s) in self.moving.iter_mut().zip(&mut self.pool).zip(&mut self.came_s) {
            if let Some(over) = moving.filter(|moving| moving.arrives_s <= now_s) {
                *pool = over.to;
                *came_s = Some(over.arrives_s);
                *moving = None;
            }
        }
    }
}

/// The true loads of a machine: gaps bridged by the value before them, events added.
fn loads(scenario: &Scenario<'_>, machine: usize) -> Vec<f64> {
    let mut last = 0.0;
    let mut loads: Vec<f64> = scenario.series[machine]
        .iter()
        .map(|value| {
            last = value.filter(|value| value.is_finite()).unwrap_or(last);
            last
        })
        .collect();
    for event in scenario.events.iter().filter(|event| event.machine == machine) {
        let end = event.happens.end.min(loads.len());
        if let Some(loads) = loads.get_mut(event.happens.start..end) {
            loads.iter_mut().for_each(|load| *load += event.amount);
        }
    }
    loads
}
