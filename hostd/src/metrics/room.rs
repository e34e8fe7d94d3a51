//! Whether another machine fits: memory is never promised twice, disk space must be there, processors may be shared.

use std::path::{Path, PathBuf};

use crate::api::types::{Capacity, Disk, MachineStatus};
use crate::machine::{MachineError, MachineRecord};

/// What this host can promise.
#[derive(Clone, Debug)]
pub struct Room {
    capacity: Capacity,
    disk_space_mib: Option<f64>,
    images: PathBuf,
}

/// Images of machines that did not come (see [`crate::machine::partial`]).
#[derive(Clone, Copy, Debug, Default)]
pub struct Kept {
    /// What all of them take of the file system.
    pub bytes: u64,
    /// What the machine in question finds of itself among them.
    pub reusable: u64,
}

impl Room {
    /// What [`MachineError::NoRoom`] calls the room for images.
    pub const DISK_SPACE: &str = "disk space";

    /// Of a host with this capacity; `disk_space_mib` where the operator set a limit, `images` where disk images are kept.
    pub fn new(capacity: Capacity, disk_space_mib: Option<f64>, images: PathBuf) -> Self {
        Self { capacity, disk_space_mib, images }
    }

    /// The capacity.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Whether `new` fits beside `present`.
    ///
    /// # Errors
    ///
    /// [`MachineError::NoRoom`] says what is short, and by how much.
    pub fn check(
        &self,
        host: &str,
        new: &MachineRecord,
        present: &[MachineRecord],
        kept: Kept,
    ) -> Result<(), MachineError> {
        let used: u64 = present.iter().map(|record| record.memory_mib).sum();
        let free = self.capacity.memory_mib - used as f64;
        if new.memory_mib as f64 > free {
            return Err(MachineError::NoRoom {
                host: host.to_owned(),
                what: "memory",
                needed: format!("{} MiB", new.memory_mib),
                free: format!("{:.0}", free.max(0.0)),
                capacity: format!("{:.0} MiB", self.capacity.memory_mib),
            });
        }
        self.check_disk(host, owned_mib(new) - mib(kept.reusable), present, kept.bytes)
    }

    /// Whether images of `present`, machines of this host, may have `more` bytes; `kept` bytes are kept of machines that did not come.
    ///
    /// # Errors
    ///
    /// As [`Room::check`].
    pub fn check_growth(
        &self,
        host: &str,
        more: u64,
        present: &[MachineRecord],
        kept: u64,
    ) -> Result<(), MachineError> {
        self.check_disk(host, mib(more), present, kept)
    }

