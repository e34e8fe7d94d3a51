//! Forecasts for a pool and each of its machines from their samples.
//!
//! The pool's series is the sum over the machines that are in it *now*, at all times of the history: when a machine comes or
//! goes, the sum is made anew from the machines' histories, so that a migration does not look like a change of load.

mod config;
mod course;
mod histories;
mod history;
mod learn;

pub use config::PoolConfig;
pub use history::MachineHistory;

use crate::bank::{Bank, BankConfig, BankError};
use crate::contention::{Contention, Onset, Outlook, ResourceContention, combine, describe};
use crate::events::{Change, Event, EventBook, Record, Scope};
use crate::experience::Experience;
use crate::fleet::Fleet;
use crate::forecast::Forecast;
use crate::insight::Waiting;
use crate::maximum::Maxima;
use crate::sample::{PerResource, Resource, Sample, plausible};
use crate::window::Window;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Starts of declared events that are told apart in the course of contention.
const STARTS: usize = 8;

/// One step's input. See [`PoolForecaster::tick`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tick<'a> {
    /// The caller's clock in seconds.
    pub now_s: f64,
    /// What the pool has of each resource; `None` = not known, not watched.
    pub capacity: PerResource<Option<f64>>,
    /// One for **every** machine that is in the pool, with `None` for what was not measured; a machine that is not named has
    /// left the pool.
    pub samples: &'a [Sample],
    /// All events that are declared for the pool now.
    pub events: &'a [Event],
}

/// Forecasts of one pool. See the module's description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolForecaster {
    config: PoolConfig,
    bank_config: Arc<BankConfig>,
    machines: BTreeMap<String, MachineHistory>,
    /// Change by events of the whole pool that was taken out of each step's sum.
    taken_out: PerResource<Window>,
    sums: PerResource<Series>,
    events: EventBook,
    /// Sum of the machines at the last tick, events included.
    measured: PerResource<Option<f64>>,
    /// What was said of the pool and is compared with what comes.
    #[serde(default)]
    waiting: PerResource<Waiting>,
    /// What there was at the last tick.
    #[serde(default)]
    capacity: PerResource<Option<f64>>,
    now_s: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Series {
    bank: Bank,
    maxima: Maxima,
}

impl Series {
    fn new(config: &Arc<BankConfig>) -> Result<Self, BankError> {
        Ok(Self { bank: Bank::shared(config)?, maxima: Maxima::new(config)? })
    }

    fn update(&mut self, value: Option<f64>) {
        self.bank.update(value);
        self.maxima.update(plausible(value));
    }

    /// As [`Series::update`] for the past; [`Maxima::refresh`] has to follow.
    fn replay(&mut self, value: Option<f64>) {
        self.bank.update(value);
        self.maxima.replay(plausible(value));
    }
}

/// A number that differs between machines and is the same in every run (FNV-1a).
fn number_of(machine: &str) -> u32 {
    machine.bytes().fold(0x811C_9DC5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)) >> 8
}

fn each<T>(mut make: impl FnMut() -> Result<T, BankError>) -> Result<PerResource<T>, BankError> {
    Ok(PerResource { cpu: make()?, memory: make()?, io: make()?, network: make()? })
}

impl PoolForecaster {
    /// A forecaster that has seen nothing.
    ///
    /// # Errors
    /// [`BankError`] if the step or the horizon cannot be used.
    pub fn new(config: PoolConfig) -> Result<Self, BankError> {
        if !(config.step_s.is_finite() && config.step_s > 0.0) {
            return Err(BankError::NotPositive { name: "step_s", value: config.step_s });
        }
        let bank_config = Arc::new(BankConfig::for_horizon(config.step_s, config.horizon_steps));
        Ok(Self {
            machines: BTreeMap::new(),
            taken_out: PerResource::from_fn(|_| Window::new(config.history_steps)),
            sums: each(|| Series::new(&bank_config))?,
            events: EventBook::default(),
            measured: PerResource::default(),
            waiting: PerResource::default(),
            capacity: PerResource::default(),
            now_s: 0.0,
            bank_config,
            config,
        })
    }

    /// Takes one step's samples and says how the pool stands. Call it once a step, also when nothing could be measured. This pool knows
    /// nothing of others; see [`crate::Pools`] for many that learn from each other.
    ///
    /// # Errors
    /// None with a configuration that [`PoolForecaster::new`] accepted.
    pub fn tick(&mut self, tick: &Tick<'_>) -> Result<Contention, BankError> {
        self.tick_with(tick, None, [0; 2])
    }

