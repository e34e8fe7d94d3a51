//! The destination after the machine has arrived: declared probes, alarms, and what is lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::report::{GuestRates, Trigger, TriggerKind};

use super::{Active, Executor, ExecutorError, Result, probe};
use crate::api::types::{MigrateRequest, Migration, MigrationSide, MigrationStage, OnFailedProbe};
use crate::machine::chain;
use crate::machine::entry::Entry;
use crate::metrics::sampler::guest_rates;
use crate::pool::wire::Verified;
use crate::store::embedded::Kind;

/// For a VMM to tell its counters.
const ANSWER: Duration = Duration::from_secs(2);

/// So long a guest is watched after its arrival: the source waits for it.
const WATCHED: Duration = Duration::from_millis(500);

/// What a guest does now. The processor time of its vCPUs, not of its VMM: this may still be comparing what arrived.
async fn measure(entry: &Entry) -> Option<GuestRates> {
    let read = || {
        let client = entry.client().with_timeout(ANSWER);
        async { Some((Instant::now(), tokio::task::spawn_blocking(move || client.metrics().ok()).await.ok()??)) }
    };
    let (since, before) = read().await?;
    tokio::time::sleep(WATCHED).await;
    let (until, now) = read().await?;
    guest_rates(&before, &now, until.duration_since(since))
}

impl Executor {
    /// Asks the declared probes of a machine that has arrived. If one is not answered and the operator wanted the machine
    /// back then, its way back begins here.
    ///
    /// # Errors
    ///
    /// If it is not here.
    pub async fn verify(&self, source: &str, id: &str) -> Result<Verified> {
        let migration = self.get(id)?;
        if migration.side != MigrationSide::Destination || migration.source != source {
            return Err(ExecutorError::Unknown(id.to_owned()));
        }
        let entry = self.inner.machines.get(&migration.machine)?;
        let (probes, rates) = tokio::join!(probe::ask_all(entry.record().probes), measure(&entry));
        let failed: Vec<String> = probe::failed(&probes).collect();
        if failed.is_empty() {
            return Ok(Verified { probes, returned_by: None, rates });
        }
        let mut alarm = format!("after its arrival from host `{source}`: {}", failed.join("; "));
        // Asked twice (the source's daemon was restarted), it is brought back once.
        let mut returned_by = self.get(id)?.returned_by;
        if returned_by.is_none() && migration.on_failed_probe == OnFailedProbe::Return {
            match self.bring_back(&migration) {
                Ok(back) => returned_by = Some(back.id),
                Err(error) => alarm = format!("{alarm}; it cannot be moved back: {}", chain(&error)),
            }
        }
        tracing::error!(id, machine = migration.machine, "alarm: {alarm}");
        self.inner.audit.noted("alarm", &migration.object(), &alarm);
        entry.state().reason = Some(alarm.clone());
        let back = returned_by.clone();
        self.amend(id, |migration| (migration.alarm, migration.returned_by) = (Some(alarm), back));
        Ok(Verified { probes, returned_by, rates })
    }

    /// Starts to move a machine back to where it came from: whatever its probes say there, it stays.
    fn bring_back(&self, migration: &Migration) -> Result<Migration> {
        let request = MigrateRequest {
            destination: migration.source.clone(),
            trigger: Trigger { kind: TriggerKind::Return, ..Trigger::default() },
            on_failed_probe: Some(OnFailedProbe::Alarm),
            ..MigrateRequest::default()
        };
        self.start(&migration.machine, &request)
    }

    /// Changes a migration that may have ended already.
    pub(super) fn amend(&self, id: &str, change: impl FnOnce(&mut Migration)) {
        let active = self.active().get(id).cloned();
        if let Some(active) = active.filter(|active| !active.state.borrow().stage.ended()) {
            return self.update(&active, change);
        }
        let amended = self.inner.store.get::<Migration>(Kind::Migration, id).and_then(|stored| match stored {
            Some(mut migration) => {
                change(&mut migration);
                self.inner.store.put(Kind::Migration, id, &migration)
            }
            None => Ok(()),
        });
        if let Err(error) = amended {
            tracing::error!(id, error = chain(&error), "cannot store a migration");
        }
    }

    /// The machine ran here, and a part of it will never come: it is stopped for good.
    pub(super) async fn lost_here(&self, active: &Active, entry: &Arc<Entry>, how: &str) {
        let migration = active.get();
        let why = format!(
            "it was lost in post-copy on its way from host `{}` ({how}); its disks here lack blocks: delete it here, and start it \
             from its disks there or from a backup",
            migration.source
        );
        self.inner.machines.lose(entry, &why, true).await;
        self.alarm(active, &why);
        self.update(active, |migration| {
            migration.stage = MigrationStage::Lost;
            migration.error = Some(why);
        });
    }
}
