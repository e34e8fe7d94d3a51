//! Disks of a machine that is there: made larger while it runs or is stopped, taken away while it is stopped.
//!
//! Neither happens while the machine moves, and no move begins meanwhile: source and destination must mean the same disks.

use std::sync::Arc;

use super::life::stop;
use super::{Entry, Machines, Result, call};
use crate::api::types::{Disk, DiskSize, Machine, MachineStatus};
use crate::machine::launch::disk_config;
use crate::machine::{MachineError, spec};

/// What is done to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Grow,
    Detach,
}

/// Why a machine's disks cannot be changed now, and what to do; nothing if they can.
fn obstacle(change: Change, status: MachineStatus, changing: bool) -> Option<&'static str> {
    match (status, change) {
        (MachineStatus::Creating | MachineStatus::Incoming, _) => Some("change its disks once it is there"),
        (MachineStatus::Migrating, _) => {
            Some("wait for its migration to end, or cancel it (`headroom migration list`), and then change its disks")
        }
        (MachineStatus::InDoubt, _) => Some("wait until both hosts have settled where it runs"),
        (MachineStatus::Deleting, _) => Some("it is being deleted"),
        (MachineStatus::Running | MachineStatus::Paused, Change::Detach) => {
            Some("let its guest turn itself off first: a guest with virtio over MMIO cannot be told that a device goes")
        }
        _ if changing => Some("a disk of it is being changed: try again in a moment"),
        (MachineStatus::Running | MachineStatus::Paused | MachineStatus::Stopped, _) => None,
    }
}

/// Keeps everybody else from a machine's disks, and the machine where it is, until it is dropped.
struct Turn(Arc<Entry>);

impl Turn {
    fn take(entry: Arc<Entry>, change: Change) -> Result<(Self, MachineStatus)> {
        let status = {
            let mut state = entry.state();
            let status = state.record.status;
            if let Some(remedy) = obstacle(change, status, state.changing) {
                return Err(MachineError::State { name: state.record.name.clone(), status, remedy });
            }
            state.changing = true;
            status
        };
        Ok((Self(entry), status))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.state().changing = false;
    }
}

impl Machines {
    /// Makes a disk larger, of a machine that runs or is stopped.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] while it moves, [`MachineError::NoDisk`], [`MachineError::NoRoom`], or if the disk cannot have that
    /// size; it is as it was then.
    pub async fn resize_disk(&self, name: &str, size: &DiskSize) -> Result<Machine> {
        spec::disk_size(size)?;
        let (turn, status) = Turn::take(self.get(name)?, Change::Grow)?;
        let entry = &turn.0;
        let before = self.promise(entry, size)?;
        if let Err(error) = enlarge(entry, status, &before, size).await {
            // A VMM that has done it and not answered is observed once more.
            set_bytes(entry, &size.id, before.bytes);
            return Err(error);
        }
        self.save(entry)?;
        Ok(entry.view(&self.inner.config))
    }

    /// The disk as it is; what it is to have is taken from the host's room.
    fn promise(&self, entry: &Entry, size: &DiskSize) -> Result<Disk> {
        let entries = self.entries();
        let present: Vec<_> = entries.values().map(|entry| entry.record()).collect();
        let before = find(entry, &size.id)?;
        let more = if before.owned { size.bytes.saturating_sub(before.bytes) } else { 0 };
        self.inner.room.check_growth(&self.inner.config.host, more, &present, self.inner.partial.allocated_bytes())?;
        set_bytes(entry, &size.id, size.bytes.max(before.bytes));
        Ok(before)
    }

    /// Takes a disk from a stopped machine for good. Its image stays where it is and belongs to nobody from then on.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] if it is not stopped, [`MachineError::NoDisk`].
    pub async fn detach_disk(&self, name: &str, id: &str) -> Result<Disk> {
        let (turn, _) = Turn::take(self.get(name)?, Change::Detach)?;
        let entry = &turn.0;
        find(entry, id)?;
        end_process(entry).await;
        let (place, taken) = {
            let mut state = entry.state();
            let disks = &mut state.record.disks;
            let place = disks.iter().position(|disk| disk.id == id).unwrap_or(disks.len());
            (place, disks.splice(place..disks.len().min(place + 1), []).next())
        };
        let Some(taken) = taken else { return Err(no_disk(entry, id)) };
        if let Err(error) = self.save(entry) {
            entry.state().record.disks.insert(place, taken);
            return Err(error);
        }
        Ok(Disk { owned: false, ..taken })
    }
}

