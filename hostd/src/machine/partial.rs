//! Images of machines that did not come: the next attempt finds them here and sends only what is missing or has changed.
//!
//! They are no machine's, and a convenience: they go when their time is over, when somebody needs the room, and when a machine of
//! their name comes from elsewhere. Whatever they hold, the next attempt puts it right (see "Another attempt" in the protocol).

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{MachineRecord, disk};
use crate::api::types::Disk;
use crate::clock::unix_ms;

/// Says where the images beside it came from.
const ORIGIN: &str = "origin.json";
/// Longest note that is read.
const ORIGIN_MAX_BYTES: u64 = 4096;

/// Where they are kept, a folder for each machine.
#[derive(Clone, Debug)]
pub struct Partial {
    folder: PathBuf,
    /// For how long.
    keep_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Origin {
    source: String,
    since_unix_ms: u64,
}

impl Partial {
    /// Below `folder`; `keep_s` 0 keeps nothing.
    pub fn new(folder: PathBuf, keep_s: u64) -> Self {
        Self { folder, keep_ms: keep_s.saturating_mul(1000) }
    }

    /// Takes over the images that were made for a machine from host `source`, if there is anything in them and the file system is
    /// not nearly full. Errors are logged: then there is nothing to reuse.
    pub fn keep(&self, record: &MachineRecord, source: &str) {
        let owned: Vec<Disk> = record.disks.iter().filter(|disk| disk.owned).cloned().collect();
        if self.keep_ms == 0 || disk::allocated_bytes(&owned) == 0 || nearly_full(&self.folder) {
            return;
        }
        self.forget(&record.name);
        let folder = self.folder.join(&record.name);
        let moved = || -> io::Result<()> {
            disk::private_folder(&folder)?;
            let origin = Origin { source: source.to_owned(), since_unix_ms: unix_ms() };
            std::fs::write(folder.join(ORIGIN), serde_json::to_vec(&origin)?)?;
            owned.iter().try_for_each(|disk| std::fs::rename(&disk.path, image(&folder, &disk.id)))
        };
        match moved() {
            Ok(()) => tracing::info!(
                machine = record.name,
                source,
                "what has arrived of its disks is kept for another attempt"
            ),
            Err(error) => {
                tracing::warn!(machine = record.name, %error, "what has arrived of its disks could not be kept");
                self.forget(&record.name);
            }
        }
    }

    /// Gives the images kept of this machine to it, and returns the ids of its disks that have one now. What does not fit is removed.
    pub fn hand_over(&self, record: &MachineRecord, source: &str) -> BTreeSet<String> {
        let mut given = BTreeSet::new();
        for (disk, path) in self.usable(record, source) {
            match std::fs::rename(&path, &disk.path) {
                Ok(()) => drop(given.insert(disk.id.clone())),
                Err(error) => tracing::warn!(path = %path.display(), %error, "a kept image cannot be used again"),
            }
        }
        self.forget(&record.name);
        given
    }

    /// Bytes on the file system that this machine will not need any more, since an image of it is kept.
    pub fn reusable_bytes(&self, record: &MachineRecord, source: &str) -> u64 {
        self.usable(record, source).map(|(_, path)| allocated(&path)).sum()
    }

    fn usable<'a>(
        &self,
        record: &'a MachineRecord,
        source: &str,
    ) -> impl Iterator<Item = (&'a Disk, PathBuf)> + use<'a> {
        let folder = self.folder.join(&record.name);
        let same = origin(&folder).is_some_and(|origin| origin.source == source);
        record.disks.iter().filter(move |disk| same && disk.owned).filter_map(move |disk| {
            let path = image(&folder, &disk.id);
            let status = path.symlink_metadata().ok()?;
            (status.is_file() && status.len() == disk.bytes).then_some((disk, path))
        })
    }

    /// What all of it takes of the file system, in bytes.
    pub fn allocated_bytes(&self) -> u64 {
        let images = self.machines().into_iter().flat_map(|name| std::fs::read_dir(self.folder.join(name)).ok());
        images.flatten().flatten().map(|entry| allocated(&entry.path())).sum()
    }

    /// Removes all but those of `machine`: somebody needs the room.
    pub fn make_room(&self, machine: &str) {
        for name in self.machines().iter().filter(|name| *name != machine) {
            tracing::info!(machine = name, "its kept images are removed to make room");
            self.forget(name);
        }
    }

    /// Removes those whose time is over.
    pub fn expire(&self, now_unix_ms: u64) {
        for name in self.machines() {
            let since = origin(&self.folder.join(&name)).map_or(0, |origin| origin.since_unix_ms);
            // A clock that was set back keeps nothing for ever.
            if now_unix_ms.abs_diff(since) >= self.keep_ms {
                self.forget(&name);
            }
        }
    }

    /// Removes those of one machine.
    pub fn forget(&self, machine: &str) {
        match std::fs::remove_dir_all(self.folder.join(machine)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(machine, %error, "kept images could not be removed");
            }
            _ => {}
        }
    }

