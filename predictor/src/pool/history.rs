//! What is known of one machine.

use super::{PoolConfig, each};
use crate::bank::{Bank, BankConfig, BankError};
use crate::fleet::Member;
use crate::sample::{PerResource, Resource};
use crate::window::Window;
use serde::{Deserialize, Serialize};

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
    pub(super) fn new(config: &PoolConfig, bank: &BankConfig) -> Result<Self, BankError> {
        Ok(Self {
            windows: PerResource::from_fn(|_| Window::staggered(config.history_steps, bank.stagger)),
            banks: each(|| Bank::new(bank.clone()))?,
            silent: PerResource::default(),
            members: PerResource::default(),
        })
    }

    /// Reads where all is that [`MachineHistory::touch`] reads.
    pub(super) fn touch_places(&self) {
        let of = |resource: Resource| self.banks[resource].touch_places() + self.members[resource].touch_places();
        std::hint::black_box(Resource::ALL.map(of));
    }

    /// See [`Bank::touch`].
    pub(super) fn touch(&self, resource: Resource) {
        let bank = self.banks[resource].touch();
        std::hint::black_box(bank + self.members[resource].touch() + self.windows[resource].touch());
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
