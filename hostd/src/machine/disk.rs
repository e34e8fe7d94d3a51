//! Disk images: sparse files in the machine's folder, or images that somebody else made.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{MachineError, shared};
use crate::api::types::{Disk, NewDisk};

/// Says where the disks of a new machine are to be, and finds out how large existing images are. Makes nothing.
///
/// # Errors
///
/// If an image is missing or is neither a file nor a block device, or is shared and not below one of `shared_dirs`.
pub fn plan(folder: &Path, disks: &[NewDisk], shared_dirs: &[PathBuf]) -> Result<Vec<Disk>, MachineError> {
    disks.iter().map(|disk| plan_one(folder, disk, shared_dirs)).collect()
}

fn plan_one(folder: &Path, disk: &NewDisk, shared_dirs: &[PathBuf]) -> Result<Disk, MachineError> {
    if let (Some(path), true) = (&disk.path, disk.shared) {
        shared::allowed(&disk.id, path, shared_dirs)?;
    }
    let (path, bytes, owned) = match (&disk.path, disk.size_mib) {
        (Some(path), _) => (path.clone(), existing_bytes(&disk.id, path, disk.read_only)?, false),
        (None, size) => (folder.join(format!("{}.raw", disk.id)), size.unwrap_or(0) << 20, true),
    };
    Ok(Disk { id: disk.id.clone(), path, bytes, owned, read_only: disk.read_only, shared: disk.shared })
}

fn existing_bytes(id: &str, path: &Path, read_only: bool) -> Result<u64, MachineError> {
    use std::io::{Seek, SeekFrom};
    let failed = |action| move |source| MachineError::Disk { id: id.to_owned(), action, path: path.to_owned(), source };
    // Opened as the VMM will: a missing or unwritable image is told now and not by a process that ends at once.
    let mut file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed(if read_only {
        "open"
    } else {
        "open for writing"
    }))?;
    let kind = file.metadata().map_err(failed("examine"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let wrong = std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is neither a file nor a block device");
        return Err(failed("use")(wrong));
    }
    file.seek(SeekFrom::End(0)).map_err(failed("measure"))
}

/// What is allocated of images that a migration copies, in bytes: holes of files count nothing, a block device counts in full.
pub fn allocated_bytes(disks: &[Disk]) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let one = |disk: &Disk| match std::fs::metadata(&disk.path) {
        // In blocks of 512 bytes, whatever the file system's are (stat(2)).
        Ok(metadata) if metadata.is_file() => metadata.blocks().saturating_mul(512).min(disk.bytes),
        _ => disk.bytes,
    };
    disks.iter().filter(|disk| !disk.shared).map(one).sum()
}

/// Whether none of the images that are to be made is there already, left over or somebody else's.
///
/// # Errors
///
/// If one is: it is not touched.
pub fn check_absent(disks: &[Disk]) -> Result<(), MachineError> {
    match disks.iter().find(|disk| disk.owned && disk.path.symlink_metadata().is_ok()) {
        None => Ok(()),
        Some(disk) => Err(MachineError::Disk {
            id: disk.id.clone(),
            action: "make",
            path: disk.path.clone(),
            source: std::io::ErrorKind::AlreadyExists.into(),
        }),
    }
}

/// Makes the owned images of `disks` other than `there`, sparse, readable by their owner only. Whatever was made is removed on failure.
///
/// # Errors
///
/// If an image exists already or the disk is full.
pub fn create(folder: &Path, disks: &[Disk], there: &BTreeSet<String>) -> Result<(), MachineError> {
    make_folder(folder)?;
    let mut made: Vec<&Path> = Vec::new();
    for disk in disks.iter().filter(|disk| disk.owned && !there.contains(&disk.id)) {
        if let Err(error) = create_one(disk) {
            remove_all(&made);
            return Err(error);
        }
        made.push(&disk.path);
    }
    Ok(())
}

fn create_one(disk: &Disk) -> Result<(), MachineError> {
    let failed =
        |action| move |source| MachineError::Disk { id: disk.id.clone(), action, path: disk.path.clone(), source };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&disk.path)
        .map_err(failed("make"))?;
    file.set_len(disk.bytes).map_err(|source| {
        remove_all(&[&disk.path]);
        failed("give its size to")(source)
    })
}

/// Makes a folder for one machine, mode 0700.
///
/// # Errors
///
/// If it cannot be made.
pub fn make_folder(folder: &Path) -> Result<(), MachineError> {
    private_folder(folder).map_err(|source| MachineError::File {
        action: "make the folder",
        path: folder.to_owned(),
        source,
    })
}

/// As [`make_folder`], and says only why not.
///
/// # Errors
///
/// If it cannot be made.
pub fn private_folder(folder: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Removes the owned images of `disks`.
pub fn remove(disks: &[Disk]) {
    let owned: Vec<PathBuf> = disks.iter().filter(|disk| disk.owned).map(|disk| disk.path.clone()).collect();
    remove_all(&owned);
}

fn remove_all(paths: &[impl AsRef<Path>]) {
    for path in paths {
        let path = path.as_ref();
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "a disk image could not be removed");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn new(id: &str, size_mib: Option<u64>, path: Option<PathBuf>) -> NewDisk {
        NewDisk { id: id.into(), size_mib, path, read_only: false, shared: false }
    }

    #[test]
    fn owned_images_are_sparse_and_go_with_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let existing = folder.path().join("existing.raw");
        std::fs::write(&existing, [1; 4096]).unwrap();
        let machine = folder.path().join("vm1");
        let disks = plan(&machine, &[new("a", Some(64), None), new("b", None, Some(existing.clone()))], &[]).unwrap();
        create(&machine, &disks, &BTreeSet::new()).unwrap();
        let metadata = std::fs::metadata(&disks[0].path).unwrap();
        assert_eq!((metadata.len(), metadata.blocks(), metadata.mode() & 0o777), (64 << 20, 0, 0o600));
        assert_eq!(allocated_bytes(&disks), 4096, "one is a hole, the other one is 4 KiB");
        assert_eq!((disks[1].bytes, disks[1].owned), (4096, false));
        remove(&disks);
        assert!(!disks[0].path.exists() && existing.exists());
    }

    #[test]
    fn nothing_is_left_when_the_second_image_fails() {
        let folder = tempfile::tempdir().unwrap();
        let disks = plan(folder.path(), &[new("a", Some(1), None), new("b", Some(1), None)], &[]).unwrap();
        std::fs::write(&disks[1].path, b"somebody else's").unwrap();
        assert!(create(folder.path(), &disks, &BTreeSet::new()).is_err());
        assert!(!disks[0].path.exists());
        assert_eq!(std::fs::read(&disks[1].path).unwrap(), b"somebody else's");
    }

    #[test]
    fn missing_and_wrong_images_are_named() {
        let missing = plan_one(Path::new("/"), &new("a", None, Some("/nonexistent/x.raw".into())), &[]).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/x.raw"), "{missing}");
        let wrong = plan_one(Path::new("/"), &new("a", None, Some("/dev/null".into())), &[]).unwrap_err();
        assert!(super::super::chain(&wrong).contains("neither a file nor a block device"), "{wrong}");
    }
}
