//! Draining: a host is closed to machines, and its own are moved away, as many at a time as the host moves at once.
//!
//! What was asked for is stored: after a restart of the daemon the host is still closed and its drain goes on. A machine that
//! cannot go says why, and is tried again. Once a host is empty it stays closed until it is opened again.

mod choose;
pub mod gate;
mod record;

use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::report::{Trigger, TriggerKind};
use tokio::sync::watch;

use crate::api::problem::Failure;
use crate::api::types::{
    Capacity, Drain, DrainRequest, DrainState, DrainStep, Drained, HostSummary, MachineStatus, MigrateRequest,
    Migration, MigrationStage,
};
use crate::clock::unix_ms;
use crate::daemon::Daemon;
use crate::flag::stopped;
use crate::machine::chain;
use crate::machine::entry::Entry;
use crate::store::embedded::Kind;
use choose::{Target, choose};
pub use record::Drainer;
use record::{KEY, Obstacle, Record, Sent, State};

/// How often the drain looks around.
const STEP: Duration = Duration::from_millis(250);

/// A machine that cannot go is looked at again after so long.
const AGAIN: Duration = Duration::from_secs(30);

/// The same if what is in its way may pass at any moment: a host that does not answer just now, or has not yet told that a
/// machine has left it.
const SOON: Duration = Duration::from_secs(1);

/// What may pass at any moment counts as an obstacle after so long.
const PASSING: Duration = Duration::from_secs(10);

/// Attempts after the first one that a move has at least: nobody stands by who could start it again.
const RETRIES: u32 = 3;

impl Daemon {
    /// Closes this host and begins to move its machines away, or goes on with that.
    ///
    /// # Errors
    ///
    /// If a host in it is not a peer, or the store fails.
    pub fn start_drain(&self, request: DrainRequest) -> Result<Drain, Failure> {
        if let Some(unknown) = request.to.iter().find(|host| self.peers.get(host).is_none()) {
            let detail = format!("`{}` is not a peer of this host: `headroom host` lists them", unknown.escape_debug());
            return Err(Failure::new(400, "wrong-destination", detail));
        }
        {
            let mut state = self.drainer.state();
            let before = state.record.take();
            let (started_unix_ms, sent) =
                before.map_or_else(|| (unix_ms(), Vec::new()), |record| (record.started_unix_ms, record.sent));
            let record = Record { started_unix_ms, to: request.to, paused: false, sent };
            self.store.put(Kind::Host, KEY, &record)?;
            *state = State { record: Some(record), ..State::default() };
            self.drainer.gate.set(true);
        }
        self.audit.noted("drain", &self.as_object(), "closed; its machines are moved away");
        Ok(self.drain())
    }

    /// Starts no further move; the host stays closed.
    ///
    /// # Errors
    ///
    /// If it is not being drained, or the store fails.
    pub fn pause_drain(&self) -> Result<Drain, Failure> {
        {
            let mut state = self.drainer.state();
            let record = state.record.as_mut().ok_or_else(not_drained)?;
            record.paused = true;
            self.store.put(Kind::Host, KEY, record)?;
        }
        self.audit.noted("drain", &self.as_object(), "paused: no further machine is moved");
        Ok(self.drain())
    }

    /// Opens the host again. Moves that have not begun to transfer are cancelled; those that have go on.
    ///
    /// # Errors
    ///
    /// If it is not being drained, or the store fails.
    pub fn end_drain(&self) -> Result<Drain, Failure> {
        let record = {
            let mut state = self.drainer.state();
            let record = state.record.clone().ok_or_else(not_drained)?;
            self.store.remove(Kind::Host, KEY)?;
            *state = State::default();
            self.drainer.gate.set(false);
            record
        };
        for sent in record.sent.iter().filter(|sent| !sent.over) {
            let early = |migration: &Migration| {
                use MigrationStage::{Queued, Reserving, Retrying};
                matches!(migration.stage, Queued | Reserving | Retrying)
            };
            if self.executor.get(&sent.migration).is_ok_and(|migration| early(&migration)) {
                let _ = self.executor.cancel(&sent.migration);
            }
        }
        self.audit.noted("drain", &self.as_object(), "opened again");
        Ok(self.drain())
    }

