//! Disk images: shared by the block device, which serves the guest, and by a migration, which copies them.
//!
//! ```text
//!            block device ──(its own io_uring, guest memory)──┐
//!                 │ marks                                     ├── Image: file, geometry, lock, O_DIRECT
//!                 ▼                                           │
//! migration ── Tracker (dirty blocks)      BlockReader ───────┤
//!                                          BlockWriter ───────┘  (Transfer: 32 requests of 64 KiB, registered buffers,
//!                                                                 allocated only while a migration runs)
//! ```

mod image;
mod late;
mod raw;
mod ring;
#[cfg(test)]
mod tests;
mod tracker;
mod transfer;

use std::io;
use std::path::PathBuf;

pub use image::{Image, Purpose, SECTOR_BYTES};
pub use late::LateBlocks;
pub use raw::RawDisk;
pub use ring::{AlignedBuffer, Ring};
pub use tracker::Tracker;

/// A disk image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No such file.
    #[error("disk {disk}: there is no image at {}: create it (truncate -s SIZE FILE) or correct the path", path.display())]
    Missing {
        /// The disk's name.
        disk: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// It may not be opened as asked.
    #[error(
        "disk {disk}: {image} cannot be opened for {access}: give this user the right to it, or set read_only if the guest shall only read it"
    )]
    Permission {
        /// The disk's name.
        disk: String,
        /// Path or descriptor.
        image: String,
        /// Reading, or reading and writing.
        access: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor is unusable.
    #[error(
        "disk {disk}: file descriptor {fd} is not an open image with {access} access: the parent process must open it and leave it open"
    )]
    Descriptor {
        /// The disk's name.
        disk: String,
        /// Its number.
        fd: i32,
        /// What is needed.
        access: &'static str,
    },
    /// Neither a file nor a block device.
    #[error("disk {disk}: {image} is neither a regular file nor a block device; only raw images can be used")]
    Kind {
        /// The disk's name.
        disk: String,
        /// Path or descriptor.
        image: String,
    },
    /// A size that no disk can have.
    #[error(
        "disk {disk}: {image} with {bytes} bytes: a disk must have a positive multiple of 512; give the image such a size (truncate -s)"
    )]
    Size {
        /// The disk's name.
        disk: String,
        /// Path or descriptor.
        image: String,
        /// Its size.
        bytes: u64,
    },
    /// Smaller than it is.
    #[error(
        "disk {disk}: {image} has {now} bytes and cannot shrink to {bytes}: what lies at its end would be lost; make a smaller disk and copy to it inside the guest"
    )]
    Shrink {
        /// The disk's name.
        disk: String,
        /// Path or descriptor.
        image: String,
        /// Its size now.
        now: u64,
        /// What was asked for.
        bytes: u64,
    },
    /// The image has another size and cannot be given this one.
    #[error(
        "disk {disk}: {image} has {found} bytes, and {bytes} were asked for: ask for the size that it has; a block device or an image that is only read must be enlarged first"
    )]
    Unlike {
        /// The disk's name.
        disk: String,
        /// Path or descriptor.
        image: String,
        /// Its size.
        found: u64,
        /// What was asked for.
        bytes: u64,
    },
    /// A migration copies it.
    #[error("disk {0}: a migration copies it: wait for its end, or cancel it, and then change its size")]
    Moving(String),
    /// Another process has it.
    #[error(
        "disk {disk}: {image} is locked by another process: a machine that uses it is still running; stop that one, or give this machine an image of its own"
    )]
    Locked {
        /// The disk's name.
        disk: String,
        /// Path or descriptor.
        image: String,
    },
    /// Anything else.
    #[error("disk {disk}: cannot {action} {image}")]
    Io {
        /// The disk's name.
        disk: String,
        /// Path or descriptor.
        image: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
