//! Start after a stop, deletion, and what is found again after a restart of hostd.

use std::sync::Arc;
use std::time::Duration;

use super::turn::Turn;
use super::{Entry, Machines, Result};
use crate::api::types::{Machine, MachineStatus};
use crate::clock::unix_ms;
use crate::machine::launch::launch;
use crate::machine::process::{End, Process, wait_end};
use crate::machine::{MachineError, MachineRecord, chain, disk};
use crate::store::embedded::Kind;

/// How long a VMM may take to end by itself before it is killed.
const QUIT_PATIENCE: Duration = Duration::from_secs(5);

impl Machines {
    /// Starts a stopped machine again, from its kernel and its disks.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] if it is not stopped, or its kernel is on another host.
    pub async fn start(&self, name: &str) -> Result<Machine> {
        let entry = self.get(name)?;
        let record = entry.record();
        let (turn, _) = Turn::take(entry, |status, changing| obstacle(&record, status, changing))?;
        let entry = &turn.0;
        end_process(entry).await;
        let mut launch_record = entry.record();
        launch_record.initrd = launch_record.initrd.filter(|_| !launch_record.arrived);
        // It is `stopped` until it runs, in the store too: what is being made is cleared away after a crash, with its disks.
        let note = |id| self.note_process(entry, id);
        let launched = launch(&self.inner.config, &launch_record, false, note).await;
        let (process, info) = launched.inspect_err(|error| entry.state().reason = Some(chain(error)))?;
        self.attach(entry, process, Some(&info));
        {
            let mut state = entry.state();
            state.record.status = MachineStatus::Running;
            (state.reason, state.record.why_stopped) = (None, None);
        }
        if let Err(error) = self.save(entry) {
            // The next daemon would find it stopped, and end it.
            entry.state().stopped(chain(&error));
            end_process(entry).await;
            return Err(error);
        }
        Ok(entry.view(&self.inner.config))
    }