    /// How far it is.
    pub fn drain(&self) -> Drain {
        let state = self.drainer.state();
        let Some(record) = &state.record else { return Drain::default() };
        let mut machines: Vec<Drained> = record.sent.iter().filter(|sent| sent.over).map(gone).collect();
        for entry in self.machines.all() {
            let name = entry.record().name;
            machines.retain(|gone| gone.machine != name);
            machines.push(self.one(&state, record, &name));
        }
        for sent in record.sent.iter().filter(|sent| !sent.over) {
            if !machines.iter().any(|machine| machine.machine == sent.machine) {
                machines.push(gone(sent));
            }
        }
        let any = |step| machines.iter().any(|machine| machine.step == step);
        let drain_state = match (any(DrainStep::Waiting), any(DrainStep::Moving), any(DrainStep::Blocked)) {
            (false, false, false) => DrainState::Empty,
            (_, true, _) if !record.paused => DrainState::Moving,
            _ if record.paused => DrainState::Paused,
            (true, ..) => DrainState::Moving,
            (false, ..) => DrainState::Blocked,
        };
        Drain { state: drain_state, started_unix_ms: Some(record.started_unix_ms), to: record.to.clone(), machines }
    }

    fn one(&self, state: &State, record: &Record, name: &str) -> Drained {
        let nothing = Drained {
            machine: name.to_owned(),
            step: DrainStep::Waiting,
            destination: None,
            migration: None,
            reason: None,
        };
        if let Some(sent) = record.sent.iter().find(|sent| sent.machine == name && !sent.over) {
            return Drained {
                step: DrainStep::Moving,
                destination: Some(sent.destination.clone()),
                migration: Some(sent.migration.clone()),
                ..nothing
            };
        }
        match state.obstacles.get(name) {
            Some(obstacle) => {
                let waits = obstacle.passing && obstacle.since.elapsed() < PASSING;
                let step = if waits { DrainStep::Waiting } else { DrainStep::Blocked };
                Drained { step, reason: Some(obstacle.reason.clone()), ..nothing }
            }
            None => nothing,
        }
    }

    fn as_object(&self) -> String {
        format!("host:{}", self.config.host)
    }

    /// One look around: what has ended, and what can be started.
    fn step_drain(&self) {
        let mut state = self.drainer.state();
        let Some(mut record) = state.record.take() else { return };
        let under_way = |record: &Record| record.sent.iter().filter(|sent| !sent.over).count();
        let before = under_way(&record);
        self.note_ended(&mut state, &mut record);
        let mut changed = before != under_way(&record);
        if !record.paused {
            for entry in self.machines.all() {
                changed |= self.consider(&mut state, &mut record, &entry);
            }
        }
        if changed && let Err(error) = self.store.put(Kind::Host, KEY, &record) {
            tracing::error!(error = chain(&error), "cannot store how far the drain is");
        }
        let empty = self.machines.all().is_empty();
        if empty && !std::mem::replace(&mut state.told_empty, true) {
            self.audit.noted("drain", &self.as_object(), "the host is empty");
        }
        state.told_empty &= empty;
        state.record = Some(record);
    }

    /// Takes note of moves that have ended.
    fn note_ended(&self, state: &mut State, record: &mut Record) {
        record.sent.retain_mut(|sent| {
            if sent.over {
                return true;
            }
            // One that is forgotten by now ended long ago: whether the machine is still here says how.
            let migration = self.executor.get(&sent.migration).ok();
            let stage = migration.as_ref().map_or(MigrationStage::Completed, |migration| migration.stage);
            if !stage.ended() {
                return true;
            }
            let (name, host) = (sent.machine.clone(), &sent.destination);
            match stage {
                MigrationStage::Failed => {
                    let error = migration.and_then(|migration| migration.error).unwrap_or_default();
                    state.refused.entry(name).or_default().insert(host.clone(), format!("to host `{host}`: {error}"));
                }
                MigrationStage::Cancelled => {
                    let reason = format!("its move to host `{host}` was cancelled: drain again to try again");
                    let obstacle = Obstacle { reason, since: Instant::now(), passing: false, again: None };
                    state.obstacles.insert(name, obstacle);
                }
                _ => {
                    state.refused.remove(&name);
                    sent.over = true;
                }
            }
            sent.over
        });
    }

