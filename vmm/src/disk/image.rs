//! The file behind a disk: opened, measured, locked, and probed for `O_DIRECT`.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use migration::guest::DiskLayout;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, PosixFadviseAdvice, fallocate, fcntl, posix_fadvise};
use nix::unistd::{Whence, lseek};

use super::{AlignedBuffer, DiskError};
use crate::config::{DiskConfig, DiskSource};

/// Bytes in a sector, the unit of virtio-blk (virtio 1.2, section 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// Between two attempts to lock a shared image that another host is about to leave.
const HAND_OVER_LOOK: Duration = Duration::from_millis(2);

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A machine runs on it.
    Use,
    /// A machine is to arrive. An image of this host's own is filled before, also if the guest may only read it; a shared one is
    /// in use at the source until [`Image::take_over`].
    Arrival,
}

/// An open, locked image.
#[derive(Debug)]
pub struct Image {
    file: File,
    id: String,
    bytes: AtomicU64,
    read_only: bool,
    name: String,
    shared: bool,
    writable: bool,
    /// Alignment that buffers need, if the file was opened with `O_DIRECT`.
    direct: Option<usize>,
}

impl Image {
    /// Opens and locks the image of a disk: exclusively, or together with other readers if it is only read.
    ///
    /// # Errors
    ///
    /// [`DiskError`], naming the image and the remedy.
    pub fn open(config: &DiskConfig, purpose: Purpose) -> Result<Self, DiskError> {
        Self::open_as(config, purpose, true)
    }

    /// As [`Image::open`]; through the page cache in any case unless `direct`.
    pub(super) fn open_as(config: &DiskConfig, purpose: Purpose, direct: bool) -> Result<Self, DiskError> {
        let disk = config.id.clone();
        let writable = !config.read_only || (purpose == Purpose::Arrival && !config.shared);
        let (mut file, name) = open_source(config, writable)?;
        let failed = |action, source| DiskError::Io { disk: disk.clone(), image: name.clone(), action, source };
        let kind = file.metadata().map_err(|source| failed("inspect", source))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind { disk, image: name });
        }
        let locked = match (writable, purpose) {
            (false, _) => file.try_lock_shared(),
            (true, Purpose::Arrival) if config.shared => Ok(()),
            (true, _) => file.try_lock(),
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskError::Locked { disk, image: name }),
            Err(TryLockError::Error(source)) => return Err(failed("lock", source)),
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(|source| failed("measure", source))?;
        if bytes == 0 || bytes % SECTOR_BYTES != 0 {
            return Err(DiskError::Size { disk, image: name, bytes });
        }
        let direct = if direct { enable_direct(&file).map_err(|source| failed("probe", source))? } else { None };
        let (bytes, read_only) = (AtomicU64::new(bytes), config.read_only);
        Ok(Self { file, id: disk, bytes, read_only, name, shared: config.shared, writable, direct })
    }

    /// Whether it is on storage that both hosts of a migration have.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Leaves a shared image to another host: all of it is on stable storage and unlocked when this returns. The guest is stopped.
    /// Idempotent; a shared image that is only read stays locked, as others may read it too.
    ///
    /// # Errors
    ///
    /// [`DiskError::Io`]; it is still locked then, unless unlocking itself failed.
    pub fn hand_over(&self) -> Result<(), DiskError> {
        if !self.shared || !self.writable {
            return Ok(());
        }
        self.file.sync_all().map_err(|source| self.failed("flush", source))?;
        self.file.unlock().map_err(|source| self.failed("unlock", source))
    }

    /// Takes a shared image over, which another host has just left. What this host has cached of it is dropped. Idempotent.
    ///
    /// # Errors
    ///
    /// [`DiskError::Locked`] if it is still locked after `patience`.
    pub fn take_over(&self, patience: Duration) -> Result<(), DiskError> {
        if !self.shared || !self.writable {
            return Ok(());
        }
        let deadline = Instant::now() + patience;
        loop {
            match self.file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(HAND_OVER_LOOK),
                Err(TryLockError::WouldBlock) => {
                    return Err(DiskError::Locked { disk: self.id.clone(), image: self.name.clone() });
                }
                Err(TryLockError::Error(source)) => return Err(self.failed("lock", source)),
            }
        }
        // Clean pages only: this host has written nothing since it last had the lock, or has flushed it.
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
            .map_err(|error| self.failed("forget what is cached of", error.into()))
    }

    fn failed(&self, action: &'static str, source: io::Error) -> DiskError {
        DiskError::Io { disk: self.id.clone(), image: self.name.clone(), action, source }
    }

    /// The file. Its position means nothing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Name of the disk.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its size as the guest was told, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    /// Whether the guest cannot write.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Its shape now.
    pub fn layout(&self) -> DiskLayout {
        DiskLayout { id: self.id.clone(), bytes: self.bytes(), read_only: self.read_only }
    }

    /// Gives it `bytes` bytes, which are no fewer than now. A file that may be written gets a hole at its end; a block device, and
    /// what is only read, must have that size already.
    ///
    /// # Errors
    ///
    /// [`DiskError::Size`], [`DiskError::Shrink`] or [`DiskError::Unlike`] for a size that cannot be, [`DiskError::Io`]; the disk
    /// is as it was then.
    pub fn grow(&self, bytes: u64) -> Result<(), DiskError> {
        let (disk, image) = (self.id.clone(), self.name.clone());
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size { disk, image, bytes });
        }
        let now = self.bytes();
        if bytes < now {
            return Err(DiskError::Shrink { disk, image, now, bytes });
        }
        let found = (&self.file).seek(SeekFrom::End(0)).map_err(|source| self.failed("measure", source))?;
        let is_file = self.file.metadata().map_err(|source| self.failed("inspect", source))?.is_file();
        match found {
            _ if found == bytes => {}
            _ if found < bytes && is_file && self.writable => {
                self.file.set_len(bytes).map_err(|source| self.failed("enlarge", source))?;
            }
            _ => return Err(DiskError::Unlike { disk, image, found, bytes }),
        }
        self.bytes.store(bytes, Ordering::SeqCst);
        Ok(())
    }

    /// Disk and image, for messages: `disk0 (/var/lib/vm/a.raw)`.
    pub fn describe(&self) -> String {
        format!("disk {} ({})", self.id, self.name)
    }

    /// Alignment in bytes that buffers need: 1 unless the page cache is bypassed.
    pub fn buffer_alignment(&self) -> usize {
        self.direct.unwrap_or(1)
    }

    /// Whether the page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// The first run of bytes at or after `from` that the file system has data for. All is data where it cannot tell.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.bytes();
        if from >= end {
            return Ok(None);
        }
        let start = match lseek(&self.file, from as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => return Ok(None),
            Err(Errno::EINVAL) => return Ok(Some(from..end)),
            Err(error) => return Err(error.into()),
        };
        // A hole that appears in between ends the run early at worst; one that vanishes is found as `end`.
        let stop = match lseek(&self.file, start as i64, Whence::SeekHole) {
            Ok(stop) => stop as u64,
            Err(Errno::ENXIO) => end,
            Err(error) => return Err(error.into()),
        };
        Ok((start < end).then(|| start..stop.clamp(start + 1, end)))
    }

    /// Makes bytes read as zeroes and gives their space back.
    ///
    /// # Errors
    ///
    /// What the kernel says; `EOPNOTSUPP` if the file system cannot.
    pub fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, mode, range.start as i64, (range.end - range.start) as i64).map_err(io::Error::from)
    }
}