    /// As [`PoolForecaster::tick`], learning from and for all others that are given the same experience, with so many machines before and in
    /// all.
    pub(crate) fn tick_with(
        &mut self,
        tick: &Tick<'_>,
        mut experience: Option<&mut PerResource<Experience>>,
        of: [usize; 2],
    ) -> Result<Contention, BankError> {
        self.now_s = tick.now_s;
        self.capacity = tick.capacity;
        self.follow_membership(tick.samples)?;
        self.events.declare(tick.events, tick.now_s);
        self.measured = PerResource::from_fn(|resource| self.sum_of(tick.samples, resource));
        self.weigh_events(tick);
        self.learn(tick.samples, experience.as_deref_mut(), of);
        for resource in Resource::ALL {
            if let Some(limit) = self.limit(resource) {
                let time = self.step_number();
                let (maxima, waiting) = (&mut self.sums[resource].maxima, &mut self.waiting[resource]);
                maxima.watch(limit);
                if let Some(experience) = experience.as_deref_mut() {
                    experience[resource].insight.follow(waiting, maxima, limit, time);
                }
            }
        }
        Ok(self.contention(&tick.capacity))
    }

    /// Above what the pool counts as contended.
    pub(crate) fn limit(&self, resource: Resource) -> Option<f64> {
        Some(plausible(self.capacity[resource])? * self.config.thresholds[resource])
    }

    /// The number of this step, counted from the caller's epoch.
    pub(crate) fn step_number(&self) -> u64 {
        (self.now_s / self.config.step_s).max(0.0).round() as u64
    }

    /// The machines named in `samples` are the members from now on; the sums are made anew if that changed.
    fn follow_membership(&mut self, samples: &[Sample]) -> Result<(), BankError> {
        // Nearly always nothing has changed, and who gives samples gives them in order.
        if self.machines.keys().eq(samples.iter().map(|sample| &sample.machine)) {
            return Ok(());
        }
        let before = self.machines.len();
        // Found by hash: every machine is looked for among all samples, thousands of each.
        let named: HashSet<&str> = samples.iter().map(|sample| sample.machine.as_str()).collect();
        self.machines.retain(|name, _| named.contains(name.as_str()));
        let mut changed = self.machines.len() != before;
        for sample in samples {
            if !self.machines.contains_key(&sample.machine) {
                let history = MachineHistory::new(&self.config, &self.bank_config, number_of(&sample.machine))?;
                self.machines.insert(sample.machine.clone(), history);
                changed = true;
            }
        }
        if changed {
            self.rebuild(samples)?;
        }
        Ok(())
    }

    /// Replays the sums of the present members. A machine counts before its first sample with its first value.
    fn rebuild(&mut self, samples: &[Sample]) -> Result<(), BankError> {
        let longest = self.machines.values().map(MachineHistory::len).max().unwrap_or(0);
        let before = std::mem::replace(&mut self.sums, each(|| Series::new(&self.bank_config))?);
        let named: HashMap<&str, &Sample> = samples.iter().map(|sample| (sample.machine.as_str(), sample)).collect();
        for resource in Resource::ALL {
            self.sums[resource].maxima.inherit(&before[resource].maxima);
            // What was said of other members is compared with nothing.
            self.waiting[resource] = Waiting::default();
            let firsts: Vec<(f64, &Window)> = self
                .machines
                .iter()
                .filter_map(|(name, history)| {
                    let window = &history.windows[resource];
                    let now = named.get(name.as_str())?.values[resource];
                    let first = window.iter().flatten().next().or(plausible(now))?;
                    Some((first, window))
                })
                .collect();
            // Nothing of it was ever measured: a forecaster that has seen nothing says the same.
            if firsts.is_empty() {
                continue;
            }
            let mut carried: Vec<f64> = firsts.iter().map(|(first, _)| *first).collect();
            for age in (0..longest).rev() {
                for (value, (_, window)) in carried.iter_mut().zip(&firsts) {
                    *value = window.back(age).unwrap_or(*value);
                }
                let sum: f64 = carried.iter().sum::<f64>() - self.taken_out[resource].back(age).unwrap_or(0.0);
                self.sums[resource].replay(Some(sum.max(0.0)));
            }
            self.sums[resource].maxima.refresh();
        }
        Ok(())
    }

