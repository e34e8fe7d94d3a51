//! What is known of a drain.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::gate::Gate;
use crate::store::embedded::Kind;
use crate::store::{Store, StoreError};

/// Where the drain is stored.
pub(super) const KEY: &str = "drain";

/// What is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) started_unix_ms: u64,
    pub(super) to: Vec<String>,
    pub(super) paused: bool,
    /// Machines that were given a migration, and where they went.
    pub(super) sent: Vec<Sent>,
}

/// A machine that is on its way or gone.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Sent {
    pub(super) machine: String,
    pub(super) destination: String,
    pub(super) migration: String,
    pub(super) over: bool,
}

/// What is known of a machine that could not go; forgotten with the daemon.
#[derive(Debug)]
pub(super) struct Obstacle {
    pub(super) reason: String,
    /// Since when there is one.
    pub(super) since: Instant,
    /// It may pass by itself at any moment.
    pub(super) passing: bool,
    /// `None`: not again by itself, since an operator has cancelled it.
    pub(super) again: Option<Instant>,
}

/// The drain of this host, if there is one.
#[derive(Debug)]
pub struct Drainer {
    pub(super) gate: Gate,
    pub(super) state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) record: Option<Record>,
    pub(super) obstacles: BTreeMap<String, Obstacle>,
    /// For each machine, the hosts that have refused it since it was last given up.
    pub(super) refused: BTreeMap<String, BTreeMap<String, String>>,
    pub(super) told_empty: bool,
}

impl Drainer {
    /// The drain that was under way when the store was last used; closes the gate if there is one.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub fn load(store: &Store, gate: Gate) -> Result<Self, StoreError> {
        let record: Option<Record> = store.get(Kind::Host, KEY)?;
        gate.set(record.is_some());
        Ok(Self { gate, state: Mutex::new(State { record, ..State::default() }) })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
