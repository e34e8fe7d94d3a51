//! The destination's part.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use migration::report::TriggerKind;
use tokio::sync::OwnedSemaphorePermit;
use vmm::api::{MigrationStatus, Phase};
use vmm::config::ReceiveConfig;

use super::{Active, Executor, ExecutorError, Result};
use crate::api::types::{MachineStatus, Migration, MigrationSide, MigrationStage, Usage};
use crate::clock::unix_ms;
use crate::digest::{hex, random};
use crate::machine::entry::Entry;
use crate::machine::registry::call;
use crate::machine::{MachineRecord, chain, name, shared, spec};
use crate::metrics::sampler::sum;
use crate::pool::wire::{Reservation, ReserveRequest, Settlement};
use crate::store::embedded::Kind;

/// A machine that uses less than this is let in whatever the load is.
const IDLE_CORES: f64 = 0.05;

/// How often the own VMM is asked: often, since the machine counts as running from the answer on.
const POLL: Duration = Duration::from_millis(20);

/// Longest deadline that a source may ask for: a day.
const DEADLINE_MAX_S: u64 = 86_400;

/// How long a question for the outcome waits for this side's own VMM to answer.
const SETTLE_PATIENCE: Duration = Duration::from_secs(45);

/// What a VMM that is gone has left of a machine that ran in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ran {
    /// Its disks have all that the source had.
    Complete,
    /// It was in post-copy.
    Incomplete,
}

impl Executor {
    /// Makes ready for a machine from host `source`, which was authenticated and allowed to.
    ///
    /// # Errors
    ///
    /// What is missing; nothing is left behind.
    pub async fn reserve(&self, source: &str, request: ReserveRequest) -> Result<Reservation> {
        let inner = &self.inner;
        if !name::id_ok(&request.id) || inner.store.get::<Migration>(Kind::Migration, &request.id)?.is_some() {
            return Err(ExecutorError::Used(request.id.escape_debug().to_string()));
        }
        if inner.gate.closed() {
            return Err(ExecutorError::Draining(inner.config.host.clone()));
        }
        spec::check_arrival(&request.machine)?;
        shared::check(&request.machine, &request.id, &request.proof, &inner.config.shared_dirs)?;
        let missing = inner.cpu.missing_for(&request.cpu);
        if !missing.is_empty() {
            return Err(ExecutorError::Processor { host: inner.config.host.clone(), missing });
        }
        // It may have left for there a moment ago, and what is left of it here still has its name.
        let left_for = |earlier: &Migration| earlier.side == MigrationSide::Source && earlier.destination == source;
        self.overlap(&request.machine.name, left_for).await?;
        self.supersede(source, &request.machine.name).await?;
        self.check_load(request.usage.as_ref())?;
        let warning = self.check_forecast(&request)?;
        let slot = Arc::clone(&inner.slots).try_acquire_owned().map_err(|_| ExecutorError::Busy {
            host: inner.config.host.clone(),
            limit: inner.config.concurrent_migrations,
        })?;
        let migration = arriving(source, &inner.config.host, &request);
        let usage = request.usage;
        let record = MachineRecord { migration: Some(request.id.clone()), ..request.machine };
        let (entry, reuse_disks) = inner.machines.prepare_incoming(record, source).await?;
        // What it used at the source stands in until it has been measured here.
        entry.state().usage = usage;
        match self.open(&entry, &migration, request.deadline_s, reuse_disks).await {
            Ok((mut reservation, active)) => {
                reservation.warning = warning;
                let executor = self.clone();
                tokio::spawn(async move { executor.run_destination(&active, &entry, slot).await });
                Ok(reservation)
            }
            Err(error) => {
                inner.machines.discard(&entry).await?;
                Err(error)
            }
        }
    }

    /// An earlier attempt of the same source has not noticed yet that it has failed: the source's word is enough to end it, and
    /// where it has committed the machine is here.
    async fn supersede(&self, source: &str, machine: &str) -> Result<()> {
        let earlier = |migration: &Migration| {
            migration.side == MigrationSide::Destination
                && migration.source == source
                && migration.stage == MigrationStage::Transferring
        };
        for active in self.active().values() {
            let migration = active.state.borrow();
            if migration.machine == machine && earlier(&migration) {
                active.cancelled.send_replace(true);
            }
        }
        self.overlap(machine, earlier).await
    }

    /// Processor time is shared and not promised; but a host that is full already helps nobody.
    fn check_load(&self, arriving: Option<&Usage>) -> Result<()> {
        let inner = &self.inner;
        let Some(arriving) = arriving else { return Ok(()) };
        let present: Vec<Usage> = inner.machines.all().iter().filter_map(|entry| entry.state().usage).collect();
        let load = sum(present.iter());
        let capacity = inner.machines.capacity();
        if load.cpu_demand_cores + arriving.cpu_demand_cores > capacity.cpu_cores
            && arriving.cpu_demand_cores > IDLE_CORES
        {
            let detail = format!(
                "the machine uses {:.2} cores, and {:.2} of {:.2} are free",
                arriving.cpu_demand_cores,
                (capacity.cpu_cores - load.cpu_demand_cores).max(0.0),
                capacity.cpu_cores
            );
            return Err(ExecutorError::Load { host: inner.config.host.clone(), detail });
        }
        Ok(())
    }

