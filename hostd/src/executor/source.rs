//! The source's part.

use std::sync::Arc;
use std::time::Duration;

use migration::report::{Outcome, Report};
use tokio::sync::watch;
use vmm::api::{Phase, Settle};
use vmm::config::SendConfig;

use super::{Active, Executor, ExecutorError, Result};
use crate::api::types::{MachineStatus, Migration, MigrationLimits, MigrationSide, MigrationStage};
use crate::machine::entry::Entry;
use crate::machine::registry::call;
use crate::machine::{MachineError, chain};
use crate::pool::PeerError;
use crate::pool::client::PeerClient;
use crate::pool::wire::{Reservation, ReserveRequest, Settlement};

/// How often progress is asked for.
const POLL: Duration = Duration::from_millis(50);

/// First and longest pause between two questions to a peer that does not answer.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// How long a destination may be busy with other migrations.
const BUSY_PATIENCE: Duration = Duration::from_secs(60);

/// Time beyond its own limit that a migration has for reservation and start.
const DEADLINE_MARGIN_S: u64 = 60;

/// How the transfer ended, by the source's VMM.
pub(super) enum Transfer {
    /// With a report.
    Report(Box<Report>),
    /// The VMM is gone, and with it what it knew.
    Lost(String),
}

impl Executor {
    /// All of it, from the queue to the end.
    pub(super) async fn run_source(&self, active: &Arc<Active>, entry: &Arc<Entry>, limits: MigrationLimits) {
        let mut cancelled = active.cancelled.subscribe();
        let slot = tokio::select! {
            slot = Arc::clone(&self.inner.slots).acquire_owned() => slot,
            () = wait_true(&mut cancelled) => return self.stay(active, entry, MigrationStage::Cancelled, None).await,
        };
        if let Err(error) = self.reserve_and_send(active, entry, limits).await {
            let cancelled = *active.cancelled.borrow();
            let stage = if cancelled { MigrationStage::Cancelled } else { MigrationStage::Failed };
            self.stay(active, entry, stage, Some(chain(&error))).await;
            return;
        }
        self.follow(active, entry).await;
        drop(slot);
    }

    async fn reserve_and_send(&self, active: &Active, entry: &Entry, limits: MigrationLimits) -> Result<()> {
        let migration = active.get();
        // Its VMM takes no orders to send before it has verified what it received.
        let mut cancelled = active.cancelled.subscribe();
        tokio::select! {
            over = self.overlap(&migration.machine, |earlier| earlier.side == MigrationSide::Destination) => over?,
            () = wait_true(&mut cancelled) => return Err(cancelled_early(&migration)),
        }
        self.update(active, |migration| migration.stage = MigrationStage::Reserving);
        let peer = self.peer(&migration)?;
        let request = ReserveRequest {
            id: migration.id.clone(),
            machine: entry.record(),
            usage: entry.state().usage,
            cpu: self.inner.cpu.clone(),
            trigger: migration.trigger.clone(),
            deadline_s: limits.timeout_s.saturating_add(DEADLINE_MARGIN_S),
        };
        let reservation = match reserve_when_free(active, peer, &request).await {
            Ok(reservation) => reservation,
            Err(error) => {
                if !matches!(error, PeerError::Refused { .. }) {
                    self.give_back(&migration).await;
                }
                return Err(error.into());
            }
        };
        if reservation.warning.is_some() {
            self.update(active, |migration| migration.warning.clone_from(&reservation.warning));
        }
        let sent = self.send(active, entry, &migration, &reservation, limits).await;
        if let Err(ExecutorError::Machine(MachineError::Api { source, .. })) = &sent
            && source.status().is_none()
        {
            // Nobody knows whether the VMM has begun; it is asked.
            tracing::warn!(id = migration.id, error = chain(source), "the VMM did not say whether it sends");
            return Ok(());
        }
        if sent.is_err() {
            self.give_back(&migration).await;
        }
        sent
    }

