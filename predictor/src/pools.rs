//! Many pools that learn from each other.
//!
//! ```text
//! tick() of each pool ──► forecasts, with the trees fitted last ──► lessons
//!                                                                     │ begin(): what is due and within the budget, on its own
//!                         install() ◄── Work::run(), off the hot path ◄┘
//! ```
//!
//! A tick never fits anything. Fits are made of copies, by whoever has the time; until their result is installed the last trees speak.

mod study;

pub use study::Study;

use crate::bank::{BankConfig, BankError};
use crate::contention::Contention;
use crate::experience::Experience;
use crate::forecast::Forecast;
use crate::model::Budget;
use crate::model::shared::{Fit, Fitted};
use crate::pool::{PoolConfig, PoolForecaster, Tick};
use crate::sample::{PerResource, Resource};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Forecasters of pools by name, and what they have in common.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pools {
    config: PoolConfig,
    bank: BankConfig,
    pools: BTreeMap<String, PoolForecaster>,
    experience: PerResource<Experience>,
    /// Machines whose past was played back and has taught nothing yet, by pool.
    unstudied: BTreeMap<String, BTreeSet<String>>,
    /// Pools whose past has been studied.
    studied: BTreeSet<String>,
}

/// Work off the hot path. See the module's description.
#[derive(Clone, Debug)]
pub enum Work {
    /// An ensemble of trees to be fitted.
    Fit {
        /// Of this resource,
        resource: Resource,
        /// this ensemble
        ensemble: usize,
        /// and this head.
        head: usize,
        /// All that it takes.
        fit: Fit,
    },
    /// A past to be gone through.
    Study(Box<Study>),
}

/// What [`Work::run`] has made, for [`Pools::install`].
#[derive(Clone, Debug)]
pub enum Done {
    /// Trees.
    Fitted {
        /// Of this resource,
        resource: Resource,
        /// this ensemble
        ensemble: usize,
        /// and this head.
        head: usize,
        /// The trees.
        fitted: Fitted,
    },
    /// Lessons of the past.
    Studied(Box<PerResource<Experience>>),
}

impl Work {
    /// Does it. Pure, and takes long.
    #[must_use]
    pub fn run(self) -> Done {
        match self {
            Self::Fit { resource, ensemble, head, fit } => Done::Fitted { resource, ensemble, head, fitted: fit.run() },
            Self::Study(study) => Done::Studied(Box::new(study.run())),
        }
    }
}

impl Pools {
    /// No pool yet.
    ///
    /// # Errors
    /// [`BankError`] if the step or the horizon cannot be used.
    pub fn new(config: PoolConfig) -> Result<Self, BankError> {
        let bank = PoolForecaster::new(config.clone())?.bank_config().clone();
        Ok(Self {
            pools: BTreeMap::new(),
            experience: PerResource::from_fn(|_| Experience::new(&bank, config.lessons)),
            unstudied: BTreeMap::new(),
            studied: BTreeSet::new(),
            bank,
            config,
        })
    }

    /// The forecaster of a pool.
    #[must_use]
    pub fn get(&self, pool: &str) -> Option<&PoolForecaster> {
        self.pools.get(pool)
    }