    /// What the own forecast says against the machine: it refuses a planned move, since the planner of another pool may not
    /// have seen the newest load here; an operator is only told.
    fn check_forecast(&self, request: &ReserveRequest) -> Result<Option<String>> {
        let planner = self.inner.planner.lock().unwrap_or_else(PoisonError::into_inner);
        let concern = planner.concern(&request.machine.name, request.usage.as_ref());
        match (concern, request.trigger.kind) {
            (Some(detail), TriggerKind::Forecast | TriggerKind::Event) => {
                Err(ExecutorError::Load { host: self.inner.config.host.clone(), detail })
            }
            (concern, _) => Ok(concern),
        }
    }

    /// Has the VMM listen.
    async fn open(
        &self,
        entry: &Entry,
        migration: &Migration,
        deadline_s: u64,
        reuse_disks: bool,
    ) -> Result<(Reservation, Arc<Active>)> {
        let token = hex(&random::<32>()?);
        let config = ReceiveConfig {
            id: migration.id.clone(),
            listen: SocketAddr::new(self.inner.config.migration_address, 0),
            token: token.clone(),
            source_host: migration.source.clone(),
            destination_host: migration.destination.clone(),
            tls: self.inner.identity.pem().clone(),
            deadline_s: deadline_s.clamp(1, DEADLINE_MAX_S),
            recover_s: self.inner.config.migration.recover_s,
            mark: Some(self.mark(&migration.machine)),
            reuse_disks,
        };
        let active = self.enter(migration.clone())?;
        match call(entry, move |client| client.receive(&config)).await {
            Ok(receiving) => Ok((Reservation { address: receiving.address, token, warning: None }, active)),
            Err(error) => {
                let why = chain(&error);
                self.update(&active, |migration| {
                    migration.stage = MigrationStage::Failed;
                    migration.error = Some(why);
                });
                Err(error.into())
            }
        }
    }

    /// Watches the VMM until the machine is here and complete, or will not come.
    pub(super) async fn run_destination(&self, active: &Active, entry: &Arc<Entry>, slot: OwnedSemaphorePermit) {
        let start = active.get();
        let id = start.id;
        let mut cancelled = active.cancelled.subscribe();
        let mut arrived = start.stage == MigrationStage::Verifying;
        entry.state().verifying = arrived;
        let mut phase = start.progress.map(|progress| progress.phase);
        let (mut told, mut gave_up) = (false, false);
        let (failure, lost) = loop {
            if *cancelled.borrow_and_update() && !told && !arrived {
                told = true;
                // Refused once committed; the next answer then says so.
                if let Err(error) = call(entry, |client| client.cancel_migration()).await {
                    tracing::info!(id, error = chain(&error), "the incoming migration was not cancelled");
                }
            }
            if *active.abandoned.borrow() && !gave_up && phase == Some(Phase::Postcopy) {
                gave_up = call(entry, |client| client.abandon_migration()).await.is_ok();
            }
            match call(entry, |client| client.migration()).await {
                Ok(Some(status)) if status.id == id => {
                    // In Committed itself it may still fail to start, and then it runs at its source.
                    if status.committed && status.phase > Phase::Committed && !arrived {
                        arrived = true;
                        self.arrived(active, entry, Some(&status));
                    }
                    if status.phase == Phase::Ended {
                        break (status.error, status.lost);
                    }
                    if arrived && phase != Some(status.phase) {
                        // Stored: whether all of it is here must be known after a restart as well.
                        self.update(active, |migration| migration.progress = Some(status.clone()));
                    }
                    phase = Some(status.phase);
                    self.show(active, status);
                }
                Ok(_) => break (Some("the VMM knows nothing of this migration".to_owned()), false),
                Err(error) if entry.process().is_none() => {
                    let ran = self.has_run(&active.get().machine);
                    if !arrived && ran.is_some() {
                        arrived = true;
                        self.arrived(active, entry, None);
                    }
                    let how = format!("the VMM ended: {}", chain(&error));
                    break (Some(how), phase == Some(Phase::Postcopy) || ran == Some(Ran::Incomplete));
                }
                Err(error) => tracing::warn!(id, error = chain(&error), "no progress from the incoming VMM"),
            }
            tokio::time::sleep(POLL).await;
        };
        entry.state().verifying = false;
        match (arrived, lost) {
            (true, true) => self.lost_here(active, entry, failure.as_deref().unwrap_or("its VMM gave no reason")).await,
            (true, false) => self.update(active, |migration| {
                migration.stage = MigrationStage::Completed;
                migration.error = failure;
            }),
            (false, _) => self.did_not_come(active, entry, failure).await,
        }
        drop(slot);
    }

