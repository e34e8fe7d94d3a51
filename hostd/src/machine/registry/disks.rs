//! Disks of a machine that is there: made larger while it runs or is stopped, added and taken away while it is stopped.
//!
//! Neither happens while the machine moves, and no move begins meanwhile: source and destination must mean the same disks.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::life::end_process;
use super::turn::Turn;
use super::{Entry, Machines, Result, call};
use crate::api::types::{Disk, DiskSize, Machine, MachineStatus, NewDisk};
use crate::machine::launch::disk_config;
use crate::machine::{MachineError, disk, spec};

/// What is done to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Grow,
    Attach,
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
        (MachineStatus::Running | MachineStatus::Paused, Change::Attach | Change::Detach) => Some(
            "stop it first (`headroom machine stop`): a guest with virtio over MMIO cannot be told that a device comes or goes",
        ),
        _ if changing => Some("it is being changed: try again in a moment"),
        (MachineStatus::Running | MachineStatus::Paused | MachineStatus::Stopped, _) => None,
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
        let (turn, status) = Turn::take(self.get(name)?, |status, changing| obstacle(Change::Grow, status, changing))?;
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

    /// Gives a stopped machine another disk, the last one in the order in which its guest sees them.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] if it is not stopped, [`MachineError::NoRoom`], or if there is no such image, or one where the new one
    /// is to be; it has the disks that it had then.
    pub async fn attach_disk(&self, name: &str, new: &NewDisk) -> Result<Machine> {
        let (turn, _) = Turn::take(self.get(name)?, |status, changing| obstacle(Change::Attach, status, changing))?;
        let entry = &turn.0;
        spec::another_disk(new, &entry.record().disks)?;
        let config = &self.inner.config;
        let folder = config.machine_state_dir(name);
        let planned = disk::plan(&folder, std::slice::from_ref(new), &config.shared_dirs)?;
        disk::check_absent(&planned)?;
        self.promise_new(entry, &planned)?;
        // The image before the record: a file too many is told by its name, and a record of an image that is not there could not start.
        let made = disk::create(&folder, &planned, &BTreeSet::new());
        if let Err(error) = made.and_then(|()| self.save(entry).inspect_err(|_| disk::remove(&planned))) {
            entry.state().record.disks.pop();
            return Err(error);
        }
        Ok(entry.view(config))
    }

    /// Enters new disks; what they are to have is taken from the host's room.
    fn promise_new(&self, entry: &Entry, planned: &[Disk]) -> Result<()> {
        let entries = self.entries();
        let present: Vec<_> = entries.values().map(|entry| entry.record()).collect();
        let more = planned.iter().filter(|disk| disk.owned).map(|disk| disk.bytes).sum();
        self.inner.room.check_growth(&self.inner.config.host, more, &present, self.inner.partial.allocated_bytes())?;
        entry.state().record.disks.extend_from_slice(planned);
        Ok(())
    }

    /// Takes a disk from a stopped machine for good. Its image stays where it is and belongs to nobody from then on.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] if it is not stopped, [`MachineError::NoDisk`].
    pub async fn detach_disk(&self, name: &str, id: &str) -> Result<Disk> {
        let (turn, _) = Turn::take(self.get(name)?, |status, changing| obstacle(Change::Detach, status, changing))?;
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
            assert_eq!(obstacle(Change::Attach, status, false), obstacle(Change::Detach, status, false), "{status:?}");
            assert!(obstacle(Change::Grow, status, true).is_some() && obstacle(Change::Detach, status, true).is_some());
        }
        assert!(obstacle(Change::Grow, Migrating, false).is_some_and(|words| words.contains("cancel it")));
        assert!(obstacle(Change::Detach, Running, false).is_some_and(|words| words.contains("machine stop")));
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
