//! Unfinished migrations after a restart of hostd.

use std::sync::Arc;

use super::failure::Failure;
use super::{Active, Executor, Result};
use crate::api::types::{MachineStatus, Migration, MigrationSide, MigrationStage};
use crate::machine::chain;
use crate::machine::entry::Entry;
use crate::machine::registry::call;
use crate::store::embedded::Kind;

impl Executor {
    /// Takes up the migrations that an earlier hostd had not finished. Machines must have been recovered before.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub fn recover(&self) -> Result<()> {
        let mut moved = Vec::new();
        for migration in self.inner.store.all::<Migration>(Kind::Migration)? {
            // Else it is still to be taken back.
            if migration.taken_back != Some(migration.attempt_id()) || migration.stage.ended() {
                self.watch_the_dead(&migration);
            }
            if migration.stage.ended() {
                continue;
            }
            moved.push(migration.machine.clone());
            tracing::info!(id = migration.id, machine = migration.machine, stage = ?migration.stage, "unfinished migration");
            let entry = self.inner.machines.get(&migration.machine).ok();
            let active = Arc::new(Active::new(migration.clone()));
            self.active().insert(migration.id.clone(), Arc::clone(&active));
            let executor = self.clone();
            tokio::spawn(async move {
                match (migration.side, entry) {
                    (MigrationSide::Source, Some(entry)) => executor.resume_source(&active, &entry).await,
                    (MigrationSide::Destination, Some(entry)) => executor.resume_destination(&active, &entry).await,
                    (side, None) => executor.close(&active, side),
                }
            });
        }
        self.release_orphans(&moved);
        Ok(())
    }

    async fn resume_source(&self, active: &Arc<Active>, entry: &Arc<Entry>) {
        let migration = active.get();
        if migration.stage == MigrationStage::Retrying {
            if self.wait_for_its_time(active, entry).await {
                self.run_source(active, entry).await;
            }
            return;
        }
        if let Err(failure) = self.take_up(active, entry).await
            && self.wait_for_another(active, entry, failure).await
        {
            self.run_source(active, entry).await;
        }
    }

    async fn take_up(&self, active: &Arc<Active>, entry: &Arc<Entry>) -> std::result::Result<(), Failure> {
        let migration = active.get();
        if entry.process().is_none() {
            let how = "the machine's VMM ended while hostd was not running".to_owned();
            active.state.send_modify(|migration| migration.error = Some(how));
            return self.settle(active, entry, migration.report).await;
        }
        let sends = match call(entry, |client| client.migration()).await {
            Ok(status) => status.is_some_and(|status| status.id == migration.attempt_id()),
            // It lives and does not answer yet; following it asks again.
            Err(error) => {
                tracing::warn!(error = chain(&error), "the VMM does not answer yet");
                true
            }
        };
        if sends {
            return self.follow(active, entry).await;
        }
        self.give_back(&migration).await;
        Err(Failure { error: "hostd was restarted before the transfer had begun".to_owned(), transient: true })
    }

    async fn resume_destination(&self, active: &Arc<Active>, entry: &Arc<Entry>) {
        // Places are not scarce right after a start; a migration that is under way is not turned away for one.
        match Arc::clone(&self.inner.slots).acquire_owned().await {
            Ok(slot) => self.run_destination(active, entry, slot).await,
            Err(_) => tracing::error!("the places for migrations are closed"),
        }
    }

    /// The machine's record is gone: at the source it had left; at the destination it had not come, or it has come and was
    /// deleted since.
    fn close(&self, active: &Active, side: MigrationSide) {
        self.update(active, |migration| {
            migration.stage = match (side, migration.stage) {
                (MigrationSide::Source, _) | (MigrationSide::Destination, MigrationStage::Verifying) => {
                    MigrationStage::Completed
                }
                (MigrationSide::Destination, _) => MigrationStage::Failed,
            };
        });
    }

    /// A machine that is marked as moving by a migration that was never stored goes on running; one that was to arrive by it
    /// will not come.
    fn release_orphans(&self, moved: &[String]) {
        for entry in self.inner.machines.all() {
            let record = entry.record();
            if record.status == MachineStatus::Incoming && !moved.contains(&record.name) {
                let executor = self.clone();
                tokio::spawn(async move {
                    if let Err(error) = executor.inner.machines.discard(&entry).await {
                        tracing::error!(error = chain(&error), "a machine that will not come could not be forgotten");
                    }
                });
                continue;
            }
            if record.status == MachineStatus::Migrating
                && !moved.contains(&record.name)
                && let Err(error) = self.inner.machines.set_status(&entry, MachineStatus::Running, None)
            {
                tracing::error!(error = chain(&error), "cannot store that a machine stays");
            }
        }
    }
}
