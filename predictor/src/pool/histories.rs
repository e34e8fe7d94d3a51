//! Histories of machines that come from elsewhere: from another pool, or from a store.

use super::{MachineHistory, PoolForecaster};
use crate::bank::BankError;
use crate::sample::{PerResource, Resource, Sample, plausible};

impl PoolForecaster {
    /// The history of a machine that was sampled while nobody forecast it, one entry a step, the newest last; to be given to
    /// [`PoolForecaster::adopt`].
    ///
    /// # Errors
    /// None with a configuration that [`PoolForecaster::new`] accepted.
    pub fn replay(
        &self,
        samples: impl IntoIterator<Item = PerResource<Option<f64>>>,
    ) -> Result<MachineHistory, BankError> {
        let mut history = MachineHistory::new(&self.config, &self.bank_config, 0)?;
        for sample in samples {
            for resource in Resource::ALL {
                history.take(resource, plausible(sample[resource]));
            }
        }
        Ok(history)
    }

    /// The history of a machine, to be given to the pool that it moves to.
    #[must_use]
    pub fn history(&self, machine: &str) -> Option<&MachineHistory> {
        self.machines.get(machine)
    }

    /// Takes over a machine with the history it has from another pool of the same sampling interval. Call it before the first
    /// tick that names the machine; the sums are made anew at that tick.
    ///
    /// # Errors
    /// None with a configuration that [`PoolForecaster::new`] accepted.
    pub fn adopt(&mut self, machine: &str, history: MachineHistory) -> Result<(), BankError> {
        self.adopt_all([(machine.to_owned(), history)])
    }

    /// As [`PoolForecaster::adopt`], for many machines at once.
    ///
    /// # Errors
    /// None with a configuration that [`PoolForecaster::new`] accepted.
    pub fn adopt_all(&mut self, machines: impl IntoIterator<Item = (String, MachineHistory)>) -> Result<(), BankError> {
        self.machines.extend(machines);
        let samples: Vec<Sample> =
            self.machines.keys().map(|name| Sample { machine: name.clone(), ..Sample::default() }).collect();
        self.rebuild(&samples)
    }
}