fn open_source(config: &DiskConfig, writable: bool) -> Result<(File, String), DiskError> {
    let disk = || config.id.clone();
    let access = if writable { "reading and writing" } else { "reading" };
    match &config.source {
        DiskSource::Path(path) => {
            let image = path.display().to_string();
            match OpenOptions::new().read(true).write(writable).open(path) {
                Ok(file) => Ok((file, image)),
                Err(source) => Err(match source.kind() {
                    io::ErrorKind::NotFound => DiskError::Missing { disk: disk(), path: path.clone() },
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                        DiskError::Permission { disk: disk(), image, access, source }
                    }
                    io::ErrorKind::IsADirectory => DiskError::Kind { disk: disk(), image },
                    _ => DiskError::Io { disk: disk(), image, action: "open", source },
                }),
            }
        }
        DiskSource::Fd(fd) => {
            let unusable = || DiskError::Descriptor { disk: disk(), fd: *fd, access };
            if *fd < 0 {
                return Err(unusable());
            }
            // SAFETY: the borrow ends in this function. Should the number not be open, the calls below fail with EBADF.
            let inherited = unsafe { BorrowedFd::borrow_raw(*fd) };
            let flags = fcntl(inherited, FcntlArg::F_GETFL).map_err(|_| unusable())?;
            let mode = flags & libc::O_ACCMODE;
            if flags & libc::O_PATH != 0 || (mode != libc::O_RDWR && (writable || mode != libc::O_RDONLY)) {
                return Err(unusable());
            }
            // A duplicate shares the open file description and its lock with the parent's.
            let file = File::from(inherited.try_clone_to_owned().map_err(|_| unusable())?);
            Ok((file, format!("file descriptor {fd}")))
        }
    }
}

/// Switches `O_DIRECT` on if every request of whole sectors can use it; returns the alignment that buffers then need.
///
/// A file that wants offsets in multiples of more than a sector stays in the page cache altogether: mixing both ways on one
/// page could bring back what the other way has overwritten.
fn enable_direct(file: &File) -> io::Result<Option<usize>> {
    let alignment = match reported_alignment(file)? {
        Some((_, offset)) if offset == 0 || u64::from(offset) > SECTOR_BYTES => return Ok(None),
        Some((memory, _)) => memory.max(1) as usize,
        None => 0,
    };
    if !set_direct(file, true) {
        return Ok(None);
    }
    let mut buffer = AlignedBuffer::new(4096)?;
    let trial = &mut buffer.bytes_mut()[..SECTOR_BYTES as usize];
    if std::os::unix::fs::FileExt::read_at(file, trial, 0).is_err() {
        set_direct(file, false);
        return Ok(None);
    }
    // Without a report, the read of one sector that has just succeeded proves sectors to be enough for the device.
    Ok(Some(if alignment == 0 { SECTOR_BYTES as usize } else { alignment }))
}

/// Alignment for direct I/O of (memory, offset) as the kernel reports it (Linux 6.1 and later).
fn reported_alignment(file: &File) -> io::Result<Option<(u32, u32)>> {
    let mut status = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor itself; the kernel fills the structure.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, status.as_mut_ptr())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before, filled by the kernel now; every bit pattern of its integers is valid.
    let status = unsafe { status.assume_init() };
    let reported = status.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(reported.then_some((status.stx_dio_mem_align, status.stx_dio_offset_align)))
}

fn set_direct(file: &File, on: bool) -> bool {
    let Ok(flags) = fcntl(file, FcntlArg::F_GETFL) else { return false };
    let mut flags = OFlag::from_bits_retain(flags);
    flags.set(OFlag::O_DIRECT, on);
    fcntl(file, FcntlArg::F_SETFL(flags)).is_ok()
}
