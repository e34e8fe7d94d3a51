//! Estimates how fast machines dirty their memory, once their pool comes near contention: what a move of each would cost is
//! then a figure and not a guess, also of a machine that has never been moved.
//!
//! Beside the ticks, one machine at a time; the machines of other hosts are estimated there, and their hosts tell of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::Daemon;
use crate::api::types::{DirtyRateRequest, MachineStatus};
use crate::clock::unix_ms;
use crate::flag::stopped;
use crate::machine::entry::Entry;
use crate::machine::{chain, dirty_rate};

/// How often it is looked whether something is due.
const EVERY: Duration = Duration::from_secs(2);

/// An estimate is good for so long.
const FRESH_MS: u64 = 60_000;

/// Until the daemon stops.
pub(super) async fn run(daemon: Arc<Daemon>, mut stop: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stopped(&mut stop) => return,
        }
        if !daemon.planner().near_contention() {
            continue;
        }
        for entry in daemon.machines.all().into_iter().filter(|entry| is_due(entry)) {
            tokio::select! {
                () = estimate(&entry) => {}
                () = stopped(&mut stop) => return,
            }
        }
    }
}

async fn estimate(entry: &Entry) {
    match dirty_rate::estimate(entry, DirtyRateRequest::default()).await {
        Ok(rate) => tracing::debug!(machine = entry.record().name, ?rate, "dirty rate"),
        // Whoever moves it knows nothing of its rate then, as before.
        Err(error) => tracing::debug!(machine = entry.record().name, error = chain(&error), "no dirty rate"),
    }
}

fn is_due(entry: &Entry) -> bool {
    let state = entry.state();
    let fresh = state.dirty.is_some_and(|estimate| unix_ms().saturating_sub(estimate.at_unix_ms) < FRESH_MS);
    state.record.status == MachineStatus::Running && !state.verifying && !fresh
}