    /// The pool's use; a machine without a sample counts with its last one for a while, after that the sum is not known.
    fn sum_of(&self, samples: &[Sample], resource: Resource) -> Option<f64> {
        let mut sum = None;
        for sample in samples {
            let value = match plausible(sample.values[resource]) {
                Some(value) => value,
                None => {
                    let history = self.machines.get(&sample.machine)?;
                    match history.banks[resource].last() {
                        Some(_) if history.silent[resource] >= self.config.stale_steps => return None,
                        Some(last) => last,
                        // Never measured at all: it cannot be waited for.
                        None => continue,
                    }
                }
            };
            sum = Some(sum.unwrap_or(0.0) + value);
        }
        sum
    }

    /// How the pool stands against `capacity`; also answers for another capacity than that of the last tick.
    #[must_use]
    pub fn contention(&self, capacity: &PerResource<Option<f64>>) -> Contention {
        let horizon_s = self.config.step_s * self.config.horizon_steps as f64;
        let resources =
            PerResource::from_fn(|resource| self.resource_contention(resource, plausible(capacity[resource])?));
        let probabilities =
            PerResource::from_fn(|resource| resources[resource].as_ref().map(|state| state.probability));
        let (score, any, weighted_mean) = combine(&probabilities, &self.config.weights);
        let mut told: Vec<(f64, String)> = resources
            .iter()
            .filter_map(|(resource, state)| Some((resource, state.as_ref()?)))
            .map(|(resource, state)| (state.probability, describe(resource, state, horizon_s)))
            .collect();
        told.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut reasons: Vec<String> = told.into_iter().map(|(_, reason)| reason).collect();
        reasons.extend(self.event_reasons(horizon_s));
        Contention { now_s: self.now_s, horizon_s, score, any, weighted_mean, resources, reasons }
    }

    fn event_reasons(&self, horizon_s: f64) -> Vec<String> {
        self.events
            .within(self.now_s, horizon_s)
            .map(|effect| {
                let in_s = effect.event.start_s - self.now_s;
                let when = if in_s > 0.0 { format!("in {in_s:.0} s") } else { "due now".to_owned() };
                format!("event \"{}\" {when}, {:.0} % probable", effect.event.name, 100.0 * effect.probability)
            })
            .collect()
    }

    fn resource_contention(&self, resource: Resource, capacity: f64) -> Option<ResourceContention> {
        let bank = &self.sums[resource].bank;
        bank.last()?;
        let limit = capacity * self.config.thresholds[resource];
        let mut onset = Vec::new();
        let mut maxima = Vec::new();
        let mut path = Vec::new();
        let mut highest = 0.0_f64;
        let mut windows: Vec<usize> = self.bank_config.horizons.iter().copied().chain(self.starts(resource)).collect();
        windows.sort_unstable();
        windows.dedup();
        for steps in windows {
            let maximum = self.maximum(resource, steps, limit)?;
            highest = highest.max(maximum.exceedance(limit));
            onset.push(Onset { after_s: steps as f64 * self.config.step_s, probability: highest });
            maxima.push(maximum);
            if self.bank_config.horizons.contains(&steps) {
                path.extend(self.forecast(resource, steps));
            }
        }
        let now = self.measured[resource].or(bank.last())?;
        Some(ResourceContention { capacity, limit, now, probability: highest, onset, path, maxima })
    }

    /// The last step before each declared event within the horizon begins: contention that an event brings begins with it, and
    /// not somewhere between two horizons.
    fn starts(&self, resource: Resource) -> impl Iterator<Item = usize> {
        let step_s = self.config.step_s;
        let ahead = self.events.within(self.now_s, self.config.horizon_steps as f64 * step_s);
        let changing = ahead.filter(move |effect| effect.event.change[resource].is_some());
        let steps = changing.map(move |effect| ((effect.event.start_s - self.now_s) / step_s).ceil() - 1.0);
        let steps = steps.filter(|steps| *steps >= 1.0).map(|steps| steps as usize);
        steps.filter(|steps| *steps < self.config.horizon_steps).take(STARTS)
    }

