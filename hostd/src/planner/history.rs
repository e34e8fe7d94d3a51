//! Measurements from before this hostd started, so that its forecasts do not begin anew.

use std::collections::HashMap;

use predictor::{BankError, PerResource};

use super::convert::values_of;
use super::{Planner, PoolState};
use crate::api::types::Usage;
use crate::clock::unix_ms;
use crate::config::HostConfig;
use crate::store::{Store, StoreError};

/// Series of machines begin with this.
pub const PREFIX: &str = "machine/";

/// Steps that are played back at most: as many as a forecaster keeps.
const STEPS_MAX: u64 = 2_048;

/// A machine that is not heard of for so long after the start is forgotten: it is gone.
const KEEP_MS: u64 = 600_000;

/// What was measured of each machine, by name.
#[derive(Clone, Debug, Default)]
pub struct History {
    machines: HashMap<String, Vec<(u64, Usage)>>,
    step_ms: u64,
    loaded_unix_ms: u64,
}

impl History {
    /// Reads what the store has of the steps before `now_unix_ms`.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn load(store: &Store, config: &HostConfig, now_unix_ms: u64) -> Result<Self, StoreError> {
        Self::load_steps(store, config.sample_interval_ms.max(1), crate::store::FINEST_KEPT_MS, now_unix_ms)
    }

    /// The same in steps of `step_ms`, from at most `most_ms` ago.
    pub(super) fn load_steps(store: &Store, step_ms: u64, most_ms: u64, now_unix_ms: u64) -> Result<Self, StoreError> {
        let since = now_unix_ms.saturating_sub(STEPS_MAX.saturating_mul(step_ms).min(most_ms));
        let mut machines = HashMap::new();
        for series in store.series(PREFIX)? {
            let samples = store.samples(&series, since, now_unix_ms)?;
            if let Some(machine) = series.strip_prefix(PREFIX).filter(|_| !samples.is_empty()) {
                machines.insert(machine.to_owned(), samples);
            }
        }
        Ok(Self { machines, step_ms, loaded_unix_ms: now_unix_ms })
    }

    /// Whether there is nothing left to be played back.
    pub fn is_empty(&mut self, now_unix_ms: u64) -> bool {
        if now_unix_ms.saturating_sub(self.loaded_unix_ms) > KEEP_MS {
            self.machines.clear();
        }
        self.machines.is_empty()
    }

    /// One entry for each step up to now, with gaps where nothing was measured, and forgets it. Of several measurements in one step the
    /// mean counts.
    pub fn take(&mut self, machine: &str, now_unix_ms: u64) -> Option<Vec<PerResource<Option<f64>>>> {
        let samples = self.machines.remove(machine)?;
        let first = samples.first()?.0;
        let step = |at: u64| (at.saturating_sub(first) + self.step_ms / 2) / self.step_ms;
        let last = step(now_unix_ms).min(2 * STEPS_MAX);
        let mut steps = vec![Mean::default(); usize::try_from(last).ok()?];
        for (at, usage) in &samples {
            if let Some(entry) = usize::try_from(step(*at)).ok().and_then(|place| steps.get_mut(place)) {
                entry.add(&values_of(Some(usage)));
            }
        }
        Some(steps.iter().map(Mean::values).collect())
    }
}

/// The mean of what was measured within a step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mean {
    sums: PerResource<(f64, u32)>,
}

impl Mean {
    /// One measurement more.
    pub(super) fn add(&mut self, values: &PerResource<Option<f64>>) {
        for (resource, value) in values.iter() {
            if let Some(value) = value {
                let (sum, count) = &mut self.sums[resource];
                (*sum, *count) = (*sum + value, *count + 1);
            }
        }
    }

    /// `None` where there was none.
    pub(super) fn values(&self) -> PerResource<Option<f64>> {
        PerResource::from_fn(|resource| {
            let (sum, count) = self.sums[resource];
            (count > 0).then(|| sum / f64::from(count))
        })
    }
}

impl Planner {
    /// Takes up what an earlier hostd measured.
    pub fn recall(&mut self, history: History) {
        self.stored = history;
    }

    /// Machines that nobody has forecast yet and that were measured before this hostd started: their history is played back.
    pub(super) fn replay_histories(&mut self, states: &[PoolState]) -> Result<(), BankError> {
        let now_unix_ms = unix_ms();
        if self.stored.is_empty(now_unix_ms) {
            return Ok(());
        }
        for state in states {
            let mut found = Vec::new();
            for sample in state.samples() {
                if self.pools.iter().any(|(_, forecaster)| forecaster.history(&sample.machine).is_some()) {
                    continue;
                }
                if let Some(steps) = self.stored.take(&sample.machine, now_unix_ms) {
                    found.push((sample.machine, steps));
                }
            }
            if found.is_empty() {
                continue;
            }
            tracing::info!(pool = state.pool, machines = found.len(), "forecasts go on from stored measurements");
            self.pools.play_back(&state.pool, found)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_stay_gaps_and_the_newest_entry_is_now() {
        let usage = |cores| Usage { cpu_cores: cores, ..Usage::default() };
        let samples = vec![(10_000, usage(1.0)), (11_010, usage(2.0)), (13_990, usage(3.0))];
        let machines = HashMap::from([("vm1".to_owned(), samples)]);
        let mut history = History { machines, step_ms: 1000, loaded_unix_ms: 15_000 };
        let steps = history.take("vm1", 16_000).unwrap();
        let cpu: Vec<Option<f64>> = steps.iter().map(|step| step.cpu).collect();
        assert_eq!(cpu, [Some(1.0), Some(2.0), None, None, Some(3.0), None]);
        assert!(history.take("vm1", 16_000).is_none() && history.is_empty(16_000));
    }

    #[test]
    fn machines_that_are_not_heard_of_are_forgotten() {
        let machines = HashMap::from([("vm1".to_owned(), vec![(0, Usage::default())])]);
        let mut history = History { machines, step_ms: 1000, loaded_unix_ms: 0 };
        assert!(!history.is_empty(KEEP_MS));
        assert!(history.is_empty(KEEP_MS + 1));
    }
}
