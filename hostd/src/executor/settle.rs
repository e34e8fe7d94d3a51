//! The source after its VMM's part: who runs the machine, and what becomes of what is here.

use std::sync::Arc;
use std::time::Duration;

use migration::report::{GuestRates, Outcome, Rates, Report};
use vmm::api::Settle;

use super::failure::Failure;
use super::{Active, Executor, ExecutorError};
use crate::api::types::{MachineStatus, Migration, MigrationStage};
use crate::clock::utc;
use crate::flag::wait_true;
use crate::machine::entry::Entry;
use crate::machine::registry::call;
use crate::machine::{MachineError, chain};
use crate::pool::wire::Settlement;

/// First and longest pause between two questions to a peer that does not answer.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Between two attempts to tell a VMM.
const POLL: Duration = Duration::from_millis(50);

impl Executor {
    /// The machine runs at the destination: ask the probes, free what is here.
    pub(super) async fn leave(&self, active: &Active, entry: &Arc<Entry>, report: Option<Report>) {
        self.update(active, |migration| {
            migration.stage = MigrationStage::Verifying;
            migration.report = report;
        });
        // What is left here is not the machine any more: it counts, and is measured, where it runs.
        entry.state().record.status = MachineStatus::Deleting;
        let rates = entry.state().rates;
        entry.state().usage = None;
        if let Err(error) = self.inner.machines.save(entry) {
            tracing::error!(error = chain(&error), "cannot store that a machine has left");
        }
        self.ask_probes(active, rates).await;
        if let Err(error) = self.inner.machines.discard(entry).await {
            tracing::error!(error = chain(&error), "the machine that left could not be forgotten");
        }
        self.update(active, |migration| migration.stage = MigrationStage::Completed);
    }

    /// Has the destination ask the declared probes; what does not answer raises an alarm.
    async fn ask_probes(&self, active: &Active, before: Option<GuestRates>) {
        let migration = active.get();
        let verified = match self.peer(&migration) {
            Ok(peer) => peer.verify(&migration.attempt_id()).await.map_err(ExecutorError::from),
            Err(error) => Err(error),
        };
        match verified {
            Ok(verified) => active.state.send_modify(|migration| {
                migration.returned_by = verified.returned_by;
                if let Some(report) = &mut migration.report {
                    report.verification.probes = verified.probes;
                    report.verification.rates = Rates { before, after: verified.rates };
                }
            }),
            Err(error) => {
                let error = format!(
                    "the machine runs at the destination, but its probes could not be asked: {}",
                    chain(&error)
                );
                active.state.send_modify(|migration| migration.error = Some(error));
            }
        }
        if let Some(alarm) = active.get().report.as_ref().and_then(wrong_after_arrival) {
            self.alarm(active, &alarm);
        }
    }

    /// Raises an alarm: in the audit log and in the migration.
    pub(super) fn alarm(&self, active: &Active, text: &str) {
        let migration = active.get();
        tracing::error!(id = migration.id, machine = migration.machine, "alarm: {text}");
        self.inner.audit.noted("alarm", &migration.object(), text);
        active.state.send_modify(|migration| migration.alarm = Some(text.to_owned()));
    }

    /// The machine runs here as before.
    pub(super) async fn stay(&self, active: &Active, entry: &Entry, stage: MigrationStage, error: Option<String>) {
        if let Err(error) = self.inner.machines.set_status(entry, MachineStatus::Running, None) {
            tracing::error!(error = chain(&error), "cannot store that a machine stays");
        }
        self.update(active, |migration| {
            migration.stage = stage;
            migration.error = error.or_else(|| migration.error.take());
        });
    }

    /// Commit was sent and not answered, or the VMM that knew is gone: the destination says where the machine runs. Nothing
    /// more will be sent from here.
    pub(super) async fn settle(
        &self,
        active: &Active,
        entry: &Arc<Entry>,
        report: Option<Report>,
    ) -> Result<(), Failure> {
        self.update(active, |migration| {
            migration.stage = MigrationStage::Settling;
            migration.report = report;
        });
        let migration = active.get();
        if let Err(error) = self.inner.machines.set_status(entry, MachineStatus::InDoubt, Some(&migration.id)) {
            tracing::error!(error = chain(&error), "cannot store that a machine is in doubt");
        }
        let mut taken_back = active.taken_back.subscribe();
        let settlement = tokio::select! {
            settlement = self.ask_until_settled(active) => settlement,
            () = wait_true(&mut taken_back) => {
                // It was said of this attempt.
                active.taken_back.send_replace(false);
                self.watch_the_dead(&active.get());
                Settlement::Never
            }
        };
        self.inner.audit.noted("settled", &migration.object(), &format!("{settlement:?}"));
        match settlement {
            Settlement::Runs => {
                self.tell(entry, Settle::RunsThere).await;
                let report = active.get().report.map(|report| Report {
                    outcome: Outcome::Completed,
                    reason: format!("settled: it runs at the destination ({})", report.reason),
                    ..report
                });
                self.leave(active, entry, report).await;
            }
            Settlement::Never => {
                self.tell(entry, Settle::RunsHere).await;
                active.state.send_modify(|migration| {
                    if let Some(report) = &mut migration.report {
                        report.outcome = Outcome::Failed;
                        report.reason = format!("settled: it runs at the source ({})", report.reason);
                    }
                });
                let reason = active.get().report.map(|report| report.reason);
                let error = reason.or_else(|| active.get().error).unwrap_or_default();
                return Err(Failure { error, transient: true });
            }
            Settlement::Lost => self.lost(active, entry).await,
        }
        Ok(())
    }

