//! The source's part, up to the end of its VMM's part.

use std::sync::Arc;
use std::time::Duration;

use migration::report::{Outcome, Report};
use tokio::sync::watch;
use tokio::time::Instant;
use vmm::api::{MigrationStatus, Phase};
use vmm::config::SendConfig;

use super::failure::Failure;
use super::{Active, Executor, ExecutorError, Result};
use crate::api::types::{Migration, MigrationSide, MigrationStage};
use crate::digest::hex;
use crate::flag::wait_true;
use crate::machine::entry::Entry;
use crate::machine::registry::call;
use crate::machine::shared::Marks;
use crate::machine::{MachineError, chain};
use crate::pool::PeerError;
use crate::pool::client::PeerClient;
use crate::pool::wire::{Reservation, ReserveRequest};

/// How often progress is asked for.
const POLL: Duration = Duration::from_millis(50);

/// How often the destination's daemon is asked, while a link is lost in post-copy, whether the machine is still there.
const LOOK: Duration = Duration::from_secs(2);

/// Pause between two questions to a destination that is busy.
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// How long a destination may be busy with other migrations.
const BUSY_PATIENCE: Duration = Duration::from_secs(60);

/// Time beyond its own limit that a migration has for reservation and start.
const DEADLINE_MARGIN_S: u64 = 60;

/// How the transfer ended, by the source's VMM.
enum Transfer {
    /// With a report.
    Report(Box<Report>),
    /// The VMM is gone, and with it what it knew.
    Lost(String),
}

impl Executor {
    /// All of it, from the queue to the end.
    pub(super) async fn run_source(&self, active: &Arc<Active>, entry: &Arc<Entry>) {
        while let Err(failure) = self.attempt(active, entry).await {
            if !self.wait_for_another(active, entry, failure).await {
                return;
            }
        }
    }

    /// One attempt. `Ok` if the migration has ended; otherwise the machine runs here, and nothing is left at the destination
    /// that would stand in the way of another attempt.
    async fn attempt(&self, active: &Arc<Active>, entry: &Arc<Entry>) -> std::result::Result<(), Failure> {
        let mut cancelled = active.cancelled.subscribe();
        let slot = tokio::select! {
            slot = Arc::clone(&self.inner.slots).acquire_owned() => slot,
            () = wait_true(&mut cancelled) => {
                self.stay(active, entry, MigrationStage::Cancelled, None).await;
                return Ok(());
            }
        };
        let done = match self.reserve_and_send(active, entry).await {
            Ok(()) => self.follow(active, entry).await,
            Err(error) => Err(error.into()),
        };
        drop(slot);
        done
    }

