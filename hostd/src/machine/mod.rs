//! Machines of this host: their files, taps and processes.
//!
//! ```text
//!   create:   check ─> record ─> disks ─> taps ─> process ─> API answers ─> running
//!   arrive:   check ─> record ─> disks ─> taps ─> process (incoming) ─> Commit ─> running
//!   stop:     the guest shuts down, or not ─> quit or kill; record and disks stay for a start
//!   discard:  quit or kill ─> disks (those of one that did not come may be kept) ─> sockets and logs ─> record
//! ```
//!
//! The record is written before the first thing is made, and removed after the last one is gone: whatever a crash leaves
//! behind has a record, and the next start of hostd clears it up. Taps belong to the process that holds their descriptor
//! and vanish with it. A machine survives the end of hostd: its process has its own process group, and the next hostd
//! finds it by pid and start time and talks to it through its API socket again.

pub mod device;
pub mod dirty_rate;
pub mod disk;
pub mod entry;
pub mod launch;
pub mod name;
pub mod partial;
pub mod process;
pub mod registry;
pub mod shared;
pub mod spec;
pub mod tap;

use std::io;
use std::path::PathBuf;

pub use entry::MachineRecord;
pub use registry::Machines;

use crate::api::types::MachineStatus;
use crate::store::StoreError;

/// A machine cannot be made, changed or deleted.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// There is no such machine.
    #[error("there is no machine `{0}` on this host: `headroom machine list` shows those that are")]
    Unknown(String),
    /// The name is taken.
    #[error("a machine `{0}` is on this host already: choose another name, or delete that one")]
    Exists(String),
    /// It has no such disk.
    #[error("the machine `{name}` has no disk `{id}`; it has {there}")]
    NoDisk {
        /// Machine.
        name: String,
        /// What was asked for.
        id: String,
        /// Those that it has.
        there: String,
    },
    /// The image of a stopped machine's disk cannot be changed.
    #[error(transparent)]
    Image(#[from] vmm::disk::DiskError),
    /// It is not in a state for this.
    #[error("the machine `{name}` is {status:?}: {remedy}")]
    State {
        /// Machine.
        name: String,
        /// What it is doing.
        status: MachineStatus,
        /// What to do.
        remedy: &'static str,
    },
    /// Its guest was asked to shut down, and has not.
    #[error(
        "the guest of `{name}` was asked to shut down and still runs after {seconds} s: give it longer (`--timeout`), turn it off from inside, or pull the plug (`--force`)"
    )]
    StillRuns {
        /// Machine.
        name: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The host has not enough of something.
    #[error("no room on host `{host}`: {what} needs {needed}, and {free} of {capacity} are free")]
    NoRoom {
        /// Host.
        host: String,
        /// For example `memory`.
        what: &'static str,
        /// With unit.
        needed: String,
        /// With unit.
        free: String,
        /// With unit.
        capacity: String,
    },
    /// A disk cannot be made or used.
    #[error("disk `{id}`: cannot {action} {} ({})", path.display(), remedy(source))]
    Disk {
        /// Disk.
        id: String,
        /// What was tried.
        action: &'static str,
        /// Image.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A disk that is said to be on shared storage cannot be used here.
    #[error("disk `{id}` is not shared with this host: {} {what}", path.display())]
    NotShared {
        /// Disk.
        id: String,
        /// Image.
        path: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// A tap cannot be made.
    #[error(transparent)]
    Tap(#[from] tap::TapError),
    /// A file of the machine cannot be written.
    #[error("cannot {action} {} ({})", path.display(), remedy(source))]
    File {
        /// What was tried.
        action: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The program is not there.
    #[error("cannot find headroom-vmm ({}): put it beside hostd, or name it as `vmm` in the configuration", path.display())]
    NoVmm {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The process could not be started.
    #[error("cannot start {}", path.display())]
    Spawn {
        /// Program.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The process ended, or did not answer in time.
    #[error("the VMM of `{name}` {what}; it said: {log}")]
    Vmm {
        /// Machine.
        name: String,
        /// What it did.
        what: String,
        /// End of its log.
        log: String,
    },
    /// The VMM refused.
    #[error("the VMM of `{name}` refused")]
    Api {
        /// Machine.
        name: String,
        /// Cause.
        #[source]
        source: vmm::api::client::ClientError,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What an operator can do about a file that cannot be made, written or opened.
fn remedy(error: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::ReadOnlyFilesystem => "mount its file system writable",
        Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge => {
            "free some space there, or put state_dir on a larger file system"
        }
        Kind::PermissionDenied => "let the user of hostd write there",
        Kind::AlreadyExists => "something is there already: remove it if no machine needs it",
        Kind::NotFound => "it is not there: check the path",
        Kind::NotADirectory => "a part of the path is a file: move it out of the way",
        Kind::IsADirectory | Kind::InvalidInput => "give a file or a block device",
        _ => "check the path and the storage below it",
    }
}

/// The error and its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let message = next.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = next.source();
    }
    text
}
