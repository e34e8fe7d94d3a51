//! A raw image together with the map of its dirty blocks.

use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};

use migration::guest::{
    BLOCK_BYTES, BlockReader, BlockWriter, DestinationDisk, DiskLayout, GuestError, GuestResult, Missing, SourceDisk,
};
use migration::mirror::{Bell, Gate};
use migration::page::Bitmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::transfer::{Reader, Writer};
use super::{DiskError, Image, LateBlocks, Purpose, Tracker};
use crate::config::DiskConfig;

/// A disk of a machine: what the block device serves and a migration copies.
#[derive(Debug)]
pub struct RawDisk {
    image: Arc<Image>,
    tracker: Tracker,
    gate: Gate,
    /// Written when answers may have become due; watched for edges, never read.
    mirrored: EventFd,
    late: OnceLock<Arc<LateBlocks>>,
}

impl RawDisk {
    /// Opens and locks the image of a disk.
    ///
    /// # Errors
    ///
    /// [`DiskError`] if it is missing, not permitted, in use elsewhere, or not a multiple of 512 bytes.
    pub fn open(config: &DiskConfig, purpose: Purpose) -> Result<Self, DiskError> {
        Self::over(Image::open(config, purpose)?)
    }

    /// As [`RawDisk::open`], where the file system would allow `O_DIRECT` and a test wants the page cache.
    #[cfg(test)]
    pub fn open_cached(config: &DiskConfig) -> Result<Self, DiskError> {
        Self::over(Image::open_as(config, Purpose::Use, false)?)
    }

    fn over(image: Image) -> Result<Self, DiskError> {
        let mirrored = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| DiskError::Io {
            disk: image.id().to_owned(),
            image: image.describe().to_owned(),
            action: "make an event for",
            source,
        })?;
        let (tracker, gate) = (Tracker::default(), Gate::default());
        Ok(Self { image: Arc::new(image), tracker, gate, mirrored, late: OnceLock::new() })
    }

    /// Its shape now.
    pub fn layout(&self) -> DiskLayout {
        self.image.layout()
    }

    /// As [`Image::grow`], and not while a migration copies it: that knows its blocks by their number in a disk of one size.
    ///
    /// # Errors
    ///
    /// As [`Image::grow`], or [`DiskError::Moving`].
    pub fn grow(&self, bytes: u64) -> Result<(), DiskError> {
        if self.tracker.enabled() || self.late.get().is_some_and(|late| late.is_open()) {
            return Err(DiskError::Moving(self.image.id().to_owned()));
        }
        self.image.grow(bytes)
    }

    /// The file.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The map of dirty blocks, marked by the block device.
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// Which writes the block device may answer.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Becomes readable, once more each time, when more writes may be answered.
    pub fn mirrored_fd(&self) -> RawFd {
        self.mirrored.as_raw_fd()
    }

    /// The block device looks which writes it may answer. Without, it finds out when they have waited for long enough.
    fn wake(&self) {
        if let Err(error) = self.mirrored.write(1) {
            tracing::error!(disk = self.image.describe(), %error, "answers to mirrored writes come late");
        }
    }

    /// Blocks that arrive after the guest has begun to run, if this disk came by post-copy.
    pub fn late(&self) -> Option<&Arc<LateBlocks>> {
        self.late.get()
    }

    /// Starts to record what the guest writes. A destination calls this before its machine resumes.
    pub fn start_dirty_tracking(&self) {
        self.tracker.start(self.image.bytes());
    }
}

impl SourceDisk for RawDisk {
    fn start_dirty_tracking(&self) -> GuestResult<()> {
        self.tracker.start(self.image.bytes());
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        self.tracker.stop();
        Ok(())
    }

    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()> {
        self.gate.collect();
        self.tracker.collect(into);
        Ok(())
    }

    fn start_mirroring(&self, bell: &Arc<Bell>) -> GuestResult<bool> {
        self.gate.shut(Arc::clone(bell));
        Ok(true)
    }

    fn mirrored(&self) {
        self.gate.arrive();
        self.wake();
    }

    fn stop_mirroring(&self) {
        self.gate.open();
        self.wake();
    }

    fn next_data(&self, from: u64) -> GuestResult<Option<Range<u64>>> {
        let data = self.image.next_data(from.saturating_mul(BLOCK_BYTES)).map_err(|error| {
            GuestError::new(format!("{}: cannot look for data from block {from}: {error}", self.image.describe()))
        })?;
        Ok(data.map(|bytes| bytes.start / BLOCK_BYTES..bytes.end.div_ceil(BLOCK_BYTES)))
    }

    fn reader(&self) -> GuestResult<Box<dyn BlockReader>> {
        Ok(Box::new(Reader::new(Arc::clone(&self.image))?))
    }
}

impl DestinationDisk for RawDisk {
    fn writer(&self) -> GuestResult<Box<dyn BlockWriter>> {
        if !self.image.is_writable() {
            return Err(GuestError::new(format!(
                "{}: is open for reading only, so a migration cannot fill it: this is a bug",
                self.image.describe()
            )));
        }
        Ok(Box::new(Writer::new(Arc::clone(&self.image))?))
    }

    fn reader(&self) -> GuestResult<Box<dyn BlockReader>> {
        SourceDisk::reader(self)
    }

    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()> {
        self.tracker.collect(into);
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        self.tracker.stop();
        Ok(())
    }

    fn expect_blocks(&self, missing: &Bitmap) -> GuestResult<Arc<dyn Missing>> {
        let late = Arc::new(LateBlocks::new(Arc::clone(&self.image), missing.clone())?);
        // The block device, which is built after this, looks here.
        self.late.set(Arc::clone(&late)).map_err(|_| {
            GuestError::new(format!("{}: it already waits for blocks: this is a bug", self.image.describe()))
        })?;
        Ok(late)
    }
}
