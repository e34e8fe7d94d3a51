//! The predictor's whole loop, as hostd runs it.

use super::{MoveLog, Order, PerResource, PlanLimits, Policy, TARGET_SCORE, Trigger, limits, pool_name, trigger};
use crate::bank::BankError;
use crate::candidates::{HostView, MachineView, PoolView};
use crate::contention::Contention;
use crate::cost::CostModel;
use crate::course::Course;
use crate::events::Event;
use crate::model::Budget;
use crate::plan::{PlanInput, expected_minutes, plan};
use crate::pool::{PoolConfig, PoolForecaster, Tick};
use crate::pools::Pools;
use crate::sample::Sample;
use crate::simulate::cause::Held;
use crate::simulate::world::{Scenario, World};
use crate::trigger::{Decision, Hold};

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
    names: Vec<String>,
    /// The pools, which learn from each other as in hostd.
    pools: Pools,
    fitted_s: f64,
    triggers: Vec<Trigger>,
    contentions: Vec<Option<Contention>>,
    said: Vec<Held>,
    log: MoveLog,
    limits: PlanLimits,
    horizon: usize,
    declared: bool,
}

impl Predictor {
    /// Looks `horizon` steps ahead over so many pools. It knows nothing of events and has yet to be told when to act; see [`Predictor::with`].
    ///
    /// # Errors
    /// [`BankError`] if the period or horizon cannot be forecast.
    pub fn new(pools: usize, period_s: f64, horizon: usize) -> Result<Self, BankError> {
        let config = PoolConfig {
            step_s: period_s,
            horizon_steps: horizon,
            thresholds: PerResource { cpu: 1.0, ..PoolConfig::default().thresholds },
            ..PoolConfig::default()
        };
        let limits = PlanLimits { lasting_s: 2.0 * horizon as f64 * period_s, ..limits(pools) };
        Ok(Self {
            names: (0..pools).map(pool_name).collect(),
            pools: Pools::new(config)?,
            fitted_s: f64::NAN,
            triggers: vec![trigger(1.0, 1.0); pools],
            contentions: vec![None; pools],
            said: vec![Held::Calm; pools],
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
    pub fn warm(scenario: &Scenario<'_>, horizon: usize) -> Result<Self, BankError> {
        let mut warm = Self::new(scenario.capacity.len(), scenario.period_s, horizon)?;
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
        let triggers = vec![trigger(act, 0.8 * act); self.names.len()];
        Self { triggers, limits, declared, ..self.clone() }
    }

    fn forecaster(&self, pool: usize) -> Option<&PoolForecaster> {
        self.pools.get(&self.names[pool])
    }

    fn course(&self, pool: usize) -> Course {
        self.forecaster(pool).map(PoolForecaster::course).unwrap_or_default()
    }

    /// Machines that have arrived bring their history along.
    fn follow(&mut self, world: &World<'_>) -> Result<(), BankError> {
        for (machine, pool) in world.pool.iter().enumerate() {
            let name = &world.scenario.names[machine];
            if self.forecaster(*pool).is_some_and(|own| own.history(name).is_some()) {
                continue;
            }
            let others = (0..self.names.len()).filter(|other| other != pool);
            let history = others.filter_map(|other| self.forecaster(other)?.history(name)).next().cloned();
            if let Some(history) = history {
                self.pools.pool(&self.names[*pool])?.adopt(name, history)?;
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
            let demand = self.pools.machine_forecast(&self.names[pool], name, crate::Resource::Cpu, self.horizon);
            MachineView {
                name: name.clone(),
                host: self.names[pool].clone(),
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
            name: self.names[pool].clone(),
            pool: self.names[pool].clone(),
            capacity: PerResource { cpu: capacity, ..PerResource::default() },
            expected_use: PerResource {
                cpu: expected.map(|expected| expected.point).or(Some(0.0)),
                ..PerResource::default()
            },
            machines: world.members(pool).map(|machine| world.scenario.names[machine].clone()).collect(),
            ..HostView::default()
        }
    }

    /// Whom to move where, or what kept it from that; `touched` are pools that a machine leaves or comes to at this step.
    fn decide(&mut self, world: &World<'_>, pool: usize, touched: &[bool]) -> Result<Vec<Order>, Held> {
        let source = self.contentions[pool].as_ref().ok_or(Held::Untold)?;
        let course = self.course(pool);
        // What cannot be avoided is not planned for: the same answer, sooner.
        if expected_minutes(source, &course, &WEIGHTS, &self.limits) < self.limits.minimum_benefit_minutes {
            return Err(Held::LittleExpected);
        }
        let others = (0..self.names.len()).filter(|other| *other != pool && !touched[*other]);
        let (mut pools, mut hosts) = (Vec::new(), Vec::new());
        for other in others {
            let contention = self.contentions[other].clone().ok_or(Held::Untold)?;
            pools.push(PoolView { name: self.names[other].clone(), contention, course: self.course(other) });
            hosts.push(self.target(world, other));
        }
        let made = plan(&PlanInput {
            now_s: world.now_s(),
            source_pool: &self.names[pool],
            source,
            course: &course,
            machines: &self.machines(world, pool),
            pools: &pools,
            hosts: &hosts,
            weights: WEIGHTS,
            in_flight: world.in_flight(),
            log: &self.log,
            cost: &CostModel::default(),
            limits: &self.limits,
        });
        if made.moves.is_empty() {
            return Err(Held::of(&made.rejected));
        }
        let mut orders = Vec::new();
        for best in &made.moves {
            self.log.note(&best.machine, &self.names[pool], world.now_s(), best.cost.total_ms / 1_000.0, &self.limits);
            let machine = world.scenario.names.iter().position(|name| *name == best.machine);
            let to = self.names.iter().position(|name| *name == best.to_pool);
            orders.extend(machine.zip(to).map(|(machine, to)| Order { machine, to }));
        }
        Ok(orders)
    }

    /// Gives each pool its samples.
    fn tick(&mut self, world: &World<'_>) -> Result<(), BankError> {
        self.follow(world)?;
        for pool in 0..self.names.len() {
            let sample = |machine: usize| Sample {
                machine: world.scenario.names[machine].clone(),
                values: PerResource { cpu: world.measured(machine), ..PerResource::default() },
            };
            let samples: Vec<Sample> = world.members(pool).map(sample).collect();
            let events = self.events(world, pool);
            let capacity = PerResource { cpu: Some(world.scenario.capacity[pool]), ..PerResource::default() };
            let tick = Tick { now_s: world.now_s(), capacity, samples: &samples, events: &events };
            self.contentions[pool] = Some(self.pools.tick(&self.names[pool], &tick)?);
        }
        if self.fitted_s.is_nan() {
            self.fitted_s = world.now_s();
        } else if world.now_s() - self.fitted_s >= REFIT_S {
            self.fitted_s = world.now_s();
            self.pools.refit(&mut Budget::unlimited());
        }
        Ok(())
    }
}

impl Policy for Predictor {
    fn step(&mut self, world: &World<'_>, may_act: bool) -> Result<Vec<Order>, BankError> {
        self.tick(world)?;
        let score = |state: &Option<Contention>| state.as_ref().map_or(f64::NAN, |state| state.score);
        let scores: Vec<f64> = self.contentions.iter().map(score).collect();
        let mut acting = Vec::new();
        for (pool, score) in scores.iter().enumerate() {
            self.said[pool] = match self.triggers[pool].step(*score, world.now_s()) {
                Decision::Hold { why: Hold::Cooldown { .. } } => Held::Cooldown,
                Decision::Hold { .. } => Held::Calm,
                Decision::Act { .. } => {
                    acting.push(pool);
                    Held::OtherFirst
                }
            };
        }
        // The most pressing pool first; what one sends changes what it and the other have room for, so that both are left alone
        // until the next step.
        acting.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let mut touched = vec![false; self.names.len()];
        let mut orders = Vec::new();
        for pool in acting.into_iter().filter(|_| may_act) {
            if touched[pool] {
                continue;
            }
            self.said[pool] = match self.decide(world, pool, &touched) {
                Ok(more) => {
                    self.triggers[pool].acted(world.now_s());
                    touched[pool] = true;
                    more.iter().for_each(|order| touched[order.to] = true);
                    orders.extend(more);
                    Held::Moved
                }
                Err(held) => held,
            };
        }
        Ok(orders)
    }

    fn said(&self, pool: usize) -> Held {
        self.said[pool]
    }
}

const WEIGHTS: PerResource<f64> = PerResource { cpu: 1.0, memory: 1.0, io: 1.0, network: 1.0 };
/// Trees are fitted anew after so many seconds, as in an evaluation.
const REFIT_S: f64 = 7.0 * 86_400.0;
