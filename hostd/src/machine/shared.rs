//! Disks on storage that several hosts have: a migration hands them over instead of copying them.
//!
//! That the destination has the same file, and not another one under the same path, is shown and not believed: the source puts a
//! mark beside the image, which only this migration knows, and the destination has to find it. Of a block device both compare what
//! their kernels call it ([`super::device`]). And no source can make a host open any file it likes: shared images lie below folders
//! that the host's own configuration names.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::device::Identity;
use super::{MachineError, MachineRecord};
use crate::api::types::Disk;

/// Where device nodes are, and links to them that only root can make.
const DEVICES: &str = "/dev";

/// Whether `path` is a regular file below one of `folders`, wherever links lead; or a block device that has its name, which may be a
/// link, in one of them that lies in `/dev`.
///
/// # Errors
///
/// [`MachineError::NotShared`] with the remedy.
pub fn allowed(id: &str, path: &Path, folders: &[PathBuf]) -> Result<(), MachineError> {
    let refused =
        |what: &str| MachineError::NotShared { id: id.to_owned(), path: path.to_owned(), what: what.to_owned() };
    let real = path.canonicalize().map_err(|error| {
        refused(&format!("cannot be found ({error}): mount the storage under the same path on every host"))
    })?;
    let is_device = real.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
    // The name of a volume leads to a node elsewhere: /dev/mapper/vm1 to /dev/dm-3.
    let place = if is_device { folder_of(path) } else { Some(real.clone()) };
    let below = |folder: &PathBuf| match (folder.canonicalize(), &place) {
        // Not further below: /dev has folders in which everybody may make links.
        (Ok(folder), Some(place)) if is_device => *place == folder && folder.starts_with(DEVICES),
        (Ok(folder), Some(place)) => place.starts_with(folder),
        _ => false,
    };
    if !folders.iter().any(below) {
        return Err(refused(if is_device {
            "is not in one of its `shared_dirs` in /dev: name the folder, for example /dev/mapper, in the configuration of every host that has it"
        } else {
            "is not below one of its `shared_dirs`: name the folder in the configuration of every host that has it"
        }));
    }
    if !is_device && !real.is_file() {
        return Err(refused("is neither a regular file nor a block device: other images cannot be shared"));
    }
    Ok(())
}

/// The folder that has the last part of `path`, wherever links lead to it.
fn folder_of(path: &Path) -> Option<PathBuf> {
    path.file_name()?;
    path.parent()?.canonicalize().ok()
}

/// What shows the destination which shared disks a machine has. Marks beside images are removed when this is dropped.
#[derive(Debug, Default)]
pub struct Marks {
    paths: Vec<PathBuf>,
    /// What it has to find.
    pub proof: Proof,
}

/// By disk, how a destination recognises it; each is in one of the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Images: what stands in the mark beside it.
    #[serde(default)]
    pub shared_marks: BTreeMap<String, String>,
    /// Block devices: which one it is.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub shared_devices: BTreeMap<String, Identity>,
}

impl Marks {
    /// Puts them there for migration `id`, each with a token of its own out of `token`.
    ///
    /// # Errors
    ///
    /// [`MachineError::Disk`] if one cannot be written, or a device cannot be examined.
    pub fn put(
        record: &MachineRecord,
        id: &str,
        mut token: impl FnMut() -> std::io::Result<String>,
    ) -> Result<Self, MachineError> {
        let mut marks = Self::default();
        for disk in record.disks.iter().filter(|disk| disk.shared) {
            let examined = Identity::read(&disk.path).map_err(|source| MachineError::Disk {
                id: disk.id.clone(),
                action: "examine",
                path: disk.path.clone(),
                source,
            })?;
            if let Some(identity) = examined {
                marks.proof.shared_devices.insert(disk.id.clone(), identity);
                continue;
            }
            let path = mark(disk, id);
            let mut write = || {
                let token = token()?;
                // Left over by a daemon that was killed: the name has the migration's id, so that nobody else's is overwritten.
                let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
                marks.paths.push(path.clone());
                file.write_all(token.as_bytes())?;
                // Another host reads it.
                file.sync_all()?;
                marks.proof.shared_marks.insert(disk.id.clone(), token);
                Ok(())
            };
            let failed = |source| MachineError::Disk {
                id: disk.id.clone(),
                action: "put a mark beside",
                path: path.clone(),
                source,
            };
            write().map_err(failed)?;
        }
        Ok(marks)
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "a mark beside a shared image could not be removed");
            }
        }
    }
}

/// Whether this host has the shared disks of a machine that is to arrive by migration `id`.
///
/// # Errors
///
/// [`MachineError::NotShared`] with the remedy.
pub fn check(record: &MachineRecord, id: &str, proof: &Proof, folders: &[PathBuf]) -> Result<(), MachineError> {
    for disk in record.disks.iter().filter(|disk| disk.shared) {
        allowed(&disk.id, &disk.path, folders)?;
        if let Some(what) = obstacle(disk, id, proof) {
            return Err(MachineError::NotShared { id: disk.id.clone(), path: disk.path.clone(), what });
        }
    }
    Ok(())
}

