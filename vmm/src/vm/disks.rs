//! The disks of a machine: which of them a migration copies, who holds those on shared storage, and their size.

use std::sync::Arc;
use std::time::Duration;

use super::{Machine, MachineError, lock};
use crate::api::{DiskSize, MachineState};
use crate::disk::RawDisk;

impl Machine {
    /// Its disks.
    pub fn disks(&self) -> &[Arc<RawDisk>] {
        &self.parts.disks
    }

    /// Those that a migration copies.
    pub fn moving_disks(&self) -> impl Iterator<Item = &Arc<RawDisk>> {
        self.disks().iter().filter(|disk| !disk.image().is_shared())
    }

    /// Takes over its disks on shared storage, all of them or none; waits up to `patience` for whoever has one.
    ///
    /// # Errors
    ///
    /// [`MachineError::Disk`] if one is in use.
    pub fn take_over_disks(&self, patience: Duration) -> Result<(), MachineError> {
        let taken = self.disks().iter().try_for_each(|disk| disk.image().take_over(patience));
        taken.inspect_err(|_| drop(self.hand_over_disks())).map_err(MachineError::from)
    }

    /// Leaves its disks on shared storage to another host; it is paused.
    ///
    /// # Errors
    ///
    /// [`MachineError::Disk`] if one cannot be flushed or unlocked.
    pub fn hand_over_disks(&self) -> Result<(), MachineError> {
        Ok(self.disks().iter().try_for_each(|disk| disk.image().hand_over())?)
    }

    /// How large its disks are.
    pub fn disk_sizes(&self) -> Vec<DiskSize> {
        let size = |disk: &Arc<RawDisk>| DiskSize { id: disk.image().id().to_owned(), bytes: disk.image().bytes() };
        self.disks().iter().map(size).collect()
    }

    /// Makes one of its disks larger; its guest is told.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] if it neither runs nor is paused, [`MachineError::NoDisk`], or [`MachineError::Disk`] if the disk
    /// cannot have that size.
    pub fn grow_disk(&self, id: &str, bytes: u64) -> Result<(), MachineError> {
        let _transition = lock(&self.transition);
        match self.state() {
            MachineState::Running | MachineState::Paused => {}
            state => return Err(MachineError::State { state, action: "given a larger disk", remedy: "" }),
        }
        match self.devices().blocks.iter().find(|block| block.disk().image().id() == id) {
            Some(block) => Ok(block.grow(bytes)?),
            None => {
                let there: Vec<&str> = self.disks().iter().map(|disk| disk.image().id()).collect();
                let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
                Err(MachineError::NoDisk { id: id.to_owned(), there })
            }
        }
    }
}
