//! From measurements to decisions.
//!
//! ```text
//! summaries of all hosts ─► forecaster of each pool ─► contention ─► trigger (own pool, leader only) ─► plan ─► executor
//! declared events        ─►      ▲ refit: trees, off the hot path                                          │
//!                            cost model  ◄──── what the migration really took ◄──────────────────────────┘
//! ```
//!
//! Forecasts are made on every host for every pool it sees, so that whoever becomes leader has warm models; only the leader
//! of a pool acts. The predictor is pure; this module keeps the time, the state and the names.

mod arrival;
mod capacity;
pub mod convert;
mod decide;
pub mod events;
pub mod history;
pub mod refit;
mod trust;
mod wait;

use std::collections::BTreeMap;
use std::time::Instant;

use predictor::guard::{Guard, Guarded};
use predictor::{
    BankError, Contention, CostModel, Decision, Hold, MigrationShape, MoveLog, PlanLimits, PoolConfig, Pools, Resource,
    Sample, Tick, Trigger, TriggerConfig,
};

use crate::api::types::{
    Capacity, DirtyEstimate, Event, HostSummary, MachineForecast, MachineStatus, MachineSummary, Plan, PoolView,
    TriggerState, TriggerView, Usage,
};
use crate::clock::unix_ms;
use crate::config::HostConfig;
use crate::metrics::sampler::sum;
use convert::{capacity_of, forecasts_of, sample_of, scores_of};

pub use capacity::RISKS;
pub use decide::Chosen;
pub use history::History;

/// Of the score at which a pool acts: from here on its machines' dirty rates are estimated.
const NEAR: f64 = 0.5;

/// One pool as it was measured last.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolState {
    /// Name.
    pub pool: String,
    /// Its hosts; those that are not live count for nothing.
    pub hosts: Vec<HostSummary>,
    /// Who plans for it.
    pub leader: Option<String>,
}

impl PoolState {
    fn live(&self) -> impl Iterator<Item = &HostSummary> {
        self.hosts.iter().filter(|host| host.live)
    }

    fn capacity(&self) -> Capacity {
        self.live().fold(Capacity::default(), |total, host| Capacity {
            cpu_cores: total.cpu_cores + host.capacity.cpu_cores,
            memory_mib: total.memory_mib + host.capacity.memory_mib,
            disk_bytes_per_second: total.disk_bytes_per_second + host.capacity.disk_bytes_per_second,
            network_bytes_per_second: total.network_bytes_per_second + host.capacity.network_bytes_per_second,
        })
    }

    fn usage(&self) -> Usage {
        let usages: Vec<Usage> = self.live().filter_map(|host| host.usage).collect();
        sum(usages.iter())
    }

    /// The machines that are in the pool. One that is arriving still counts where it comes from.
    fn members(&self) -> impl Iterator<Item = &MachineSummary> {
        self.live().flat_map(|host| &host.machines).filter(|machine| {
            !matches!(machine.status, MachineStatus::Incoming | MachineStatus::Creating | MachineStatus::Deleting)
        })
    }

    /// One sample for each machine that is in the pool.
    fn samples(&self) -> Vec<Sample> {
        self.members().map(sample_of).collect()
    }

    /// What was measured of the machines that are in the pool.
    pub fn measured(&self) -> impl Iterator<Item = (&str, Usage)> {
        self.members().filter_map(|machine| Some((machine.name.as_str(), machine.usage?)))
    }
}

/// Forecasts all pools and decides for one.
#[derive(Debug)]
pub struct Planner {
    host: String,
    config: HostConfig,
    started: (Instant, f64),
    horizon_steps: usize,
    /// Forecasters of all pools, and the trees that all of them have taught.
    pools: Pools,
    contentions: BTreeMap<String, Contention>,
    states: Vec<PoolState>,
    trigger: Trigger,
    last_decision: Decision,
    /// Whether this pool's probabilities mean what they say, and what is acted on.
    guard: Guard,
    guarded: Option<Guarded>,
    log: MoveLog,
    cost: CostModel,
    limits: PlanLimits,
    observed: BTreeMap<String, Observed>,
    bandwidth: Option<f64>,
    last_plan_s: Option<f64>,
    /// A move that is chosen and waits for its latest safe start.
    waiting: Option<Plan>,
    /// What was measured before this hostd started.
    stored: History,
    /// How many hosts pools will need.
    sizes: capacity::Sizes,
}