/// Takes over sizes that a VMM tells: a daemon that was killed between the growth of a disk and its record did not know them. True if
/// one was news. What was read before the disk grew is older than the record.
pub(super) fn observe_sizes(disks: &mut [Disk], told: &[DiskSize]) -> bool {
    let mut changed = false;
    for disk in disks {
        if let Some(size) = told.iter().find(|size| size.id == disk.id && size.bytes > disk.bytes) {
            (disk.bytes, changed) = (size.bytes, true);
        }
    }
    changed
}

async fn enlarge(entry: &Arc<Entry>, status: MachineStatus, disk: &Disk, size: &DiskSize) -> Result<()> {
    let bytes = size.bytes;
    if status != MachineStatus::Stopped {
        let size = size.clone();
        return call(entry, move |client| client.resize_disk(&size)).await.map(drop);
    }
    end_process(entry).await;
    let config = disk_config(disk);
    let work = move || vmm::disk::Image::open(&config, vmm::disk::Purpose::Use).and_then(|image| image.grow(bytes));
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(panic) => Err(MachineError::Invalid(format!("the disk could not be resized: {panic}"))),
    }
}

/// The process of a guest that turned itself off may still be there, and hold its images.
async fn end_process(entry: &Arc<Entry>) {
    if let Some(process) = entry.process() {
        stop(entry, &process).await;
    }
}

fn set_bytes(entry: &Entry, id: &str, bytes: u64) {
    if let Some(disk) = entry.state().record.disks.iter_mut().find(|disk| disk.id == id) {
        disk.bytes = bytes;
    }
}

fn find(entry: &Entry, id: &str) -> Result<Disk> {
    let found = entry.state().record.disks.iter().find(|disk| disk.id == id).cloned();
    found.ok_or_else(|| no_disk(entry, id))
}

fn no_disk(entry: &Entry, id: &str) -> MachineError {
    let record = entry.record();
    let there: Vec<&str> = record.disks.iter().map(|disk| disk.id.as_str()).collect();
    let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
    MachineError::NoDisk { name: record.name.clone(), id: id.escape_debug().to_string(), there }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_change_only_where_the_machine_stays() {
        use MachineStatus::{Creating, Deleting, InDoubt, Incoming, Migrating, Paused, Running, Stopped};
        for status in [Creating, Incoming, Running, Paused, Migrating, InDoubt, Stopped, Deleting] {
            let grows = matches!(status, Running | Paused | Stopped);
            assert_eq!(obstacle(Change::Grow, status, false).is_none(), grows, "{status:?}");
            assert_eq!(obstacle(Change::Detach, status, false).is_none(), status == Stopped, "{status:?}");
            assert!(obstacle(Change::Grow, status, true).is_some() && obstacle(Change::Detach, status, true).is_some());
        }
        assert!(obstacle(Change::Grow, Migrating, false).is_some_and(|words| words.contains("cancel it")));
        assert!(obstacle(Change::Detach, Running, false).is_some_and(|words| words.contains("turn itself off")));
    }

    #[test]
    fn a_size_that_was_told_is_taken_over_and_none_that_is_older() {
        let disk =
            Disk { id: "a".into(), path: "/x".into(), bytes: 4096, owned: true, read_only: false, shared: false };
        let mut disks = [disk.clone(), Disk { id: "b".into(), ..disk }];
        let told = |id: &str, bytes| DiskSize { id: id.into(), bytes };
        assert!(!observe_sizes(&mut disks, &[told("a", 4096), told("b", 512), told("c", 8192)]));
        assert!(observe_sizes(&mut disks, &[told("b", 8192)]));
        assert_eq!(disks.map(|disk| disk.bytes), [4096, 8192]);
    }
}
