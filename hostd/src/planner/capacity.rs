//! How many hosts pools will need over the next day.
//!
//! The forecasts by which machines are moved look minutes ahead. These have steps of five minutes, means over the step, and reach a
//! day: a shorter peak is a matter of moving machines and not of ordering hosts. What was measured before a restart is played back
//! from the store, up to a week.

use std::collections::BTreeMap;

use predictor::capacity::{Advice, CapacityConfig, Recommendation, Sizing, needs};
use predictor::{BankError, Contention, PoolConfig, Pools, Sample, Tick};

use super::convert::{capacity_of, from_predictor, resource};
use super::history::{History, Mean};
use super::{Planner, PoolState, events, pool_config};
use crate::api::types::{Capacity, CapacityAdvice, Event, HostsNeeded, PoolCapacity};
use crate::clock::unix_ms;
use crate::config::HostConfig;
use crate::store::{Store, StoreError};

/// Steps of these forecasts.
const STEP_S: f64 = 300.0;
/// They reach a day.
const AHEAD_S: f64 = 86_400.0;
/// Minutes are stored for a week.
const WEEK_MS: u64 = 7 * 86_400_000;
/// Accepted risks that can be asked for.
pub const RISKS: std::ops::RangeInclusive<f64> = 0.0001..=0.5;

/// Needs of all pools.
#[derive(Debug)]
pub(super) struct Sizes {
    config: CapacityConfig,
    step_s: f64,
    /// Ticks of the planner in one of its steps, and how many of the present one are over.
    every: u32,
    over: u32,
    means: BTreeMap<String, BTreeMap<String, Mean>>,
    pools: Pools,
    known: BTreeMap<String, Known>,
    stored: History,
}

/// How one pool stands.
#[derive(Debug)]
struct Known {
    hosts: usize,
    per_host: Capacity,
    contention: Contention,
    sizing: Sizing,
    recommended: Recommendation,
}

/// The hosts that can take machines.
fn hosts(state: &PoolState) -> usize {
    state.live().filter(|host| !host.draining).count()
}

fn per_host(state: &PoolState) -> Capacity {
    let open = || state.live().filter(|host| !host.draining);
    let share = 1.0 / open().count().max(1) as f64;
    open().fold(Capacity::default(), |mean, host| Capacity {
        cpu_cores: mean.cpu_cores + share * host.capacity.cpu_cores,
        memory_mib: mean.memory_mib + share * host.capacity.memory_mib,
        disk_bytes_per_second: mean.disk_bytes_per_second + share * host.capacity.disk_bytes_per_second,
        network_bytes_per_second: mean.network_bytes_per_second + share * host.capacity.network_bytes_per_second,
    })
}

impl Sizes {
    /// Nothing is known yet.
    pub(super) fn new(config: &HostConfig) -> Result<Self, BankError> {
        let sample_s = config.sample_interval_ms as f64 / 1000.0;
        let every = (STEP_S / sample_s).round().max(1.0);
        let step_s = every * sample_s;
        let pool_config = PoolConfig {
            step_s,
            // Needs are quantiles, which trees do not change.
            lessons: 0,
            ..pool_config(config, (AHEAD_S / step_s).round().max(1.0) as usize)
        };
        let capacity = &config.planner.capacity;
        Ok(Self {
            config: CapacityConfig {
                risk: capacity.risk,
                lead_s: capacity.lead_s,
                hold_s: capacity.hold_s,
                thresholds: pool_config.thresholds,
                least: capacity.least_hosts,
                most: capacity.most_hosts,
            },
            step_s,
            every: every as u32,
            over: 0,
            means: BTreeMap::new(),
            pools: Pools::new(pool_config)?,
            known: BTreeMap::new(),
            stored: History::default(),
        })
    }

    /// Notes one tick; true at the end of a step.
    fn note(&mut self, states: &[PoolState]) -> bool {
        self.means.retain(|pool, _| states.iter().any(|state| &state.pool == pool));
        for state in states {
            let means = self.means.entry(state.pool.clone()).or_default();
            for sample in state.samples() {
                means.entry(sample.machine).or_default().add(&sample.values);
            }
        }
        self.over += 1;
        // The first step is one tick long: there is an answer at once, if a poor one.
        self.over >= self.every || self.known.is_empty()
    }