    /// The destination ran it and has lost a part of it. What is here is older than what was seen of the machine from
    /// outside, so it never goes on by itself; its disks stay for the operator.
    async fn lost(&self, active: &Active, entry: &Arc<Entry>) {
        let migration = active.get();
        let paused = migration.report.as_ref().and_then(|report| report.paused_unix_ms);
        let when = paused.map(|at| format!(" ({} UTC)", utc(at as u64))).unwrap_or_default();
        let why = format!(
            "it was lost in post-copy on its way to host `{there}`: its disks here are as they were at the switchover{when}, those on \
             `{there}` lack blocks; delete it there, and start it here from these disks or from a backup",
            there = migration.destination
        );
        self.inner.machines.lose(entry, &why, false).await;
        self.update(active, |migration| {
            migration.stage = MigrationStage::Lost;
            migration.error = Some(why);
        });
    }

    /// Tells the fenced VMM what was settled, until it has heard, or is gone.
    async fn tell(&self, entry: &Arc<Entry>, settle: Settle) {
        while entry.process().is_some() {
            match call(entry, move |client| client.settle(settle)).await {
                Ok(_) => return,
                Err(MachineError::Api { source, .. }) if source.status().is_some() => {
                    // It answers, and is not in doubt: it was told before (a restart of hostd), or never sent Commit.
                    tracing::info!(answer = chain(&source), "the VMM had nothing to settle");
                    return;
                }
                Err(error) => tracing::warn!(error = chain(&error), "the VMM could not be told where it runs"),
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn ask_until_settled(&self, active: &Active) -> Settlement {
        let migration = active.get();
        let mut pause = BACKOFF.0;
        loop {
            let answer = match self.peer(&migration) {
                Ok(peer) => peer.settle(&migration.attempt_id()).await.map_err(ExecutorError::from),
                Err(error) => Err(error),
            };
            match answer {
                Ok(settlement) => return settlement,
                Err(error) => {
                    let error = format!(
                        "the machine waits until host `{}` says where it runs: {}; if that host is gone for good, `headroom \
                         migration take-back {} --destination-is-gone` runs it here",
                        migration.destination,
                        chain(&error),
                        migration.id
                    );
                    tracing::warn!(id = migration.id, error, "not settled yet");
                    active.state.send_modify(|migration| migration.error = Some(error));
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// A machine was taken back because its destination is gone for good. Should that come back all the same, and have run it,
    /// there are two of them: whoever can end one must know. Also called after a restart, for as long as that host has not answered.
    pub(super) fn watch_the_dead(&self, migration: &Migration) {
        let Some(attempt) = migration.taken_back.clone() else { return };
        let (executor, migration) = (self.clone(), migration.clone());
        tokio::spawn(async move {
            let settlement = loop {
                let Ok(peer) = executor.peer(&migration) else { return };
                match peer.settle(&attempt).await {
                    Ok(settlement) => break settlement,
                    Err(_) => tokio::time::sleep(BACKOFF.1).await,
                }
            };
            // A host that says that it never ran it never will.
            let alarm = (settlement != Settlement::Never).then(|| {
                format!(
                    "`{}` was taken back here, and host `{}`, which was said to be gone, has run it: stop one of them now",
                    migration.machine, migration.destination
                )
            });
            if let Some(alarm) = &alarm {
                tracing::error!(id = migration.id, "alarm: {alarm}");
                executor.inner.audit.noted("alarm", &migration.object(), alarm);
            }
            executor.amend(&migration.id, |migration| {
                migration.taken_back = None;
                migration.alarm = alarm.or_else(|| migration.alarm.take());
            });
        });
    }

    /// Tells the destination that nothing will come. If it cannot be reached its own deadline clears up.
    pub(super) async fn give_back(&self, migration: &Migration) {
        let Ok(peer) = self.peer(migration) else { return };
        match peer.settle(&migration.attempt_id()).await {
            Ok(Settlement::Never) => {}
            Ok(Settlement::Runs | Settlement::Lost) => {
                // Cannot be: the engine says `failed` only while it has not sent Commit.
                self.inner.audit.noted(
                    "alarm",
                    &migration.object(),
                    "the destination says that it runs a machine whose migration failed before Commit",
                );
            }
            Err(error) => tracing::warn!(id = migration.id, error = chain(&error), "a reservation was not given back"),
        }
    }
}

/// What was checked after the arrival and is not as it should be.
fn wrong_after_arrival(report: &Report) -> Option<String> {
    let checked = &report.verification;
    let digest = |ok: Option<bool>, what: &str| (ok == Some(false)).then(|| format!("the digests of {what} differ"));
    let digests = [digest(checked.memory_digest_ok, "memory"), digest(checked.disk_digest_ok, "the disks")];
    let wrong: Vec<String> = digests.into_iter().flatten().chain(super::probe::failed(&checked.probes)).collect();
    (!wrong.is_empty()).then(|| wrong.join("; "))
}