/// How fast a machine dirties its memory: as earlier migrations of it showed, else as its VMM estimates.
#[derive(Clone, Copy, Debug, Default)]
struct Observed {
    dirty_bytes_per_second: f64,
    /// 0 if it is not known.
    working_set_bytes: f64,
}

impl From<DirtyEstimate> for Observed {
    fn from(estimate: DirtyEstimate) -> Self {
        Self {
            dirty_bytes_per_second: estimate.bytes_per_second,
            working_set_bytes: estimate.working_set_bytes.unwrap_or(0.0),
        }
    }
}

impl Planner {
    /// A planner that has seen nothing.
    ///
    /// # Errors
    ///
    /// If the sampling interval or horizon cannot be forecast; the configuration's check keeps them within bounds.
    pub fn new(config: &HostConfig) -> Result<Self, BankError> {
        let planner = &config.planner;
        let trigger = TriggerConfig {
            act_above: planner.start_score,
            rearm_below: planner.stop_score,
            confirm_steps: planner.confirmations,
            cooldown_s: planner.cooldown_s,
            backoff: planner.backoff,
            ..TriggerConfig::default()
        };
        let limits = PlanLimits {
            goal: planner.stop_score,
            target_score: planner.target_score,
            target_use: predictor::PerResource::from_fn(|_| planner.target_use),
            in_flight: config.concurrent_migrations,
            in_flight_per_host: config.concurrent_migrations,
            machine_cooldown_s: planner.machine_cooldown_s,
            minimum_benefit_minutes: planner.minimum_benefit_minutes,
            lasting_s: planner.horizon_s,
            onset: planner.early_risk,
            margin_s: planner.lead_s,
            ..PlanLimits::default()
        };
        let step_s = config.sample_interval_ms as f64 / 1000.0;
        let horizon_steps = ((planner.horizon_s / step_s).ceil() as usize).clamp(1, predictor::bank::LONGEST_HORIZON);
        Ok(Self {
            host: config.host.clone(),
            config: config.clone(),
            started: (Instant::now(), unix_ms() as f64 / 1000.0),
            horizon_steps,
            guard: trust::guard(step_s, horizon_steps),
            guarded: None,
            pools: Pools::new(pool_config(config, horizon_steps))?,
            contentions: BTreeMap::new(),
            states: Vec::new(),
            trigger: Trigger::new(trigger),
            last_decision: Decision::Hold { why: Hold::Calm },
            log: MoveLog::default(),
            cost: CostModel::default(),
            limits,
            observed: BTreeMap::new(),
            bandwidth: None,
            last_plan_s: None,
            waiting: None,
            stored: History::default(),
            sizes: capacity::Sizes::new(config)?,
        })
    }

    /// Seconds since 1970, but monotonic: the predictor must not see the clock being set.
    fn now_s(&self) -> f64 {
        self.started.1 + self.started.0.elapsed().as_secs_f64()
    }

    fn weights(&self) -> predictor::PerResource<f64> {
        weights(&self.config)
    }

    /// Takes one step's measurements of all pools. Call it once a sampling interval.
    ///
    /// # Errors
    ///
    /// If the sampling interval or horizon cannot be forecast; the configuration's check keeps them within bounds.
    pub fn tick(&mut self, states: Vec<PoolState>, declared: &[Event]) -> Result<(), BankError> {
        let now_s = self.now_s();
        self.size(&states, declared)?;
        // What is over may still be in effect, and closes its record later.
        let declared = &events::occurrences(declared, unix_ms(), self.config.planner.horizon_s);
        self.replay_histories(&states)?;
        self.hand_over_histories(&states)?;
        for state in &states {
            let samples = state.samples();
            let events = events::for_pool(&state.pool, &samples, declared);
            let capacity = capacity_of(&state.capacity());
            let tick = Tick { now_s, capacity, samples: &samples, events: &events };
            let contention = self.pools.tick(&state.pool, &tick)?;
            self.contentions.insert(state.pool.clone(), contention);
        }
        self.pools.retain(|pool| states.iter().any(|state| state.pool == pool));
        self.contentions.retain(|pool, _| states.iter().any(|state| &state.pool == pool));
        self.states = states;
        let score = self.trusted_score();
        self.last_decision = self.trigger.step(score, now_s);
        Ok(())
    }