    async fn send(
        &self,
        active: &Active,
        entry: &Entry,
        migration: &Migration,
        reservation: &Reservation,
        limits: MigrationLimits,
    ) -> Result<()> {
        if *active.cancelled.borrow() {
            return Err(cancelled_early(migration));
        }
        let config = SendConfig {
            id: migration.id.clone(),
            address: reservation.address,
            token: reservation.token.clone(),
            source_host: migration.source.clone(),
            destination_host: migration.destination.clone(),
            tls: self.inner.identity.pem().clone(),
            limits,
            pause_before_switchover: false,
            trigger: migration.trigger.clone(),
        };
        // Stored first: after a crash between the two the VMM is asked whether it sends.
        self.update(active, |migration| migration.stage = MigrationStage::Transferring);
        call(entry, move |client| client.send(&config)).await?;
        Ok(())
    }

    /// From a VMM that sends to the end.
    pub(super) async fn follow(&self, active: &Arc<Active>, entry: &Arc<Entry>) {
        match self.watch_transfer(active, entry).await {
            Transfer::Report(report) => match report.outcome {
                Outcome::Completed => self.leave(active, entry, Some(*report)).await,
                Outcome::Failed | Outcome::Cancelled => {
                    let cancelled = report.outcome == Outcome::Cancelled;
                    let stage = if cancelled { MigrationStage::Cancelled } else { MigrationStage::Failed };
                    let reason = report.reason.clone();
                    active.state.send_modify(|migration| migration.report = Some(*report));
                    self.give_back(&active.get()).await;
                    self.stay(active, entry, stage, Some(reason)).await;
                }
                Outcome::InDoubt => self.settle(active, entry, Some(*report)).await,
            },
            Transfer::Lost(how) => {
                active.state.send_modify(|migration| migration.error = Some(how));
                self.settle(active, entry, None).await;
            }
        }
    }

    /// Polls the VMM until its part has ended.
    async fn watch_transfer(&self, active: &Active, entry: &Arc<Entry>) -> Transfer {
        let id = active.get().id;
        let mut cancelled = active.cancelled.subscribe();
        let mut told = false;
        loop {
            if *cancelled.borrow_and_update() && !told {
                told = true;
                // Refused once Commit was sent: then it goes on to its end, and the stage says so.
                if let Err(error) = call(entry, |client| client.cancel_migration()).await {
                    tracing::info!(id, error = chain(&error), "not cancelled");
                }
            }
            match call(entry, |client| client.migration()).await {
                Ok(Some(status)) if status.id == id => {
                    if let Some(report) = status.report.clone().filter(|_| status.phase == Phase::Ended) {
                        return Transfer::Report(Box::new(report));
                    }
                    Self::progress(active, status);
                }
                Ok(_) => return Transfer::Lost("the VMM knows nothing of this migration".to_owned()),
                Err(error) if entry.process().is_none() => {
                    return Transfer::Lost(format!("the machine's VMM ended while it was moved ({})", chain(&error)));
                }
                Err(error) => tracing::warn!(id, error = chain(&error), "no progress from the VMM"),
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = wait_change(&mut cancelled), if !told => {}
            }
        }
    }

