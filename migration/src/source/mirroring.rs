//! Holding the guest's writes to its disks until they have arrived, and letting them go: whatever happens, no write waits once
//! the source's engine has ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::context::{Context, Mirroring};
use crate::error::{Doing, MigrationError};
use crate::mirror::Bell;

/// A round in which writes are mirrored for as long as its memory is on its way.
#[derive(Clone, Debug)]
pub(super) struct Mirror {
    bell: Arc<Bell>,
    /// Memory channels that are not done with the round.
    memory: Arc<AtomicUsize>,
}

impl Mirror {
    /// A memory channel is done with the round.
    pub(super) fn memory_done(&self) {
        self.memory.fetch_sub(1, Ordering::SeqCst);
        self.bell.ring();
    }

    /// Waits for a write, at most for `timeout`. False once all memory of the round has arrived.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let going_on = || self.memory.load(Ordering::SeqCst) > 0;
        if going_on() {
            self.bell.wait(timeout);
        }
        going_on()
    }
}

impl Context {
    /// For [`crate::policy::RoundStats`].
    pub(super) fn mirrors(&self) -> Option<bool> {
        match self.mirroring {
            Mirroring::Off => Some(false),
            Mirroring::On(_) => Some(true),
            Mirroring::Refused => None,
        }
    }

    /// For a round over `streams` memory channels.
    pub(super) fn mirror(&self, streams: u16) -> Option<Mirror> {
        let Mirroring::On(bell) = &self.mirroring else { return None };
        Some(Mirror { bell: Arc::clone(bell), memory: Arc::new(AtomicUsize::new(streams.into())) })
    }

    /// From here on writes wait.
    pub(super) fn mirror_writes(&mut self) -> Result<(), MigrationError> {
        let bell = Arc::new(Bell::default());
        // Noted first: what was begun and failed is ended as well.
        self.mirroring = Mirroring::On(Arc::clone(&bell));
        for disk in self.guest.disks() {
            if !disk.start_mirroring(&bell).doing("mirroring the writes to a disk")? {
                tracing::warn!("the writes of this machine cannot be mirrored");
                self.answer_writes();
                self.mirroring = Mirroring::Refused;
                return Ok(());
            }
        }
        tracing::info!("writes are mirrored");
        Ok(())
    }

    /// No write waits any more. Idempotent.
    pub(super) fn answer_writes(&mut self) {
        if matches!(self.mirroring, Mirroring::On(_)) {
            self.mirroring = Mirroring::Off;
            for disk in self.guest.disks() {
                disk.stop_mirroring();
            }
        }
    }
}
