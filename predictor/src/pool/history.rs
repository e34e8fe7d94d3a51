//! What is known of one machine.

use super::{PoolConfig, each};
use crate::bank::{Bank, BankConfig, BankError};
use crate::fetch::fetch;
use crate::fleet::Member;
use crate::sample::{PerResource, Resource};
use crate::window::Window;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The history of one machine, without the effect of events; travels with it from pool to pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineHistory {
    pub(super) windows: PerResource<Window>,
    pub(super) banks: PerResource<Bank>,
    /// Steps since the last sample of each resource.
    pub(super) silent: PerResource<usize>,
    /// What it has said and is compared with what comes.
    #[serde(default)]
    pub(super) members: PerResource<Member>,
}

impl MachineHistory {
    /// Of a machine with that number, which differs between machines.
    pub(super) fn new(config: &PoolConfig, bank: &Arc<BankConfig>, number: u32) -> Result<Self, BankError> {
        Ok(Self {
            windows: PerResource::from_fn(|_| Window::staggered(config.history_steps, number)),
            banks: each(|| Ok(Bank::shared(bank)?.staggered(number)))?,
            silent: PerResource::default(),
            members: PerResource::default(),
        })
    }

    /// Asks for what is kept here of that resource; then come the others of these three, each when what the one before asked for is there.
    pub(super) fn fetch_places(&self, resource: Resource) {
        fetch(&self.banks[resource]);
        fetch(&self.members[resource]);
        fetch(&self.windows[resource]);
        fetch(&self.silent[resource]);
    }

    /// See [`Bank::fetch`].
    pub(super) fn fetch(&self, resource: Resource) {
        self.banks[resource].fetch();
        self.members[resource].fetch();
        self.windows[resource].fetch();
    }

    /// See [`Bank::fetch_seasons`].
    pub(super) fn fetch_seasons(&self, resource: Resource) {
        self.banks[resource].fetch_seasons();
    }

    pub(super) fn take(&mut self, resource: Resource, value: Option<f64>) {
        // What was never measured has nothing to learn, and not to wait for either.
        if value.is_some() || self.banks[resource].last().is_some() {
            self.banks[resource].update(value);
        }
        self.windows[resource].push(value);
        self.silent[resource] = if value.is_some() { 0 } else { self.silent[resource].saturating_add(1) };
    }

    /// Samples without the effect of events.
    pub(crate) fn windows(&self) -> &PerResource<Window> {
        &self.windows
    }

    /// How many steps it covers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.windows.cpu.len()
    }

    /// Whether it covers nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