    /// A machine that has moved takes its history along to its new pool.
    fn hand_over_histories(&mut self, states: &[PoolState]) -> Result<(), BankError> {
        for state in states {
            for sample in state.samples() {
                let machine = sample.machine;
                if self.pools.get(&state.pool).is_some_and(|own| own.history(&machine).is_some()) {
                    continue;
                }
                let history = self.pools.iter().find_map(|(_, other)| other.history(&machine)).cloned();
                if let Some(history) = history {
                    self.pools.pool(&state.pool)?.adopt(&machine, history)?;
                }
            }
        }
        Ok(())
    }

    /// All pools as forecast here.
    pub fn views(&self) -> Vec<PoolView> {
        self.states.iter().map(|state| self.view(state)).collect()
    }

    fn view(&self, state: &PoolState) -> PoolView {
        let contention = self.contentions.get(&state.pool);
        // A pool without machines is not unknown: it is empty.
        let empty = state.live().next().is_some() && state.samples().is_empty();
        let score = contention.filter(|contention| empty || known(contention)).map(|contention| contention.score);
        PoolView {
            pool: state.pool.clone(),
            leader: state.leader.clone(),
            hosts: state.hosts.clone(),
            capacity: state.capacity(),
            usage: state.usage(),
            forecasts: contention.map(|contention| forecasts_of(contention, self.step_s())).unwrap_or_default(),
            scores: contention.map(scores_of).unwrap_or_default(),
            score,
            horizon_s: self.config.planner.horizon_s,
            expected_contention_s: contention.and_then(|contention| {
                let reached = contention.resources.iter().filter_map(|(_, state)| state.as_ref()?.reaches(0.5));
                reached.reduce(f64::min)
            }),
            reasons: contention.map(|contention| contention.reasons.clone()).unwrap_or_default(),
            trigger: self.trigger_view(state),
            calibration_error: self.guarded_of(&state.pool).and_then(|guarded| guarded.calibration_error),
            fallback: self.guarded_of(&state.pool).and_then(|guarded| guarded.reason.clone()),
            at_risk: self.at_risk(state),
            computed_unix_ms: unix_ms(),
        }
    }

    fn step_s(&self) -> f64 {
        self.config.sample_interval_ms as f64 / 1000.0
    }

    fn trigger_view(&self, pool: &PoolState) -> TriggerView {
        let own = pool.pool == self.config.pool;
        let state = match self.last_decision {
            _ if !own => TriggerState::Quiet,
            Decision::Act { .. } if self.waiting.is_some() => TriggerState::Planned,
            Decision::Act { .. } => TriggerState::Firing,
            Decision::Hold { why: Hold::Cooldown { .. } } => TriggerState::Cooldown,
            Decision::Hold { why: Hold::Confirming { .. } } => TriggerState::Rising,
            Decision::Hold { .. } => TriggerState::Quiet,
        };
        let left = self.trigger.cooldown_left(self.now_s());
        let until = (own && left > 0.0).then(|| unix_ms() + (left * 1000.0) as u64);
        TriggerView {
            state,
            start_score: self.config.planner.start_score,
            stop_score: self.config.planner.stop_score,
            cooldown_until_unix_ms: until,
            latest_start_unix_ms: self.waiting.as_ref().filter(|_| own).and_then(|plan| plan.latest_start_unix_ms),
        }
    }

    /// Forecasts of all machines of this host's pool.
    pub fn machine_forecasts(&self) -> Vec<MachineForecast> {
        let Some(state) = self.states.iter().find(|state| state.pool == self.config.pool) else { return Vec::new() };
        let horizons = convert::horizons(self.horizon_steps);
        let forecast = |host: &HostSummary, machine: &str| MachineForecast {
            machine: machine.to_owned(),
            host: host.host.clone(),
            forecasts: Resource::ALL
                .into_iter()
                .flat_map(|resource| horizons.iter().map(move |steps| (resource, *steps)))
                .filter_map(|(resource, steps)| {
                    let forecast = self.pools.machine_forecast(&state.pool, machine, resource, steps)?;
                    Some(convert::forecast(resource, &forecast, self.step_s()))
                })
                .collect(),
        };
        let machines = state.live().flat_map(|host| host.machines.iter().map(move |machine| (host, machine)));
        machines.map(|(host, machine)| forecast(host, &machine.name)).collect()
    }

