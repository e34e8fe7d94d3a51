//! What a past teaches that was played back: after a restart trees need not begin anew.

use crate::bank::{Bank, BankConfig};
use crate::experience::Experience;
use crate::fleet::Member;
use crate::insight::Waiting;
use crate::maximum::Maxima;
use crate::pool::{PoolConfig, PoolForecaster};
use crate::sample::{PerResource, Resource};
use crate::window::Window;
use std::collections::BTreeSet;

/// What one step of one series takes, in visits (see [`crate::model::Budget`]): a bank, and now and then features for all horizons.
const VISITS: u64 = 2_000;
/// The same of a pool: maxima and their distributions.
const POOL_VISITS: u64 = 100_000;

/// The past of machines, and of their pool.
#[derive(Clone, Debug)]
pub struct Study {
    config: PoolConfig,
    bank: BankConfig,
    machines: Vec<PerResource<Window>>,
    /// Sums of the pool, oldest first, and what they are not to exceed; empty if they are not to be studied.
    sums: PerResource<(Vec<f32>, f64)>,
    /// Number of the newest step.
    now: u64,
}

impl Study {
    pub(super) fn new(
        pool: &PoolForecaster,
        machines: &BTreeSet<String>,
        config: &PoolConfig,
        bank: &BankConfig,
        with_sums: bool,
    ) -> Self {
        let mut recent = if with_sums { pool.course().recent } else { PerResource::default() };
        let sums = PerResource::from_fn(|resource| match pool.limit(resource) {
            Some(limit) => (std::mem::take(&mut recent[resource]), limit),
            None => Default::default(),
        });
        let windows = machines.iter().filter_map(|name| Some(pool.history(name)?.windows().clone()));
        Self { config: config.clone(), bank: bank.clone(), machines: windows.collect(), sums, now: pool.step_number() }
    }

    /// Visits that it takes.
    #[must_use]
    pub fn work(&self) -> u64 {
        let machines: usize = self.machines.iter().flat_map(|windows| windows.iter()).map(|(_, own)| own.len()).sum();
        let sums: usize = self.sums.iter().map(|(_, (sums, _))| sums.len()).sum();
        machines as u64 * VISITS + sums as u64 * POOL_VISITS
    }

    /// Goes through it.
    #[must_use]
    pub fn run(&self) -> PerResource<Experience> {
        let mut experience = PerResource::from_fn(|_| Experience::new(&self.bank, self.config.lessons));
        for resource in Resource::ALL {
            self.machines(resource, &mut experience[resource]);
            self.sums(resource, &mut experience[resource]);
        }
        experience
    }

    /// All machines step by step together, so that lessons come in the order of time.
    fn machines(&self, resource: Resource, experience: &mut Experience) {
        // What was never measured, or is the same all the time, teaches nothing.
        let told = |window: &&Window| window.iter().flatten().next().is_some();
        let windows = self.machines.iter().map(|windows| &windows[resource]).filter(told);
        let new = |window| Some((window, Bank::new(self.bank.clone()).ok()?, Member::default()));
        let mut all: Vec<(&Window, Bank, Member)> = windows.filter_map(new).collect();
        let longest = all.iter().map(|(window, ..)| window.len()).max().unwrap_or(0);
        for age in (0..longest).rev() {
            for (number, (window, bank, member)) in all.iter_mut().enumerate() {
                if age < window.len() {
                    let value = window.back(age);
                    bank.update(value);
                    let time = self.now.saturating_sub(age as u64);
                    experience.fleet.follow(member, bank, value, time, number as u64);
                }
            }
        }
    }

    fn sums(&self, resource: Resource, experience: &mut Experience) {
        let (sums, limit) = &self.sums[resource];
        let Ok(mut maxima) = Maxima::new(&self.bank) else { return };
        let mut waiting = Waiting::default();
        for (place, value) in sums.iter().enumerate() {
            maxima.update(Some(f64::from(value.max(0.0))));
            maxima.watch(*limit);
            let time = self.now.saturating_sub((sums.len() - 1 - place) as u64);
            experience.insight.follow(&mut waiting, &mut maxima, *limit, time);
        }
    }
}