    fn step(&mut self, states: &[PoolState], declared: &[Event], now_s: f64) -> Result<(), BankError> {
        self.over = 0;
        self.play_back(states)?;
        let declared = events::occurrences(declared, unix_ms(), AHEAD_S);
        for state in states {
            let means = self.means.remove(&state.pool).unwrap_or_default();
            // Those that are there now; one that left in the meantime is another pool's.
            let sample = |sample: Sample| Sample {
                values: means.get(&sample.machine).map(Mean::values).unwrap_or_default(),
                machine: sample.machine,
            };
            let samples: Vec<Sample> = state.samples().into_iter().map(sample).collect();
            self.hand_over(&state.pool, &samples)?;
            let events = events::for_pool(&state.pool, &samples, &declared);
            let capacity = capacity_of(&state.capacity());
            let contention =
                self.pools.tick(&state.pool, &Tick { now_s, capacity, samples: &samples, events: &events })?;
            let (hosts, per_host) = (hosts(state), per_host(state));
            let before = self.known.remove(&state.pool);
            let mut sizing = before.map_or_else(|| Sizing::new(self.config), |known| known.sizing);
            let recommended = sizing.step(&contention, &capacity_of(&per_host), hosts, 0);
            self.known.insert(state.pool.clone(), Known { hosts, per_host, contention, sizing, recommended });
        }
        self.pools.retain(|pool| states.iter().any(|state| state.pool == pool));
        self.known.retain(|pool, _| states.iter().any(|state| &state.pool == pool));
        Ok(())
    }

    /// A machine that has moved takes its history along to its new pool.
    fn hand_over(&mut self, pool: &str, samples: &[Sample]) -> Result<(), BankError> {
        for sample in samples {
            if self.pools.get(pool).is_some_and(|own| own.history(&sample.machine).is_some()) {
                continue;
            }
            let history = self.pools.iter().find_map(|(_, other)| other.history(&sample.machine)).cloned();
            if let Some(history) = history {
                self.pools.pool(pool)?.adopt(&sample.machine, history)?;
            }
        }
        Ok(())
    }

    fn play_back(&mut self, states: &[PoolState]) -> Result<(), BankError> {
        let now_unix_ms = unix_ms();
        if self.stored.is_empty(now_unix_ms) {
            return Ok(());
        }
        for state in states {
            let known = |machine: &str| self.pools.iter().any(|(_, forecaster)| forecaster.history(machine).is_some());
            let mut new: Vec<String> = state.samples().into_iter().map(|sample| sample.machine).collect();
            new.retain(|machine| !known(machine));
            let steps = |machine: String| Some((machine.clone(), self.stored.take(&machine, now_unix_ms)?));
            let found: Vec<_> = new.into_iter().filter_map(steps).collect();
            if !found.is_empty() {
                self.pools.play_back(&state.pool, found)?;
            }
        }
        Ok(())
    }

    fn view(&self, pool: &str, known: &Known, risk: f64) -> PoolCapacity {
        let asked = CapacityConfig { risk, ..self.config };
        let needs = needs(&known.contention, &capacity_of(&known.per_host), &asked);
        let short = needs.iter().position(|need| need.hosts > known.hosts);
        let ordered = short.map(|place| {
            // It is enough until the end of the window before.
            let until_s = place.checked_sub(1).map_or(0.0, |before| needs[before].within_s);
            (until_s - self.config.lead_s).max(0.0)
        });
        let need = |need: &predictor::capacity::Need| HostsNeeded {
            within_s: need.within_s,
            hosts: need.hosts,
            resource: resource(need.resource),
            use_at_risk: from_predictor(need.resource, need.use_at_risk),
        };
        PoolCapacity {
            pool: pool.to_owned(),
            hosts: known.hosts,
            per_host: known.per_host,
            risk,
            missing: needs.last().map_or(0, |last| last.hosts.saturating_sub(known.hosts)),
            needs: needs.iter().map(need).collect(),
            provision_within_s: ordered,
            advice: match known.recommended.advice {
                Advice::Keep => CapacityAdvice::Keep,
                Advice::Provision { .. } => CapacityAdvice::Provision,
                Advice::Release => CapacityAdvice::Release,
                Advice::Unknown => CapacityAdvice::Unknown,
            },
            reason: known.recommended.reason.clone(),
        }
    }
}

impl Planner {
    /// Takes one tick's measurements for the forecasts of a day.
    pub(super) fn size(&mut self, states: &[PoolState], declared: &[Event]) -> Result<(), BankError> {
        let now_s = self.now_s();
        if self.sizes.note(states) { self.sizes.step(states, declared, now_s) } else { Ok(()) }
    }

    /// Takes up what was measured in the last week.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn recall_week(&mut self, store: &Store, now_unix_ms: u64) -> Result<(), StoreError> {
        let step_ms = (self.sizes.step_s * 1000.0) as u64;
        self.sizes.stored = History::load_steps(store, step_ms.max(1), WEEK_MS, now_unix_ms)?;
        Ok(())
    }

    /// How many hosts each pool needs over the next day at that risk; the configured one if none is given.
    pub fn capacities(&self, risk: Option<f64>) -> Vec<PoolCapacity> {
        let risk = risk.unwrap_or(self.sizes.config.risk);
        self.sizes.known.iter().map(|(pool, known)| self.sizes.view(pool, known, risk)).collect()
    }
}