    /// Amounts and probabilities of the events that matter for the next `window_steps` steps.
    fn effects_ahead(&self, resource: Resource, from_steps: usize, to_steps: usize) -> Vec<(f64, f64)> {
        let step_s = self.config.step_s;
        let pool_baseline = self.sums[resource].bank.last().unwrap_or(0.0);
        let from_s = self.now_s + from_steps as f64 * step_s;
        let mut effects: Vec<(f64, f64)> = self
            .events
            .within(self.now_s, to_steps as f64 * step_s)
            .filter(|effect| effect.event.end_s > from_s)
            .filter_map(|effect| {
                let baseline = match &effect.event.scope {
                    Scope::Pool => pool_baseline,
                    Scope::Machine(name) => self.machines.get(name)?.banks[resource].last()?,
                };
                let change: Change = effect.event.change[resource]?;
                Some((effect.probability, effect.size * change.amount(baseline)))
            })
            .collect();
        effects.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
        effects
    }

    /// The maximum of the pool's use over the next `steps` steps, events included, with probabilities corrected by what came
    /// of earlier ones about `limit`. `None` before the first sample.
    #[must_use]
    pub fn maximum(&self, resource: Resource, steps: usize, limit: f64) -> Option<Outlook> {
        let maxima = &self.sums[resource].maxima;
        let base = maxima.distribution(steps)?;
        // An event that lowers the use cannot be relied on to last the whole window.
        let effects: Vec<(f64, f64)> =
            self.effects_ahead(resource, 0, steps).into_iter().filter(|(_, amount)| *amount > 0.0).collect();
        Some(Outlook::new(base, maxima.correction(steps, limit), &effects))
    }

    /// The pool's use `steps` ahead, events included. `None` before the first sample.
    #[must_use]
    pub fn forecast(&self, resource: Resource, steps: usize) -> Option<Forecast> {
        let base = self.sums[resource].bank.forecast(steps)?;
        let expected: f64 = self.effects_ahead(resource, steps, steps).iter().map(|(p, amount)| p * amount).sum();
        Some(Forecast {
            steps,
            point: (base.point + expected).max(0.0),
            quantiles: base.quantiles.map(|value| (value + expected).max(0.0)),
        })
    }

    /// One machine's use `steps` ahead, events of its own included. `None` before its first sample.
    #[must_use]
    pub fn machine_forecast(&self, machine: &str, resource: Resource, steps: usize) -> Option<Forecast> {
        self.machine_forecast_with(None, machine, resource, steps)
    }

    /// The same with what many machines have taught.
    pub(crate) fn machine_forecast_with(
        &self,
        fleet: Option<&Fleet>,
        machine: &str,
        resource: Resource,
        steps: usize,
    ) -> Option<Forecast> {
        let history = self.machines.get(machine)?;
        let (bank, member) = (&history.banks[resource], &history.members[resource]);
        let base = match (fleet, self.bank_config.horizons.iter().position(|known| *known == steps)) {
            (Some(fleet), Some(horizon)) => fleet.forecast(member, bank, horizon, self.step_number())?,
            _ => bank.forecast(steps)?,
        };
        let (now_s, step_s) = (self.now_s, self.config.step_s);
        let expected: f64 = self
            .events
            .within(now_s, steps as f64 * step_s)
            .filter(|effect| matches!(&effect.event.scope, Scope::Machine(name) if name == machine))
            .filter(|effect| effect.event.end_s > now_s + steps as f64 * step_s)
            .filter_map(|effect| {
                Some(effect.probability * effect.size * effect.event.change[resource]?.amount(base.point))
            })
            .sum();
        Some(Forecast {
            steps,
            point: (base.point + expected).max(0.0),
            quantiles: base.quantiles.map(|value| (value + expected).max(0.0)),
        })
    }

    /// How many machines are in the pool.
    pub(crate) fn size(&self) -> usize {
        self.machines.len()
    }

    /// The members of the pool.
    pub fn machines(&self) -> impl Iterator<Item = &str> {
        self.machines.keys().map(String::as_str)
    }

    /// The forecasters of the pool's sum of one resource.
    #[must_use]
    pub fn bank(&self, resource: Resource) -> &Bank {
        &self.sums[resource].bank
    }

    /// What past events of that name did.
    #[must_use]
    pub fn event_record(&self, name: &str) -> Record {
        self.events.record(name)
    }

    /// How the banks of its sums are set up.
    #[must_use]
    pub fn bank_config(&self) -> &BankConfig {
        &self.bank_config
    }

    /// How it was set up.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.config
    }
}