/// Why a disk here is not the one of the source, and what to do.
fn obstacle(disk: &Disk, id: &str, proof: &Proof) -> Option<String> {
    match (Identity::read(&disk.path), proof.shared_devices.get(&disk.id)) {
        (Err(error), _) => Some(format!("cannot be examined: {error}")),
        (Ok(Some(here)), Some(there)) => there.differs(&here),
        (Ok(here), there) if here.is_some() || there.is_some() => {
            Some("is a block device on one host only: give both the same path for the same volume".to_owned())
        }
        (Ok(_), _) => {
            let token = proof.shared_marks.get(&disk.id).filter(|token| !token.is_empty());
            let found = token.is_some_and(|token| read(&mark(disk, id), token.len()).as_ref() == Some(token));
            (!found).then(|| {
                "is not the file that the source has: mount the same storage under this path on both hosts, or create the machine without `shared`"
                    .to_owned()
            })
        }
    }
}

fn mark(disk: &Disk, id: &str) -> PathBuf {
    let mut name = disk.path.as_os_str().to_owned();
    name.push(format!(".{id}.headroom"));
    name.into()
}

fn read(path: &Path, length: usize) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(length as u64 + 1).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::room::tests::record;

    fn machine(path: &Path) -> MachineRecord {
        let disk =
            |shared| Disk { id: "d".into(), path: path.into(), bytes: 4096, owned: false, read_only: false, shared };
        MachineRecord { disks: vec![disk(true), Disk { id: "own".into(), ..disk(false) }], ..record(1, 1) }
    }

    fn words(result: Result<(), MachineError>) -> String {
        result.expect_err("refused").to_string()
    }

    #[test]
    fn the_same_file_is_recognised_and_its_mark_goes() {
        let storage = tempfile::tempdir().unwrap();
        let (image, other) = (storage.path().join("a.raw"), tempfile::tempdir().unwrap());
        std::fs::write(&image, [0; 4096]).unwrap();
        let (record, folders) = (machine(&image), [storage.path().to_owned()]);
        let mut number = 0;
        let mut token = || {
            number += 1;
            Ok(format!("token-{number}"))
        };
        let marks = Marks::put(&record, "mig-1", &mut token).unwrap();
        assert_eq!(marks.proof.shared_marks.len(), 1, "only the shared one");
        check(&record, "mig-1", &marks.proof, &folders).unwrap();
        assert!(words(check(&record, "mig-2", &marks.proof, &folders)).contains("is not the file that the source has"));
        let guessed = BTreeMap::from([("d".to_owned(), "token".to_owned())]);
        let guessed = Proof { shared_marks: guessed, ..Proof::default() };
        assert!(words(check(&record, "mig-1", &guessed, &folders)).contains("is not the file"));
        assert!(words(check(&record, "mig-1", &Proof::default(), &folders)).contains("is not the file"));
        assert!(words(check(&record, "mig-1", &marks.proof, &[])).contains("shared_dirs"));
        let device = Identity { bytes: 4096, name: None, kernel: "k".into(), number: "7:0".into() };
        let device = Proof { shared_devices: [("d".to_owned(), device)].into(), ..marks.proof.clone() };
        assert!(words(check(&record, "mig-1", &device, &folders)).contains("on one host only"));
        // Another file under the same name, as on a host that has not mounted the storage.
        let elsewhere = other.path().join("a.raw");
        std::fs::write(&elsewhere, [0; 4096]).unwrap();
        let folders = [storage.path().to_owned(), other.path().to_owned()];
        assert!(words(check(&machine(&elsewhere), "mig-1", &marks.proof, &folders)).contains("is not the file"));
        drop(marks);
        assert_eq!(std::fs::read_dir(storage.path()).unwrap().count(), 1, "the mark is gone");
    }

    #[test]
    fn nothing_outside_of_the_folders_can_be_named() {
        let (storage, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let secret = outside.path().join("secret");
        std::fs::write(&secret, "x").unwrap();
        std::os::unix::fs::symlink(&secret, storage.path().join("link")).unwrap();
        let folders = [storage.path().to_owned()];
        let refused = |path: &Path| words(allowed("d", path, &folders));
        assert!(refused(&secret).contains("shared_dirs"));
        assert!(refused(&storage.path().join("link")).contains("shared_dirs"));
        let name = outside.path().file_name().unwrap();
        assert!(refused(&storage.path().join("..").join(name).join("secret")).contains("shared_dirs"));
        assert!(refused(&storage.path().join("none")).contains("mount the storage"));
        std::fs::create_dir(storage.path().join("folder")).unwrap();
        assert!(refused(&storage.path().join("folder")).contains("neither a regular file"));
    }
}