    /// The machine runs at the destination: ask the probes, free what is here.
    async fn leave(&self, active: &Active, entry: &Arc<Entry>, report: Option<Report>) {
        self.update(active, |migration| {
            migration.stage = MigrationStage::Verifying;
            migration.report = report;
        });
        // What is left here is not the machine any more: it counts, and is measured, where it runs.
        entry.state().record.status = MachineStatus::Deleting;
        entry.state().usage = None;
        if let Err(error) = self.inner.machines.save(entry) {
            tracing::error!(error = chain(&error), "cannot store that a machine has left");
        }
        let migration = active.get();
        let verified = match self.peer(&migration) {
            Ok(peer) => peer.verify(&migration.id).await,
            Err(error) => {
                tracing::error!(error = chain(&error), "the destination is no peer any more");
                return self.finish_leaving(active, entry).await;
            }
        };
        match verified {
            Ok(verified) => active.state.send_modify(|migration| {
                if let Some(report) = &mut migration.report {
                    report.verification.probes = verified.probes;
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
        self.finish_leaving(active, entry).await;
    }

    async fn finish_leaving(&self, active: &Active, entry: &Arc<Entry>) {
        if let Err(error) = self.inner.machines.discard(entry).await {
            tracing::error!(error = chain(&error), "the machine that left could not be forgotten");
        }
        self.update(active, |migration| migration.stage = MigrationStage::Completed);
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

    /// Commit was sent and not answered, or the VMM that knew is gone: the destination says where the machine runs.
    pub(super) async fn settle(&self, active: &Active, entry: &Arc<Entry>, report: Option<Report>) {
        self.update(active, |migration| {
            migration.stage = MigrationStage::Settling;
            migration.report = report;
        });
        let id = active.get().id;
        if let Err(error) = self.inner.machines.set_status(entry, MachineStatus::InDoubt, Some(&id)) {
            tracing::error!(error = chain(&error), "cannot store that a machine is in doubt");
        }
        let settlement = self.ask_until_settled(active).await;
        self.inner.audit.noted("settled", &format!("migration:{id}"), &format!("{settlement:?}"));
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
                self.stay(active, entry, MigrationStage::Failed, reason).await;
            }
        }
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
                Ok(peer) => peer.settle(&migration.id).await.map_err(ExecutorError::from),
                Err(error) => Err(error),
            };
            match answer {
                Ok(settlement) => return settlement,
                Err(error) => {
                    let error = format!(
                        "the machine waits until host `{}` says where it runs: {}",
                        migration.destination,
                        chain(&error)
                    );
                    tracing::warn!(id = migration.id, error, "not settled yet");
                    active.state.send_modify(|migration| migration.error = Some(error));
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// Tells the destination that nothing will come. If it cannot be reached its own deadline clears up.
    pub(super) async fn give_back(&self, migration: &Migration) {
        let Ok(peer) = self.peer(migration) else { return };
        match peer.settle(&migration.id).await {
            Ok(Settlement::Never) => {}
            Ok(Settlement::Runs) => {
                // Cannot be: the engine says `failed` only while it has not sent Commit.
                self.inner.audit.noted(
                    "alarm",
                    &format!("machine:{} migration:{}", migration.machine, migration.id),
                    "the destination says that it runs a machine whose migration failed before Commit",
                );
            }
            Err(error) => tracing::warn!(id = migration.id, error = chain(&error), "a reservation was not given back"),
        }
    }

    fn peer(&self, migration: &Migration) -> Result<&PeerClient> {
        let peer = self.inner.peers.get(&migration.destination);
        let peer = peer.ok_or_else(|| ExecutorError::NoPeer(migration.destination.clone(), String::new()))?;
        Ok(peer.client())
    }
}

fn cancelled_early(migration: &Migration) -> ExecutorError {
    let why = "cancelled before anything was moved".to_owned();
    ExecutorError::NotCancellable { id: migration.id.clone(), why }
}

/// Asks for a reservation; a destination that is busy with others is asked again for a while.
async fn reserve_when_free(
    active: &Active,
    peer: &PeerClient,
    request: &ReserveRequest,
) -> std::result::Result<Reservation, PeerError> {
    let deadline = tokio::time::Instant::now() + BUSY_PATIENCE;
    loop {
        let answer = peer.reserve(request).await;
        let busy = matches!(&answer, Err(PeerError::Refused { problem, .. }) if problem.status == 503);
        if !busy || *active.cancelled.borrow() || tokio::time::Instant::now() >= deadline {
            return answer;
        }
        tokio::time::sleep(BACKOFF.0).await;
    }
}

async fn wait_true(flag: &mut watch::Receiver<bool>) {
    if flag.wait_for(|value| *value).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn wait_change(flag: &mut watch::Receiver<bool>) {
    if flag.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