    /// Takes up what an earlier hostd decided: the cooldowns of the pool and of its machines go on.
    pub fn remember(&mut self, plans: &[Plan]) {
        let mut moves: Vec<&Plan> = plans.iter().filter(|plan| plan.migration.is_some()).collect();
        moves.sort_by_key(|plan| plan.at_unix_ms);
        for plan in &moves {
            let (Some(machine), at_s) = (&plan.machine, plan.at_unix_ms as f64 / 1000.0) else { continue };
            self.log.note(machine, &plan.pool, at_s, 0.0, &self.limits);
        }
        if let Some(last) = moves.last() {
            self.trigger.acted(last.at_unix_ms as f64 / 1000.0);
        }
    }

    /// Whether this host's pool may soon have to move machines: from half of the score at which it acts. What they dirty is
    /// worth knowing then.
    pub fn near_contention(&self) -> bool {
        let score = self.guarded.as_ref().map(|guarded| guarded.score);
        score.is_some_and(|score| score >= self.config.planner.start_score * NEAR)
    }

    /// Learns from a finished migration.
    pub fn learn(&mut self, chosen: &Chosen, report: &migration::report::Report) {
        self.cost.observe(&chosen.shape, report.total_ms, report.downtime_ms.total);
        self.log.note(&chosen.machine, &self.config.pool, self.now_s(), report.total_ms / 1000.0, &self.limits);
        let pages: u64 = report.rounds.iter().map(|round| round.dirty_pages_after).sum();
        let ms: f64 = report.rounds.iter().map(|round| round.ms).sum();
        if ms > 0.0 {
            let dirty_bytes_per_second = pages as f64 * migration::guest::PAGE_BYTES as f64 / ms * 1000.0;
            let observed = Observed { dirty_bytes_per_second, working_set_bytes: 0.0 };
            self.observed.insert(chosen.machine.clone(), observed);
        }
        let throughput = report.memory.throughput_bytes_per_second;
        if throughput > 0.0 {
            self.bandwidth = Some(self.bandwidth.map_or(throughput, |known| 0.7 * known + 0.3 * throughput));
        }
    }
}

/// How pools are forecast. All but what this configuration sets is as in `headroom forecast evaluate`.
fn pool_config(config: &HostConfig, horizon_steps: usize) -> PoolConfig {
    let thresholds = config.planner.thresholds;
    PoolConfig {
        step_s: config.sample_interval_ms as f64 / 1000.0,
        horizon_steps,
        thresholds: predictor::PerResource {
            cpu: thresholds.cpu,
            memory: thresholds.memory,
            io: thresholds.io,
            network: thresholds.network,
        },
        weights: weights(config),
        lessons: config.planner.lessons,
        ..PoolConfig::default()
    }
}

fn weights(config: &HostConfig) -> predictor::PerResource<f64> {
    let weights = config.planner.weights;
    predictor::PerResource { cpu: weights.cpu, memory: weights.memory, io: weights.io, network: weights.network }
}

/// Whether anything is known of a pool: without one sample the score is a zero that says nothing.
fn known(contention: &Contention) -> bool {
    contention.resources.iter().any(|(_, resource)| resource.is_some())
}

/// What a migration of a machine would have to carry; see [`MigrationShape`].
fn shape(machine: &MachineSummary, observed: Observed, bandwidth: f64, downtime_ms: u64) -> MigrationShape {
    let usage = machine.usage.unwrap_or_default();
    MigrationShape {
        memory_bytes: usage.memory_mib * f64::from(1 << 20),
        dirty_bytes_per_second: observed.dirty_bytes_per_second,
        working_set_bytes: observed.working_set_bytes,
        // Holes are not sent.
        disk_bytes: machine.disk_allocated_bytes as f64,
        disk_dirty_bytes_per_second: usage.disk_bytes_per_second,
        bandwidth_bytes_per_second: bandwidth,
        // Pages get a quarter of the downtime: pause, blocks, state and commit need theirs.
        downtime_limit_ms: downtime_ms as f64 / 4.0,
    }
}

#[cfg(test)]
mod tests;
