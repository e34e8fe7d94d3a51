//! What an operator may do with a migration that is under way.

use std::sync::Arc;

use vmm::api::{ChangedLimits, Phase};

use super::{Active, Executor, ExecutorError, Result, bandwidth};
use crate::api::types::{Migration, MigrationSide, MigrationStage};
use crate::machine::registry::call;
use crate::machine::spec;
use crate::pool::PeerError;

impl Executor {
    /// Asks a migration to stop. It has stopped once its stage says so.
    ///
    /// # Errors
    ///
    /// [`ExecutorError::NotNow`] if it is over, past the point of no return, or another host's to cancel.
    pub fn cancel(&self, id: &str) -> Result<Migration> {
        let active = self.own(id, "cancelled")?;
        let migration = active.get();
        let committed = migration.progress.as_ref().is_some_and(|progress| progress.committed);
        if committed || matches!(migration.stage, MigrationStage::Settling | MigrationStage::Verifying) {
            return Err(refusal(
                id,
                "cancelled",
                "it is past Commit, the point of no return; move the machine back instead",
            ));
        }
        active.cancelled.send_replace(true);
        Ok(active.get())
    }

    /// Gives up a post-copy whose link is lost, at either host: the machine is stopped for good at the destination, and its
    /// disks at the source stay as they were at the switchover.
    ///
    /// # Errors
    ///
    /// [`ExecutorError::NotNow`] if it is not in post-copy, or its link works.
    pub async fn abandon(&self, id: &str) -> Result<Migration> {
        let active = self.under_way(id, "abandoned")?;
        let migration = active.get();
        if !migration.hangs() {
            let postcopy = migration.progress.as_ref().is_some_and(|progress| progress.phase == Phase::Postcopy);
            let why = match (migration.stage, postcopy) {
                (MigrationStage::Settling, _) => "the hosts are settling where the machine runs",
                (_, true) => "its link works: post-copy ends by itself when everything has arrived",
                (_, false) => {
                    "only a post-copy whose link is lost can be; `headroom migration cancel` ends one before that"
                }
            };
            return Err(refusal(id, "abandoned", why));
        }
        match migration.side {
            MigrationSide::Destination => {
                active.abandoned.send_replace(true);
            }
            MigrationSide::Source => {
                let entry = self.inner.machines.get(&migration.machine)?;
                call(&entry, |client| client.abandon_migration()).await?;
            }
        }
        Ok(active.get())
    }

    /// Runs a machine here again that is in doubt, on an operator's word that the destination is gone for good and that what
    /// it may have run of the machine is gone with it.
    ///
    /// # Errors
    ///
    /// [`ExecutorError::NotNow`] if it is not in doubt, or the destination's daemon answers: then it says itself where the
    /// machine runs.
    pub async fn take_back(&self, id: &str) -> Result<Migration> {
        const WHAT: &str = "taken back";
        let active = self.own(id, WHAT)?;
        let migration = active.get();
        if migration.stage != MigrationStage::Settling {
            return Err(refusal(
                id,
                WHAT,
                "it is not in doubt where the machine runs; `headroom migration show` says it",
            ));
        }
        // A host that refuses is there as well.
        let gone = match self.peer(&migration) {
            Ok(peer) => match peer.migration(&migration.attempt_id()).await {
                Ok(_) => false,
                Err(error) => matches!(error, PeerError::Unreachable { .. } | PeerError::Silent { .. }),
            },
            Err(_) => true,
        };
        if !gone {
            let why = "the destination's daemon answers, so it is not gone: it is asked where the machine runs every few seconds";
            return Err(refusal(id, WHAT, why));
        }
        self.inner.audit.noted("taken-back", &migration.object(), "an operator says that the destination is gone");
        // Stored before it is acted upon.
        self.update(&active, |migration| migration.taken_back = Some(migration.attempt_id()));
        active.taken_back.send_replace(true);
        Ok(active.get())
    }

    /// Lets a migration switch over that was held back, or was to be.
    ///
    /// # Errors
    ///
    /// [`ExecutorError::NotNow`] if it is not held.
    pub async fn proceed(&self, id: &str) -> Result<Migration> {
        let active = self.own(id, "continued")?;
        let migration = active.get();
        if !migration.pause_before_switchover {
            return Err(refusal(id, "continued", "it is not held back: it goes on by itself"));
        }
        self.update(&active, |migration| migration.pause_before_switchover = false);
        if self.sends(&migration) {
            let entry = self.inner.machines.get(&migration.machine)?;
            call(&entry, |client| client.continue_migration()).await?;
        }
        Ok(active.get())
    }

    /// Changes limits of a migration that leaves from here, while it runs or waits.
    ///
    /// # Errors
    ///
    /// If a limit is out of range, or the migration is past its switchover.
    pub async fn change_limits(&self, id: &str, change: &ChangedLimits) -> Result<Migration> {
        let active = self.own(id, "changed")?;
        let migration = active.get();
        let mut limits = migration.limits.clone();
        limits.downtime_ms = change.downtime_ms.unwrap_or(limits.downtime_ms);
        if let Some(bandwidth) = change.bandwidth_bytes_per_second {
            limits.bandwidth_bytes_per_second = bandwidth;
        }
        limits.throttle_max_percent = change.throttle_max_percent.unwrap_or(limits.throttle_max_percent);
        spec::limits(&limits)?;
        self.update(&active, |migration| migration.limits = limits);
        // The bandwidth is the budget's affair.
        let others = ChangedLimits { bandwidth_bytes_per_second: None, ..*change };
        if self.sends(&migration) && others != ChangedLimits::default() {
            let entry = self.inner.machines.get(&migration.machine)?;
            call(&entry, move |client| client.change_limits(&others)).await?;
        }
        if let Some(bandwidth) = change.bandwidth_bytes_per_second {
            self.inner.budget.set_own(id, bandwidth).await;
        }
        Ok(active.get())
    }

    /// The bandwidth that all migrations from here share, in bytes per second.
    pub async fn bandwidth(&self) -> Option<u64> {
        self.inner.budget.total().await
    }

    /// Changes it, for those under way as well, and keeps it over restarts.
    ///
    /// # Errors
    ///
    /// If it cannot be stored; nothing is changed then.
    pub async fn set_bandwidth(&self, total: Option<u64>) -> Result<()> {
        bandwidth::keep(&self.inner.store, self.inner.config.migration.bandwidth_bytes_per_second, total)?;
        self.inner.budget.set_total(total).await;
        Ok(())
    }

    fn sends(&self, migration: &Migration) -> bool {
        migration.stage == MigrationStage::Transferring
    }

    /// A migration that leaves from here and has not ended.
    fn own(&self, id: &str, what: &'static str) -> Result<Arc<Active>> {
        let active = self.under_way(id, what)?;
        let migration = active.get();
        match migration.side {
            MigrationSide::Source => Ok(active),
            MigrationSide::Destination => {
                Err(refusal(id, what, &format!("do that at its source, host `{}`", migration.source)))
            }
        }
    }

    /// A migration that has not ended.
    fn under_way(&self, id: &str, what: &'static str) -> Result<Arc<Active>> {
        let active = self.active().get(id).cloned();
        match active.filter(|active| !active.state.borrow().stage.ended()) {
            Some(active) => Ok(active),
            None => self.get(id).and_then(|_| Err(refusal(id, what, "it has ended"))),
        }
    }
}

fn refusal(id: &str, what: &'static str, why: &str) -> ExecutorError {
    ExecutorError::NotNow { id: id.to_owned(), what, why: why.to_owned() }
}