    /// All pools and their forecasters.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &PoolForecaster)> {
        self.pools.iter().map(|(name, forecaster)| (name.as_str(), forecaster))
    }

    /// The forecaster of a pool, made if there is none.
    ///
    /// # Errors
    /// None with a configuration that [`Pools::new`] accepted.
    pub fn pool(&mut self, pool: &str) -> Result<&mut PoolForecaster, BankError> {
        match self.pools.entry(pool.to_owned()) {
            std::collections::btree_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            std::collections::btree_map::Entry::Vacant(entry) => {
                Ok(entry.insert(PoolForecaster::new(self.config.clone())?))
            }
        }
    }

    /// Forgets pools that `keep` does not want; what they have taught stays.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.pools.retain(|pool, _| keep(pool));
        self.unstudied.retain(|pool, _| keep(pool));
    }

    /// Takes one step's samples of a pool and says how it stands; see [`PoolForecaster::tick`].
    ///
    /// # Errors
    /// None with a configuration that [`Pools::new`] accepted.
    pub fn tick(&mut self, pool: &str, tick: &Tick<'_>) -> Result<Contention, BankError> {
        self.pool(pool)?;
        let Self { pools, experience, config, .. } = self;
        let experience = Some(experience).filter(|_| config.lessons > 0);
        let [mut before, mut of] = [0; 2];
        for (name, forecaster) in pools.iter() {
            of += forecaster.size();
            before += if name.as_str() < pool { forecaster.size() } else { 0 };
        }
        match pools.get_mut(pool) {
            Some(forecaster) => forecaster.tick_with(tick, experience, [before, of]),
            None => Err(BankError::NotPositive { name: "pools", value: 0.0 }),
        }
    }

    /// One machine's use `steps` ahead; see [`PoolForecaster::machine_forecast`].
    #[must_use]
    pub fn machine_forecast(&self, pool: &str, machine: &str, resource: Resource, steps: usize) -> Option<Forecast> {
        let fleet = Some(&self.experience[resource].fleet).filter(|_| self.config.lessons > 0);
        self.pools.get(pool)?.machine_forecast_with(fleet, machine, resource, steps)
    }

    /// Machines that were measured while nobody forecast them, each with one entry a step, the newest last. Their forecasts go on from
    /// that at once, and what it teaches is learned off the hot path.
    ///
    /// # Errors
    /// None with a configuration that [`Pools::new`] accepted.
    pub fn play_back(
        &mut self,
        pool: &str,
        machines: Vec<(String, Vec<PerResource<Option<f64>>>)>,
    ) -> Result<(), BankError> {
        let forecaster = self.pool(pool)?;
        let names: Vec<String> = machines.iter().map(|(name, _)| name.clone()).collect();
        let replayed = machines.into_iter().map(|(machine, steps)| Ok((machine, forecaster.replay(steps)?)));
        let replayed: Vec<_> = replayed.collect::<Result<_, BankError>>()?;
        forecaster.adopt_all(replayed)?;
        if self.config.lessons > 0 {
            self.unstudied.entry(pool.to_owned()).or_default().extend(names);
        }
        Ok(())
    }

    /// The next work that is worth it and within `budget`: a past that has taught nothing yet, or else of all ensembles the one with the
    /// largest share of new lessons. What it takes is copied; nothing is kept from ticks meanwhile.
    pub fn begin(&mut self, budget: &mut Budget) -> Option<Work> {
        if let Some((pool, machines)) = self.unstudied.first_key_value() {
            let study = self.pools.get(pool).map(|forecaster| {
                Study::new(forecaster, machines, &self.config, &self.bank, !self.studied.contains(pool))
            });
            let pool = pool.clone();
            match study {
                Some(study) if !budget.spend(study.work()) => return None,
                study => {
                    self.unstudied.remove(&pool);
                    if let Some(study) = study {
                        self.studied.insert(pool);
                        return Some(Work::Study(Box::new(study)));
                    }
                }
            }
        }
        let (resource, ensemble, head, work) = self.most_due(budget.left())?;
        budget.spend(work);
        let fit = self.experience[resource].all_mut().nth(ensemble)?.begin(head)?;
        Some(Work::Fit { resource, ensemble, head, fit })
    }

    fn most_due(&self, most: u64) -> Option<(Resource, usize, usize, u64)> {
        let mut best: Option<(f64, (Resource, usize, usize, u64))> = None;
        for resource in Resource::ALL {
            for (ensemble, shared) in self.experience[resource].all().enumerate() {
                for head in 0..shared.heads() {
                    let Some((share, work)) = shared.due(head).filter(|(_, work)| *work <= most) else { continue };
                    if best.as_ref().is_none_or(|(known, _)| share > *known) {
                        best = Some((share, (resource, ensemble, head, work)));
                    }
                }
            }
        }
        best.map(|(_, place)| place)
    }

    /// Takes what was made. Returns whether trees were fitted.
    pub fn install(&mut self, done: Done) -> bool {
        match done {
            Done::Fitted { resource, ensemble, head, fitted } => {
                self.experience[resource].all_mut().nth(ensemble).is_some_and(|shared| shared.install(head, fitted))
            }
            Done::Studied(older) => {
                for resource in Resource::ALL {
                    self.experience[resource].absorb(&older[resource]);
                }
                false
            }
        }
    }

    /// Does all work that is due, as far as `budget` goes; returns how many ensembles were fitted. For replays, where nobody waits.
    pub fn refit(&mut self, budget: &mut Budget) -> usize {
        let mut count = 0;
        while let Some(work) = self.begin(budget) {
            count += usize::from(self.install(work.run()));
        }
        count
    }

    /// What all of them have taught.
    #[must_use]
    pub fn experience(&self) -> &PerResource<Experience> {
        &self.experience
    }

    /// How its forecasters are set up.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.config
    }

    /// Bytes that the trees and what they learn from take.
    #[must_use]
    pub fn dear_bytes(&self) -> usize {
        self.experience.iter().map(|(_, experience)| experience.state_bytes()).sum()
    }
}