    async fn reserve_and_send(&self, active: &Active, entry: &Arc<Entry>) -> Result<()> {
        let migration = active.get();
        // Its VMM takes no orders to send before it has verified what it received.
        let mut cancelled = active.cancelled.subscribe();
        tokio::select! {
            over = self.overlap(&migration.machine, |earlier| earlier.side == MigrationSide::Destination) => over?,
            () = wait_true(&mut cancelled) => return Err(cancelled_early(&migration)),
        }
        self.update(active, |migration| migration.stage = MigrationStage::Reserving);
        let peer = self.peer(&migration)?;
        let record = entry.record();
        let random_token = || crate::digest::random::<32>().map(|token| hex(&token)).map_err(std::io::Error::other);
        // They stay until the destination has looked.
        let marks = Marks::put(&record, &migration.attempt_id(), random_token)?;
        let request = ReserveRequest {
            id: migration.attempt_id(),
            machine: record,
            usage: entry.state().usage,
            cpu: self.inner.cpu.clone(),
            trigger: migration.trigger.clone(),
            deadline_s: migration.limits.timeout_s.saturating_add(DEADLINE_MARGIN_S),
            on_failed_probe: migration.on_failed_probe,
            proof: marks.proof.clone(),
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
        let sent = self.send(active, entry, &reservation).await;
        if let Err(ExecutorError::Machine(MachineError::Api { source, .. })) = &sent
            && source.status().is_none()
        {
            // Nobody knows whether the VMM has begun; it is asked.
            tracing::warn!(id = migration.id, error = chain(source), "the VMM did not say whether it sends");
            return Ok(());
        }
        if sent.is_err() {
            self.inner.budget.leave(&migration.id).await;
            self.give_back(&migration).await;
        }
        sent
    }

    async fn send(&self, active: &Active, entry: &Arc<Entry>, reservation: &Reservation) -> Result<()> {
        let migration = active.get();
        if *active.cancelled.borrow() {
            return Err(cancelled_early(&migration));
        }
        let mut limits = migration.limits.clone();
        let own = limits.bandwidth_bytes_per_second;
        limits.bandwidth_bytes_per_second = self.inner.budget.join(&migration.id, entry, own).await;
        let config = SendConfig {
            id: migration.attempt_id(),
            address: reservation.address,
            token: reservation.token.clone(),
            source_host: migration.source.clone(),
            destination_host: migration.destination.clone(),
            tls: self.inner.identity.pem().clone(),
            limits,
            pause_before_switchover: migration.pause_before_switchover,
            trigger: migration.trigger.clone(),
        };
        // Stored first: after a crash between the two the VMM is asked whether it sends.
        self.update(active, |migration| migration.stage = MigrationStage::Transferring);
        call(entry, move |client| client.send(&config)).await?;
        Ok(())
    }

    /// From a VMM that sends to the end.
    pub(super) async fn follow(&self, active: &Arc<Active>, entry: &Arc<Entry>) -> std::result::Result<(), Failure> {
        let migration = active.get();
        self.inner.budget.adopt(&migration.id, entry, migration.limits.bandwidth_bytes_per_second).await;
        let ended = self.watch_transfer(active, entry).await;
        self.inner.budget.leave(&migration.id).await;
        match ended {
            Transfer::Report(report) => match report.outcome {
                Outcome::Completed => {
                    self.leave(active, entry, Some(*report)).await;
                    Ok(())
                }
                Outcome::Failed | Outcome::Cancelled => {
                    let cancelled = report.outcome == Outcome::Cancelled;
                    let (error, transient) = (report.reason.clone(), report.transient);
                    active.state.send_modify(|migration| migration.report = Some(*report));
                    self.give_back(&active.get()).await;
                    if cancelled {
                        self.stay(active, entry, MigrationStage::Cancelled, Some(error)).await;
                        return Ok(());
                    }
                    Err(Failure { error, transient })
                }
                Outcome::InDoubt => self.settle(active, entry, Some(*report)).await,
            },
            Transfer::Lost(how) => {
                active.state.send_modify(|migration| migration.error = Some(how));
                self.settle(active, entry, None).await
            }
        }
    }

    /// Polls the VMM until its part has ended.
    async fn watch_transfer(&self, active: &Active, entry: &Arc<Entry>) -> Transfer {
        let id = active.get().attempt_id();
        let mut cancelled = active.cancelled.subscribe();
        let (mut told, mut looked) = (false, Instant::now());
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
                    let hanging = status.phase == Phase::Postcopy && status.error.is_some();
                    self.show(active, status);
                    if hanging && looked.elapsed() >= LOOK {
                        self.abandon_if_lost_there(active, entry).await;
                        looked = Instant::now();
                    }
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

    /// Shows progress; what an operator has to act on is recorded as well.
    pub(super) fn show(&self, active: &Active, status: MigrationStatus) {
        let migration = active.get();
        let before = migration.progress.as_ref();
        if status.waiting && !before.is_some_and(|before| before.waiting) {
            let detail = "ready for the switchover: waits for `headroom migration continue`";
            self.inner.audit.noted("migration-waits", &migration.object(), detail);
        }
        let lost_link = status.phase == Phase::Postcopy && status.error.is_some();
        if lost_link && before.is_none_or(|before| before.error.is_none()) {
            let detail = status.error.clone().unwrap_or_default();
            self.inner.audit.noted("post-copy-hangs", &migration.object(), &detail);
        }
        Self::progress(active, status);
    }

    /// The link is lost in post-copy. If the destination's daemon says that the machine is gone there, nothing can be sent to
    /// it any more.
    async fn abandon_if_lost_there(&self, active: &Active, entry: &Arc<Entry>) {
        let migration = active.get();
        let Ok(peer) = self.peer(&migration) else { return };
        let Ok(there) = peer.migration(&migration.attempt_id()).await else { return };
        if there.stage == MigrationStage::Lost {
            tracing::warn!(id = migration.id, "the machine is lost at the destination: its post-copy is given up");
            if let Err(error) = call(entry, |client| client.abandon_migration()).await {
                tracing::warn!(id = migration.id, error = chain(&error), "the VMM could not be told to give up");
            }
        }
    }

    pub(super) fn peer(&self, migration: &Migration) -> Result<&PeerClient> {
        let peer = self.inner.peers.get(&migration.destination);
        let peer = peer.ok_or_else(|| ExecutorError::NoPeer(migration.destination.clone(), String::new()))?;
        Ok(peer.client())
    }
}

fn cancelled_early(migration: &Migration) -> ExecutorError {
    let why = "it was cancelled before anything was moved".to_owned();
    ExecutorError::NotNow { id: migration.id.clone(), what: "begun", why }
}

/// Asks for a reservation; a destination that is busy with others is asked again for a while.
async fn reserve_when_free(
    active: &Active,
    peer: &PeerClient,
    request: &ReserveRequest,
) -> std::result::Result<Reservation, PeerError> {
    let deadline = Instant::now() + BUSY_PATIENCE;
    loop {
        let answer = peer.reserve(request).await;
        let busy = matches!(&answer, Err(PeerError::Refused { problem, .. }) if problem.status == 503);
        if !busy || *active.cancelled.borrow() || Instant::now() >= deadline {
            return answer;
        }
        tokio::time::sleep(BUSY_PAUSE).await;
    }
}

async fn wait_change(flag: &mut watch::Receiver<bool>) {
    if flag.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
