//! Who decides: the predictor's whole loop, a threshold on what is used now, one who knows the future, and nobody.

use super::World;
use crate::bank::BankError;
use crate::candidates::{HostView, MachineView, MoveLog, PlanLimits, PoolView};
use crate::contention::Contention;
use crate::cost::CostModel;
use crate::course::Course;
use crate::events::Event;
use crate::model::Budget;
use crate::plan::{PlanInput, expected_minutes, plan};
use crate::pool::{PoolConfig, PoolForecaster, Tick};
use crate::pools::Pools;
use crate::sample::{PerResource, Sample};
use crate::trigger::{Decision, Trigger, TriggerConfig};

/// One who decides which machines change their pool now.
pub trait Policy {
    /// Sees a step and says which machines leave their pool. With `may_act` false it only learns.
    ///
    /// # Errors
    /// [`BankError`] if the period or horizon cannot be forecast.
    fn step(&mut self, world: &World<'_>, may_act: bool) -> Result<Vec<usize>, BankError>;
}

/// Does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Policy for Nobody {
    fn step(&mut self, _: &World<'_>, _: bool) -> Result<Vec<usize>, BankError> {
        Ok(Vec::new())
    }
}

const POOLS: [&str; 2] = ["a", "b"];
const WEIGHTS: PerResource<f64> = PerResource { cpu: 1.0, memory: 1.0, io: 1.0, network: 1.0 };
/// Trees are fitted anew after so many seconds, as in an evaluation.
const REFIT_S: f64 = 7.0 * 86_400.0;

/// What a move would cause at the target is weighed against what it avoids, minute by minute. Hard limits on the target's score and
/// on the room there refuse moves that do more good than harm: with them the same number of moves left a sixth more minutes.
const TARGET_SCORE: f64 = 1.0;
/// Room that is asked for at the target, as a share of its capacity: none.
const TARGET_USE: f64 = 100.0;