    /// Where the VMM notes that the machine has run here, beside its disks.
    fn mark(&self, machine: &str) -> PathBuf {
        self.inner.config.machine_state_dir(machine).join("arrived")
    }

    /// Whether the machine had run in a VMM that is gone: then what it has done since is here, and its source must not go back to
    /// what it was before.
    fn has_run(&self, machine: &str) -> Option<Ran> {
        let mark = std::fs::read(self.mark(machine)).ok().filter(|mark| !mark.is_empty())?;
        let incomplete = mark == ReceiveConfig::RAN_INCOMPLETE.as_bytes();
        Some(if incomplete { Ran::Incomplete } else { Ran::Complete })
    }

    fn arrived(&self, active: &Active, entry: &Entry, status: Option<&MigrationStatus>) {
        let migration = active.get();
        entry.state().verifying = true;
        if let Err(error) = self.inner.machines.set_status(entry, MachineStatus::Running, None) {
            tracing::error!(error = chain(&error), "cannot store that a machine has arrived");
        }
        self.update(active, |migration| {
            migration.stage = MigrationStage::Verifying;
            migration.progress = status.cloned();
        });
        self.inner.audit.noted("arrived", &migration.object(), &format!("from host {}", migration.source));
    }

    async fn did_not_come(&self, active: &Active, entry: &Arc<Entry>, failure: Option<String>) {
        if let Err(error) = self.inner.machines.give_up(entry, &active.get().source).await {
            tracing::error!(error = chain(&error), "a machine that did not come could not be forgotten");
        }
        self.update(active, |migration| {
            migration.stage = MigrationStage::Failed;
            migration.error = Some(failure.unwrap_or_else(|| "the source gave up".to_owned()));
        });
    }

    /// Decides for good whether a machine runs here; the source's part of the migration has ended. A migration that has not
    /// committed is ended first; in post-copy nothing that is missing can come any more; one that was never heard of is
    /// remembered as failed, so that it cannot begin later.
    ///
    /// # Errors
    ///
    /// If it cannot be decided now; ask again.
    pub async fn settle_destination(&self, source: &str, id: &str) -> Result<Settlement> {
        let active = self.active().get(id).cloned();
        let Some(active) = active else { return self.settle_ended(source, id) };
        if active.get().side != MigrationSide::Destination || active.get().source != source {
            return Err(ExecutorError::Unknown(id.escape_debug().to_string()));
        }
        let mut state = active.state.subscribe();
        active.cancelled.send_replace(true);
        active.abandoned.send_replace(true);
        let waited = tokio::time::timeout(SETTLE_PATIENCE, state.wait_for(decided)).await;
        match waited {
            Ok(Ok(migration)) => Ok(settlement(&migration)),
            _ => Err(ExecutorError::Undecided {
                id: id.to_owned(),
                why: "the incoming VMM has not decided yet; ask again".to_owned(),
            }),
        }
    }

    fn settle_ended(&self, source: &str, id: &str) -> Result<Settlement> {
        if !name::id_ok(id) {
            return Err(ExecutorError::Unknown(id.escape_debug().to_string()));
        }
        if let Some(migration) = self.inner.store.get::<Migration>(Kind::Migration, id)? {
            if migration.side != MigrationSide::Destination || migration.source != source {
                return Err(ExecutorError::Unknown(id.to_owned()));
            }
            return Ok(settlement(&migration));
        }
        let never = Migration {
            stage: MigrationStage::Failed,
            ended_unix_ms: Some(unix_ms()),
            error: Some("its source asked for the outcome of a migration that never reached this host".to_owned()),
            ..Migration::new(id, "", MigrationSide::Destination, source, &self.inner.config.host)
        };
        self.inner.store.put(Kind::Migration, id, &never)?;
        self.forget_oldest();
        Ok(Settlement::Never)
    }
}

/// Whether it is known, for good, where the machine runs. In post-copy it is not before all of it is here.
fn decided(migration: &Migration) -> bool {
    let complete = |progress: &MigrationStatus| matches!(progress.phase, Phase::Verify | Phase::Ended);
    let verifying = migration.stage == MigrationStage::Verifying;
    migration.stage.ended() || verifying && migration.progress.as_ref().is_some_and(complete)
}

fn settlement(migration: &Migration) -> Settlement {
    match migration.stage {
        MigrationStage::Completed | MigrationStage::Verifying => Settlement::Runs,
        MigrationStage::Lost => Settlement::Lost,
        _ => Settlement::Never,
    }
}

fn arriving(source: &str, destination: &str, request: &ReserveRequest) -> Migration {
    Migration {
        trigger: request.trigger.clone(),
        on_failed_probe: request.on_failed_probe,
        ..Migration::new(&request.id, &request.machine.name, MigrationSide::Destination, source, destination)
    }
}