    fn check_disk(&self, host: &str, needed: f64, present: &[MachineRecord], kept: u64) -> Result<(), MachineError> {
        let (free, capacity) = match self.disk_space_mib {
            Some(limit) => (limit - present.iter().map(owned_mib).sum::<f64>() - mib(kept), limit),
            None => match file_system_mib(&self.images) {
                Some((free, capacity)) => (free - present.iter().map(promised_mib).sum::<f64>(), capacity),
                None => return Ok(()),
            },
        };
        if needed <= free.max(0.0) {
            return Ok(());
        }
        Err(MachineError::NoRoom {
            host: host.to_owned(),
            what: Self::DISK_SPACE,
            needed: format!("{needed:.0} MiB"),
            free: format!("{:.0}", free.max(0.0)),
            capacity: format!("{capacity:.0} MiB"),
        })
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What the images that this host made for a machine have together.
fn owned_mib(record: &MachineRecord) -> f64 {
    mib(record.disks.iter().filter(|disk| disk.owned).map(|disk| disk.bytes).sum())
}

/// What a machine that is arriving, or being made, will still fill of its images: they are sparse, and the file system counts what
/// is not written yet as free.
fn promised_mib(record: &MachineRecord) -> f64 {
    use std::os::unix::fs::MetadataExt;
    if !matches!(record.status, MachineStatus::Incoming | MachineStatus::Creating) {
        return 0.0;
    }
    let unwritten = |disk: &Disk| {
        // In blocks of 512 bytes, whatever the file system's are (stat(2)).
        let written = disk.path.metadata().map_or(0, |metadata| metadata.blocks().saturating_mul(512));
        disk.bytes.saturating_sub(written)
    };
    record.disks.iter().filter(|disk| disk.owned).map(unwritten).sum::<u64>() as f64 / f64::from(1 << 20)
}

/// What the file system of `folder`, or of what is there of its path, has free and has in all.
fn file_system_mib(folder: &Path) -> Option<(f64, f64)> {
    let status = folder.ancestors().find_map(|folder| nix::sys::statvfs::statvfs(folder).ok())?;
    let mib = |blocks: u64| blocks as f64 * status.fragment_size() as f64 / f64::from(1 << 20);
    Some((mib(status.blocks_available()), mib(status.blocks())))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::api::types::{KernelChoice, MigrationLimits};

    pub(crate) fn record(memory_mib: u64, disk_mib: u64) -> MachineRecord {
        MachineRecord {
            name: "vm".into(),
            vcpus: 1,
            memory_mib,
            kernel: KernelChoice::Bundled,
            initrd: None,
            cmdline: String::new(),
            disks: vec![Disk {
                id: "d".into(),
                path: "/x".into(),
                bytes: disk_mib << 20,
                owned: true,
                read_only: false,
                shared: false,
            }],
            networks: Vec::new(),
            balloon: false,
            probes: Vec::new(),
            limits: MigrationLimits::default(),
            created_unix_ms: 0,
            status: MachineStatus::Running,
            process: None,
            migration: None,
            arrived: false,
            why_stopped: None,
            incomplete: false,
        }
    }

    #[test]
    fn memory_and_disk_are_never_promised_twice() {
        let capacity = Capacity { cpu_cores: 1.0, memory_mib: 1000.0, ..Capacity::default() };
        let room = Room::new(capacity, Some(100.0), "/".into());
        let present = [record(600, 60)];
        room.check("a1", &record(400, 40), &present, Kept::default()).unwrap();
        let memory = room.check("a1", &record(401, 1), &present, Kept::default()).unwrap_err().to_string();
        assert_eq!(memory, "no room on host `a1`: memory needs 401 MiB, and 400 of 1000 MiB are free");
        let disk = room.check("a1", &record(1, 41), &present, Kept::default()).unwrap_err().to_string();
        assert_eq!(disk, "no room on host `a1`: disk space needs 41 MiB, and 40 of 100 MiB are free");
    }

    #[test]
    fn a_disk_grows_as_far_as_there_is_room() {
        let room = Room::new(Capacity { memory_mib: 1000.0, ..Capacity::default() }, Some(100.0), "/".into());
        let present = [record(1, 60)];
        room.check_growth("a1", 30 << 20, &present, 10 << 20).unwrap();
        let refused = room.check_growth("a1", 31 << 20, &present, 10 << 20).unwrap_err().to_string();
        assert_eq!(refused, "no room on host `a1`: disk space needs 31 MiB, and 30 of 100 MiB are free");
    }

    #[test]
    fn what_is_kept_for_another_attempt_takes_room_and_spares_it() {
        let room = Room::new(Capacity { memory_mib: 1000.0, ..Capacity::default() }, Some(100.0), "/".into());
        let kept = Kept { bytes: 50 << 20, reusable: 0 };
        room.check("a1", &record(1, 50), &[], kept).unwrap();
        assert!(room.check("a1", &record(1, 51), &[], kept).is_err());
        room.check("a1", &record(1, 80), &[], Kept { reusable: 30 << 20, ..kept }).unwrap();
    }

    #[test]
    fn what_an_arriving_machine_will_fill_is_not_free() {
        let folder = tempfile::tempdir().unwrap();
        let (free, _) = file_system_mib(folder.path()).unwrap();
        let share = (free * 0.6) as u64;
        let room = Room::new(Capacity { memory_mib: 1000.0, ..Capacity::default() }, None, folder.path().into());
        let mut arriving = record(1, share);
        arriving.disks[0].path = folder.path().join("d.raw");
        arriving.status = MachineStatus::Incoming;
        let second = record(1, share);
        let refused =
            room.check("a1", &second, std::slice::from_ref(&arriving), Kept::default()).unwrap_err().to_string();
        assert!(refused.starts_with("no room on host `a1`: disk space needs"), "its image is not made yet: {refused}");
        std::fs::File::create(&arriving.disks[0].path).unwrap().set_len(share << 20).unwrap();
        assert!(room.check("a1", &second, std::slice::from_ref(&arriving), Kept::default()).is_err(), "it is sparse");
        arriving.status = MachineStatus::Running;
        room.check("a1", &second, &[arriving], Kept::default()).unwrap();
    }
}