/// The rests that all policies keep.
fn limits() -> PlanLimits {
    PlanLimits {
        machine_cooldown_s: 3_600.0,
        no_return_s: 3_600.0,
        target_use: PerResource::from_fn(|_| TARGET_USE),
        margin_s: 0.0,
        in_flight: 4,
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

/// When the predictor acts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting {
    /// Looks for a move when the score reaches this,
    pub act_above: f64,
    /// and makes it if it avoids so many violation minutes net.
    pub benefit_minutes: f64,
}

/// Samples, forecasts, contention score, trigger, plan.
#[derive(Clone, Debug)]
pub struct Predictor {
    /// Both pools, which learn from each other as in hostd.
    pools: Pools,
    fitted_s: f64,
    triggers: [Trigger; 2],
    contentions: [Option<Contention>; 2],
    log: MoveLog,
    limits: PlanLimits,
    horizon: usize,
    declared: bool,
}

impl Predictor {
    /// Looks `horizon` steps ahead. It knows nothing of events and has yet to be told when to act; see [`Predictor::with`].
    ///
    /// # Errors
    /// [`BankError`] if the period or horizon cannot be forecast.
    pub fn new(period_s: f64, horizon: usize) -> Result<Self, BankError> {
        let config = PoolConfig {
            step_s: period_s,
            horizon_steps: horizon,
            thresholds: PerResource { cpu: 1.0, ..PoolConfig::default().thresholds },
            ..PoolConfig::default()
        };
        let limits = PlanLimits { lasting_s: 2.0 * horizon as f64 * period_s, ..limits() };
        Ok(Self {
            pools: Pools::new(config)?,
            fitted_s: f64::NAN,
            triggers: [trigger(1.0, 1.0), trigger(1.0, 1.0)],
            contentions: [None, None],
            log: MoveLog::default(),
            limits,
            horizon,
            declared: false,
        })
    }

    /// One that has learned from a scenario up to its first step that counts: the same for all settings, so that they share it.
    ///
    /// # Errors
    /// [`BankError`] if the period or horizon cannot be forecast.
    pub fn warm(scenario: &super::Scenario<'_>, horizon: usize) -> Result<Self, BankError> {
        let mut warm = Self::new(scenario.period_s, horizon)?;
        let mut world = World::new(scenario);
        while world.t < scenario.from.min(scenario.until) {
            warm.step(&world, false)?;
            world.advance();
        }
        Ok(warm)
    }

    /// The same with a setting; sees what is declared if `declared`.
    #[must_use]
    pub fn with(&self, setting: Setting, declared: bool) -> Self {
        let act = setting.act_above;
        let limits = PlanLimits {
            goal: 0.5 * act,
            target_score: TARGET_SCORE,
            minimum_benefit_minutes: setting.benefit_minutes,
            ..self.limits.clone()
        };
        Self { triggers: [trigger(act, 0.8 * act), trigger(act, 0.8 * act)], limits, declared, ..self.clone() }
    }

    fn forecaster(&self, pool: usize) -> Option<&PoolForecaster> {
        self.pools.get(POOLS[pool])
    }

    fn course(&self, pool: usize) -> Course {
        self.forecaster(pool).map(PoolForecaster::course).unwrap_or_default()
    }

    /// Machines that have arrived bring their history along.
    fn follow(&mut self, world: &World<'_>) -> Result<(), BankError> {
        for (machine, pool) in world.pool.iter().enumerate() {
            let name = &world.scenario.names[machine];
            if self.forecaster(*pool).is_none_or(|own| own.history(name).is_none())
                && let Some(history) = self.forecaster(1 - *pool).and_then(|other| other.history(name)).cloned()
            {
                self.pools.pool(POOLS[*pool])?.adopt(name, history)?;
            }
        }
        Ok(())
    }

    /// What is declared of a pool's machines: what is over or further away than a day is left out.
    fn events(&self, world: &World<'_>, pool: usize) -> Vec<Event> {
        let now_s = world.now_s();
        let near = |event: &Event| event.start_s < now_s + 86_400.0 && event.end_s > now_s - 86_400.0;
        let all = world.scenario.events.iter().filter(|event| self.declared && world.pool[event.machine] == pool);
        all.map(|event| &event.declared).filter(|event| near(event)).cloned().collect()
    }

    fn machines(&self, world: &World<'_>, pool: usize) -> Vec<MachineView> {
        let view = |machine: usize| {
            let name = &world.scenario.names[machine];
            let demand = self.pools.machine_forecast(POOLS[pool], name, crate::Resource::Cpu, self.horizon);
            MachineView {
                name: name.clone(),
                host: POOLS[pool].to_owned(),
                demand: PerResource { cpu: demand, ..PerResource::default() },
                course: self.forecaster(pool).and_then(|own| own.machine_course(name)).unwrap_or_default(),
                shape: world.scenario.shape,
                acceptable_downtime_ms: f64::INFINITY,
                migrating: world.is_moving(machine),
                ..MachineView::default()
            }
        };
        world.members(pool).map(view).collect()
    }

    fn target(&self, world: &World<'_>, pool: usize) -> HostView {
        let capacity = Some(world.scenario.capacity[pool]);
        let expected = self.forecaster(pool).and_then(|own| own.forecast(crate::Resource::Cpu, self.horizon));
        HostView {
            name: POOLS[pool].to_owned(),
            pool: POOLS[pool].to_owned(),
            capacity: PerResource { cpu: capacity, ..PerResource::default() },
            expected_use: PerResource {
                cpu: expected.map(|expected| expected.point).or(Some(0.0)),
                ..PerResource::default()
            },
            machines: world.members(pool).map(|machine| world.scenario.names[machine].clone()).collect(),
            ..HostView::default()
        }
    }

    fn decide(&mut self, world: &World<'_>, pool: usize) -> Option<usize> {
        let other = 1 - pool;
        let source = self.contentions[pool].as_ref()?;
        let course = self.course(pool);
        // What cannot be avoided is not planned for: the same answer, sooner.
        if expected_minutes(source, &course, &WEIGHTS, &self.limits) < self.limits.minimum_benefit_minutes {
            return None;
        }
        let made = plan(&PlanInput {
            now_s: world.now_s(),
            source_pool: POOLS[pool],
            source,
            course: &course,
            machines: &self.machines(world, pool),
            pools: &[PoolView {
                name: POOLS[other].to_owned(),
                contention: self.contentions[other].clone()?,
                course: self.course(other),
            }],
            hosts: &[self.target(world, other)],
            weights: WEIGHTS,
            in_flight: world.in_flight(),
            log: &self.log,
            cost: &CostModel::default(),
            limits: &self.limits,
        });
        let best = made.moves.first()?;
        self.log.note(&best.machine, POOLS[pool], world.now_s(), best.cost.total_ms / 1_000.0, &self.limits);
        world.scenario.names.iter().position(|name| *name == best.machine)
    }
}

impl Policy for Predictor {
    fn step(&mut self, world: &World<'_>, may_act: bool) -> Result<Vec<usize>, BankError> {
        self.follow(world)?;
        for pool in [0, 1] {
            let sample = |machine: usize| Sample {
                machine: world.scenario.names[machine].clone(),
                values: PerResource { cpu: world.measured(machine), ..PerResource::default() },
            };
            let samples: Vec<Sample> = world.members(pool).map(sample).collect();
            let events = self.events(world, pool);
            let capacity = PerResource { cpu: Some(world.scenario.capacity[pool]), ..PerResource::default() };
            let tick = Tick { now_s: world.now_s(), capacity, samples: &samples, events: &events };
            self.contentions[pool] = Some(self.pools.tick(POOLS[pool], &tick)?);
        }
        if self.fitted_s.is_nan() {
            self.fitted_s = world.now_s();
        } else if world.now_s() - self.fitted_s >= REFIT_S {
            self.fitted_s = world.now_s();
            self.pools.refit(&mut Budget::unlimited());
        }
        let scores = [0, 1].map(|pool: usize| self.contentions[pool].as_ref().map_or(f64::NAN, |state| state.score));
        let decisions = [0, 1].map(|pool: usize| self.triggers[pool].step(scores[pool], world.now_s()));
        // The more pressing pool first, and one at a time: what one sends changes what the other has room for.
        let order = if scores[1] > scores[0] { [1, 0] } else { [0, 1] };
        for pool in order.into_iter().filter(|_| may_act) {
            if !matches!(decisions[pool], Decision::Act { .. }) {
                continue;
            }
            if let Some(machine) = self.decide(world, pool) {
                self.triggers[pool].acted(world.now_s());
                return Ok(vec![machine]);
            }
        }
        Ok(Vec::new())
    }
}

/// Acts when a pool uses more than a share of its capacity, and moves the smallest machine that brings it below again, or else the
/// largest that the other pool has room for below the same share.
#[derive(Debug)]
pub struct Reactive {
    threshold: f64,
    triggers: [Trigger; 2],
    log: MoveLog,
    limits: PlanLimits,
}

impl Reactive {
    /// Acts at that share of the capacity.
    #[must_use]
    pub fn new(threshold: f64) -> Self {
        let trigger = || trigger(threshold, 0.95 * threshold);
        Self { threshold, triggers: [trigger(), trigger()], log: MoveLog::default(), limits: limits() }
    }

    fn choose(&self, world: &World<'_>, pool: usize) -> Option<usize> {
        let other = 1 - pool;
        let room = self.threshold * world.scenario.capacity[other] - world.sum(other, 0);
        let excess = world.sum(pool, 0) - self.threshold * world.scenario.capacity[pool];
        let allowed = |machine: &usize| {
            let name = &world.scenario.names[*machine];
            let load = world.load(*machine, 0);
            let rests = self.log.forbids(name, POOLS[other], world.now_s(), &self.limits).is_some();
            load > 0.0 && load <= room && !world.is_moving(*machine) && !rests
        };
        let candidates: Vec<usize> = world.members(pool).filter(allowed).collect();
        let by_load = |a: &usize, b: &usize| world.load(*a, 0).total_cmp(&world.load(*b, 0));
        let enough = candidates.iter().copied().filter(|machine| world.load(*machine, 0) >= excess);
        enough.min_by(by_load).or_else(|| candidates.iter().copied().max_by(by_load))
    }
}

impl Policy for Reactive {
    fn step(&mut self, world: &World<'_>, may_act: bool) -> Result<Vec<usize>, BankError> {
        let mut moves = Vec::new();
        for pool in [0, 1] {
            let used = world.sum(pool, 0) / world.scenario.capacity[pool];
            let decision = self.triggers[pool].step(used, world.now_s());
            if !may_act || !matches!(decision, Decision::Act { .. }) {
                continue;
            }
            if let Some(machine) = self.choose(world, pool) {
                self.triggers[pool].acted(world.now_s());
                let name = &world.scenario.names[machine];
                self.log.note(name, POOLS[pool], world.now_s(), 0.0, &self.limits);
                moves.push(machine);
            }
        }
        Ok(moves)
    }
}

/// Knows what comes: moves the machine that avoids most violations within twice the horizon, if it avoids at least `least` steps of
/// them. It looks at one move at a time, so that it is a strong reference and not the optimum.
#[derive(Debug)]
pub struct Oracle {
    horizon: usize,
    least: usize,
    log: MoveLog,
    limits: PlanLimits,
}

impl Oracle {
    /// Looks `horizon` steps ahead.
    #[must_use]
    pub fn new(horizon: usize, least: usize) -> Self {
        Self { horizon, least: least.max(1), log: MoveLog::default(), limits: limits() }
    }

    /// Steps above capacity over twice the horizon, if `gone` moved from `pool` to the other.
    fn violations(&self, world: &World<'_>, pool: usize, gone: Option<usize>) -> usize {
        let [own, other] = [pool, 1 - pool].map(|pool| world.scenario.capacity[pool]);
        (1..=2 * self.horizon)
            .map(|ahead| {
                let moved = gone.map_or(0.0, |machine| world.load(machine, ahead));
                let here = world.sum(pool, ahead) - moved > own;
                let there = world.sum(1 - pool, ahead) + moved > other;
                usize::from(here) + usize::from(there)
            })
            .sum()
    }
}

impl Policy for Oracle {
    fn step(&mut self, world: &World<'_>, may_act: bool) -> Result<Vec<usize>, BankError> {
        if !may_act || world.in_flight() > 0 {
            return Ok(Vec::new());
        }
        for pool in [0, 1] {
            let soon = (1..=self.horizon).any(|ahead| world.sum(pool, ahead) > world.scenario.capacity[pool]);
            if !soon {
                continue;
            }
            let before = self.violations(world, pool, None);
            let free = |machine: &usize| {
                let name = &world.scenario.names[*machine];
                self.log.forbids(name, POOLS[1 - pool], world.now_s(), &self.limits).is_none()
            };
            let best = world
                .members(pool)
                .filter(free)
                .map(|machine| (before.saturating_sub(self.violations(world, pool, Some(machine))), machine))
                .max_by_key(|(avoided, machine)| (*avoided, std::cmp::Reverse(*machine)));
            if let Some((_, machine)) = best.filter(|(avoided, _)| *avoided >= self.least) {
                let name = &world.scenario.names[machine];
                self.log.note(name, POOLS[pool], world.now_s(), 0.0, &self.limits);
                return Ok(vec![machine]);
            }
        }
        Ok(Vec::new())
    }
}
