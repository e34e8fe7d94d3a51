//! A paused machine in a directory.
//!
//! | file | what |
//! | --- | --- |
//! | `machine` | magic, version, length, CRC-32, then the configuration, the processor, all state payloads (postcard) |
//! | `memory` | guest memory, page number times 4096 being the offset; pages of zeroes are holes |
//!
//! Disks are not copied: a snapshot goes with the disks as they were when it was made. The directory appears under its name
//! only once everything is on stable storage.

mod format;
mod image;

#[cfg(feature = "fuzzing")]
pub(crate) use format::head;

use std::io;
use std::path::{Path, PathBuf};

use migration::guest::{CpuProfile, StatePayload};

use crate::builder::BuildError;
use crate::config::MachineConfig;
use crate::memory::MemoryError;
use crate::vm::{Machine, StateFailure};

const MACHINE_FILE: &str = "machine";
const MEMORY_FILE: &str = "memory";

/// Reads the `machine` file at `path`, for the fuzz targets.
#[cfg(feature = "fuzzing")]
pub(crate) fn read_head(path: &Path) {
    drop(format::read(path));
}

/// A snapshot cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The directory is there.
    #[error("{0} exists: a snapshot makes its own directory, choose a name that is free")]
    Exists(PathBuf),
    /// A file.
    #[error("cannot {action} {path}: check the path, its permissions and the free space")]
    File {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not a snapshot, or damaged.
    #[error("{path} is not a usable snapshot: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Another version.
    #[error(
        "{path} is a snapshot of version {found}, this build knows version {known}: restore it with the version that wrote it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The configuration given with --config does not fit.
    #[error("the configuration given does not fit the snapshot: {0}")]
    Config(String),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// State.
    #[error(transparent)]
    State(#[from] StateFailure),
    /// Building the machine.
    #[error(transparent)]
    Build(#[from] Box<BuildError>),
}

/// What the `machine` file holds.
#[derive(serde::Serialize, serde::Deserialize)]
struct Contents {
    /// JSON: postcard cannot hold the flattened parts of the configuration.
    config: String,
    cpu: CpuProfile,
    payloads: Vec<StatePayload>,
    memory: image::Summary,
}

fn file_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> SnapshotError {
    move |source| SnapshotError::File { action, path: path.to_owned(), source }
}

/// Writes the paused machine to the new directory `path`.
///
/// # Errors
///
/// [`SnapshotError`]; nothing is left behind then, and the machine stays paused.
pub fn save(machine: &Machine, path: &Path) -> Result<(), SnapshotError> {
    if path.exists() {
        return Err(SnapshotError::Exists(path.to_owned()));
    }
    let partial = partial_name(path);
    std::fs::create_dir(&partial).map_err(file_error("create the directory", &partial))?;
    let result = write(machine, &partial)
        .and_then(|()| std::fs::rename(&partial, path).map_err(file_error("rename to", path)))
        .and_then(|()| sync_directory(path.parent().unwrap_or(Path::new("/"))));
    if result.is_err() {
        let _ = std::fs::remove_dir_all(&partial);
    }
    result
}

fn partial_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".partial-{}", std::process::id()));
    name.into()
}

fn write(machine: &Machine, directory: &Path) -> Result<(), SnapshotError> {
    // State first: it refuses a machine that runs before memory is read.
    let payloads = machine.save_state()?;
    let memory = image::write(machine.memory(), &directory.join(MEMORY_FILE))?;
    let config = serde_json::to_string(machine.config()).map_err(|error| SnapshotError::Config(error.to_string()))?;
    let contents = Contents { config, cpu: machine.profile().clone(), payloads, memory };
    format::write(&directory.join(MACHINE_FILE), &contents)?;
    sync_directory(directory)
}

fn sync_directory(path: &Path) -> Result<(), SnapshotError> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    std::fs::File::open(path).and_then(|directory| directory.sync_all()).map_err(file_error("sync", path))
}

/// Builds the machine that was saved in `path`, paused. `config` replaces the saved configuration, for disks and taps that
/// lie elsewhere now.
///
/// # Errors
///
/// [`SnapshotError`] with cause and remedy.
pub fn restore(path: &Path, config: Option<MachineConfig>) -> Result<Machine, SnapshotError> {
    let file = path.join(MACHINE_FILE);
    let contents = format::read(&file)?;
    let saved: MachineConfig = serde_json::from_str(&contents.config)
        .map_err(|error| SnapshotError::Damaged { path: file, what: format!("configuration: {error}") })?;
    let config = match config {
        Some(config) => same_shape(&saved, config)?,
        None => saved,
    };
    let machine = Machine::incoming(config, &contents.cpu).map_err(Box::new)?;
    image::read(machine.memory(), &path.join(MEMORY_FILE), &contents.memory)?;
    machine.restore_state(&contents.payloads, false)?;
    Ok(machine)
}

fn same_shape(saved: &MachineConfig, given: MachineConfig) -> Result<MachineConfig, SnapshotError> {
    let differs = |what: &str, saved: &dyn std::fmt::Display, given: &dyn std::fmt::Display| {
        Err(SnapshotError::Config(format!("{what} was {saved} and is now {given}")))
    };
    if saved.vcpus != given.vcpus {
        return differs("vcpus", &saved.vcpus, &given.vcpus);
    }
    if saved.memory_mib != given.memory_mib {
        return differs("memory_mib", &saved.memory_mib, &given.memory_mib);
    }
    let names = |config: &MachineConfig| {
        let disks = config.disks.iter().map(|disk| disk.id.as_str());
        disks.chain(config.networks.iter().map(|network| network.id.as_str())).collect::<Vec<_>>().join(", ")
    };
    if names(saved) != names(&given) {
        return differs("the list of devices", &names(saved), &names(&given));
    }
    Ok(given)
}