    /// Starts to move one machine if it is its turn and a host takes it. True if it was started.
    fn consider(&self, state: &mut State, record: &mut Record, entry: &Entry) -> bool {
        let summary = entry.summary();
        let name = summary.name.clone();
        if record.sent.iter().any(|sent| sent.machine == name && !sent.over) {
            return false;
        }
        match state.obstacles.get(&name).map(|obstacle| obstacle.again) {
            Some(None) => return false,
            Some(Some(at)) if at > Instant::now() => return false,
            _ => {}
        }
        let targets = self.targets(record);
        let passing = targets.iter().any(|target| target.may_change(&name));
        let block = |state: &mut State, reason: String| {
            let now = Instant::now();
            let since = state.obstacles.get(&name).map_or(now, |before| before.since);
            let again = Some(now + if passing { SOON } else { AGAIN });
            state.refused.remove(&name);
            state.obstacles.insert(name.clone(), Obstacle { reason, since, passing, again });
        };
        let busy = record.sent.iter().filter(|sent| !sent.over).count() >= self.config.concurrent_migrations;
        match summary.status {
            MachineStatus::Running if busy => return false,
            MachineStatus::Running => {}
            MachineStatus::Stopped => {
                block(state, "it is stopped, and only a running machine can be moved: start or delete it".to_owned());
                return false;
            }
            MachineStatus::Paused => {
                block(state, "it is paused, and only a running machine can be moved: resume or delete it".to_owned());
                return false;
            }
            // On its way here, away by a move of somebody else, or being made or deleted: that ends by itself.
            _ => {
                state.obstacles.remove(&name);
                return false;
            }
        }
        let refused = state.refused.get(&name).cloned().unwrap_or_default();
        let started = choose(&summary, &targets, &refused)
            .and_then(|host| self.start_move(&name, &host).map_err(|error| format!("to host `{host}`: {error}")));
        match started {
            Ok(migration) => {
                state.obstacles.remove(&name);
                record.sent.push(Sent {
                    machine: name,
                    destination: migration.destination,
                    migration: migration.id,
                    over: false,
                });
                true
            }
            Err(reason) => {
                block(state, reason);
                false
            }
        }
    }

    fn start_move(&self, machine: &str, host: &str) -> Result<Migration, String> {
        let request = MigrateRequest {
            destination: host.to_owned(),
            trigger: Trigger { kind: TriggerKind::Drain, ..Trigger::default() },
            retries: Some(self.config.migration.retries.max(RETRIES)),
            ..MigrateRequest::default()
        };
        self.executor.start(machine, &request).map_err(|error| chain(&error))
    }

    /// Hosts that may take machines, also those that were never heard of.
    fn targets(&self, record: &Record) -> Vec<Target> {
        let mut targets = Vec::new();
        for peer in self.peers.views() {
            if !record.to.is_empty() && !record.to.contains(&peer.host) {
                continue;
            }
            let heard = self.peers.summaries(&peer.pool).into_iter().find(|summary| summary.host == peer.host);
            let host = heard.unwrap_or_else(|| HostSummary {
                host: peer.host.clone(),
                live: false,
                draining: false,
                capacity: Capacity::default(),
                usage: None,
                machines: Vec::new(),
                sampled_unix_ms: 0,
            });
            let on_the_way = record.sent.iter().filter(|sent| {
                let counted = host.machines.iter().any(|machine| machine.name == sent.machine);
                !sent.over && sent.destination == host.host && !counted
            });
            let memory = on_the_way.filter_map(|sent| self.machines.get(&sent.machine).ok());
            let promised_mib = memory.map(|entry| entry.record().memory_mib as f64).sum();
            targets.push(Target { own_pool: peer.pool == self.config.pool, host, promised_mib });
        }
        targets
    }
}

fn gone(sent: &Sent) -> Drained {
    Drained {
        machine: sent.machine.clone(),
        step: DrainStep::Moved,
        destination: Some(sent.destination.clone()),
        migration: Some(sent.migration.clone()),
        reason: None,
    }
}

fn not_drained() -> Failure {
    Failure::new(409, "not-drained", "this host is not being drained: it takes machines")
}

/// Carries drains out until the daemon stops.
pub async fn run(daemon: Arc<Daemon>, mut stop: watch::Receiver<bool>) {
    let mut ticks = tokio::time::interval(STEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopped(&mut stop) => return,
        }
        // Most hosts are open for all of their life: no thread is woken for nothing four times a second.
        if !daemon.gate.closed() {
            continue;
        }
        let worker = Arc::clone(&daemon);
        // Stores, and therefore blocks.
        if let Err(error) = tokio::task::spawn_blocking(move || worker.step_drain()).await {
            tracing::error!(%error, "the drain could not look around");
        }
    }
}