    /// Stops and removes a machine at an operator's wish.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] while it is being created or moved.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let entry = self.get(name)?;
        let before = {
            let mut state = entry.state();
            let remedy = match state.record.status {
                MachineStatus::Creating | MachineStatus::Incoming => "wait until it is there",
                MachineStatus::Migrating => "cancel its migration first, or delete it where it arrives",
                MachineStatus::InDoubt => "wait until both hosts have settled where it runs",
                MachineStatus::Deleting => "it is being deleted already",
                _ if state.changing => "it is being changed: try again in a moment",
                MachineStatus::Running | MachineStatus::Paused | MachineStatus::Stopped => "",
            };
            if !remedy.is_empty() {
                return Err(MachineError::State { name: name.to_owned(), status: state.record.status, remedy });
            }
            std::mem::replace(&mut state.record.status, MachineStatus::Deleting)
        };
        self.save(&entry).inspect_err(|_| entry.state().record.status = before)?;
        self.discard(&entry).await
    }

    /// A machine that was lost on its way: its process ends, its record and disks stay. `incomplete` if the disks lack blocks.
    pub async fn lose(&self, entry: &Arc<Entry>, why: &str, incomplete: bool) {
        {
            let mut state = entry.state();
            state.stopped(why.to_owned());
            (state.record.migration, state.record.incomplete, state.usage) = (None, incomplete, None);
        }
        if let Err(error) = self.save(entry) {
            tracing::error!(error = chain(&error), "cannot store that a machine is lost");
        }
        if let Some(process) = entry.process() {
            stop(entry, &process).await;
        }
    }

    /// Ends a machine's process and removes everything that hostd made for it, whatever state it is in.
    ///
    /// # Errors
    ///
    /// If the store fails; process and files are gone nevertheless.
    pub async fn discard(&self, entry: &Arc<Entry>) -> Result<()> {
        entry.state().record.status = MachineStatus::Deleting;
        if let Some(process) = entry.process() {
            stop(entry, &process).await;
        }
        self.clear_away(&entry.record())
    }

    /// As [`Machines::discard`] for a machine that did not come from host `source`: what has arrived of its disks is kept for a while.
    ///
    /// # Errors
    ///
    /// If the store fails; process and files are gone nevertheless.
    pub async fn give_up(&self, entry: &Arc<Entry>, source: &str) -> Result<()> {
        entry.state().record.status = MachineStatus::Deleting;
        if let Some(process) = entry.process() {
            stop(entry, &process).await;
        }
        self.inner.partial.keep(&entry.record(), source);
        self.clear_away(&entry.record())
    }

    /// Removes what was kept of machines that did not come, once its time is over.
    pub fn expire_partial(&self) {
        self.inner.partial.expire(unix_ms());
    }

    pub(super) fn clear_away(&self, record: &MachineRecord) -> Result<()> {
        disk::remove(&record.disks);
        let folder = self.inner.config.machine_state_dir(&record.name);
        // See `mark` in the executor.
        let _ = std::fs::remove_file(folder.join("arrived"));
        let _ = std::fs::remove_dir(folder);
        let _ = std::fs::remove_dir_all(self.inner.config.machine_run_dir(&record.name));
        let removed = self.inner.store.remove(Kind::Machine, &record.name);
        self.entries().remove(&record.name);
        Ok(removed?)
    }

    /// Stops all machines and keeps their records and disks: they are `stopped` for the next hostd.
    pub async fn stop_all(&self) {
        let stopping = self.all().into_iter().map(|entry| async move {
            if let Some(process) = entry.process() {
                stop(&entry, &process).await;
            }
        });
        let tasks: Vec<_> = stopping.map(tokio::spawn).collect();
        for task in tasks {
            let _ = task.await;
        }
    }

    /// Finds the machines of an earlier hostd again. What it had not finished making is cleared away.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub async fn recover(&self) -> Result<()> {
        for record in self.inner.store.all::<MachineRecord>(Kind::Machine)? {
            let entry = Arc::new(Entry::new(&self.inner.config, record.clone()));
            let process = record.process.and_then(|id| Process::adopt(id).ok());
            let alive = process.is_some();
            if let Some(process) = process {
                self.attach(&entry, process, None);
            }
            self.entries().insert(record.name.clone(), Arc::clone(&entry));
            tracing::info!(machine = record.name, status = ?record.status, alive, "found again");
            match record.status {
                MachineStatus::Creating | MachineStatus::Deleting => self.discard(&entry).await?,
                // The migration that it belongs to is settled by the executor.
                MachineStatus::Incoming | MachineStatus::Migrating | MachineStatus::InDoubt => {}
                MachineStatus::Running | MachineStatus::Paused if !alive => {
                    self.process_ended(&entry, &End::Ended("ended while hostd was not running".to_owned()));
                }
                MachineStatus::Running | MachineStatus::Paused => {}
                // Its guest has ended, or it was just being started, and nobody was told that it runs.
                MachineStatus::Stopped => end_process(&entry).await,
            }
        }
        Ok(())
    }
}

/// Why a machine cannot be started now, and what to do; nothing if it can.
fn obstacle(record: &MachineRecord, status: MachineStatus, changing: bool) -> Option<&'static str> {
    match status {
        MachineStatus::Stopped if record.incomplete => Some(
            "its disks lack blocks that never arrived; delete it, and start it from its disks on the host that it came from, or from a backup",
        ),
        MachineStatus::Stopped if record.arrived && !record.kernel.is_bundled() => Some(
            "it came from another host, and its kernel is a file of that host; delete it and create it anew with its disks",
        ),
        MachineStatus::Stopped if changing => Some("it is being changed: try again in a moment"),
        MachineStatus::Stopped => None,
        _ => Some("only a stopped machine can be started"),
    }
}

/// The process of a guest that turned itself off may still be there, and hold its images.
pub(super) async fn end_process(entry: &Arc<Entry>) {
    if let Some(process) = entry.process() {
        stop(entry, &process).await;
    }
}

/// Asks a VMM to end, and ends it if it does not.
pub(super) async fn stop(entry: &Entry, process: &Arc<Process>) {
    let client = entry.client().with_timeout(QUIT_PATIENCE);
    let asked = tokio::task::spawn_blocking(move || client.quit()).await;
    let patience = if matches!(asked, Ok(Ok(()))) { QUIT_PATIENCE } else { Duration::ZERO };
    if wait_end(process.watch(), patience).await.is_none() {
        process.kill();
        // SIGKILL cannot be refused; the wait is for the kernel to give back memory, taps and disks.
        wait_end(process.watch(), Duration::from_secs(30)).await;
    }
}