    fn machines(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }
}

fn image(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}.raw"))
}

fn origin(folder: &Path) -> Option<Origin> {
    let path = folder.join(ORIGIN);
    let short = path.metadata().is_ok_and(|status| status.len() <= ORIGIN_MAX_BYTES);
    short.then(|| std::fs::read(&path).ok()).flatten().and_then(|bytes| serde_json::from_slice(&bytes).ok())
}

fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    // In blocks of 512 bytes, whatever the file system's are (stat(2)).
    path.symlink_metadata().map_or(0, |status| status.blocks().saturating_mul(512))
}

/// Less than a twentieth is free: nothing is kept that nobody has asked for.
fn nearly_full(folder: &Path) -> bool {
    let status = folder.ancestors().find_map(|folder| nix::sys::statvfs::statvfs(folder).ok());
    status.is_none_or(|status| status.blocks_available() < status.blocks() / 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::room::tests::record;

    fn images(folder: &Path) -> (Partial, MachineRecord) {
        let own = |id: &str, owned| Disk {
            id: id.into(),
            path: folder.join(format!("{id}.raw")),
            bytes: 1 << 20,
            owned,
            read_only: false,
            shared: false,
        };
        let record = MachineRecord {
            disks: vec![own("a", true), own("b", true), own("c", false)],
            name: "vm1".into(),
            ..record(1, 1)
        };
        for disk in &record.disks {
            std::fs::write(&disk.path, vec![7; 1 << 20]).unwrap();
        }
        (Partial::new(folder.join("partial"), 60), record)
    }

    fn there(record: &MachineRecord) -> Vec<bool> {
        record.disks.iter().map(|disk| disk.path.exists()).collect()
    }

    #[test]
    fn images_come_back_to_the_same_machine_from_the_same_host() {
        let folder = tempfile::tempdir().unwrap();
        let (partial, record) = images(folder.path());
        partial.keep(&record, "a1");
        assert_eq!(there(&record), [false, false, true], "an image that is not ours is not touched");
        assert_eq!(partial.allocated_bytes() >> 20, 2);
        assert_eq!(partial.reusable_bytes(&record, "a1"), 2 << 20);
        assert_eq!(partial.reusable_bytes(&record, "a2"), 0);
        let given = partial.hand_over(&record, "a1");
        assert_eq!(given, BTreeSet::from(["a".to_owned(), "b".to_owned()]));
        assert_eq!((there(&record), partial.allocated_bytes()), (vec![true; 3], 0));
    }

    #[test]
    fn what_does_not_fit_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (partial, mut record) = images(folder.path());
        partial.keep(&record, "a1");
        record.disks[0].bytes += 512;
        assert_eq!(partial.hand_over(&record, "a1"), BTreeSet::from(["b".to_owned()]));
        assert_eq!((there(&record), partial.allocated_bytes()), (vec![false, true, true], 0));
        let (_, record) = images(folder.path());
        partial.keep(&record, "a1");
        assert!(partial.hand_over(&record, "a2").is_empty(), "another host's machine of that name");
        assert_eq!((there(&record)[1], partial.allocated_bytes()), (false, 0));
    }

    #[test]
    fn they_go_in_time_and_when_room_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let (partial, record) = images(folder.path());
        partial.keep(&record, "a1");
        partial.expire(unix_ms() + 30_000);
        partial.make_room("vm1");
        assert!(partial.allocated_bytes() > 0);
        partial.make_room("vm2");
        assert_eq!(partial.allocated_bytes(), 0);
        let (_, record) = images(folder.path());
        partial.keep(&record, "a1");
        partial.expire(unix_ms() + 61_000);
        assert_eq!(partial.allocated_bytes(), 0);
        let (_, record) = images(folder.path());
        Partial::new(folder.path().join("partial"), 0).keep(&record, "a1");
        assert_eq!(there(&record), [true; 3], "the operator wants nothing kept");
    }

    #[test]
    fn a_damaged_note_is_as_good_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let (partial, record) = images(folder.path());
        for note in [&b"{"[..], &[b' '; 5000]] {
            partial.keep(&record, "a1");
            std::fs::write(folder.path().join("partial/vm1").join(ORIGIN), note).unwrap();
            assert!(partial.hand_over(&record, "a1").is_empty());
            images(folder.path());
        }
    }
}
