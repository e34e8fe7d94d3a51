//! Guest memory: one memfd, mapped shared, in one or two regions.
//!
//! ```text
//! guest-physical   0 ........... 3 GiB   (devices, APICs)   4 GiB ...........
//!                  | region 0          |                    | region 1
//! memfd            0 ......................... file offset ..................
//! page number      file offset / 4096
//! ```
//!
//! The regions lie one after the other in the file, so that a page number, as `migration::guest` counts it, is a file
//! offset: runs of pages that were never touched are found with `SEEK_DATA` and cost nothing.

mod dirty;
mod layout;
mod pages;
mod slots;
pub mod uffd;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use migration::guest::{MemoryRegion, PAGE_BYTES};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

pub use dirty::{DirtyTracker, TrackError};
pub use layout::{DEVICE_HOLE, regions};
pub use slots::Slots;

/// Guest RAM as devices see it. Writes through it mark the bitmap, so that a migration learns of pages that devices wrote;
/// whatever writes behind its back (io_uring, a kernel ring) marks them itself. Cheap to clone.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// Why guest memory cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the memory itself.
    #[error(
        "the host refuses {mib} MiB of guest memory ({step}): lower memory_mib, or raise the limit that the error names"
    )]
    Allocate {
        /// Size asked for.
        mib: u64,
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The mapping could not be made.
    #[error("cannot map {mib} MiB of guest memory: lower memory_mib, or raise the address space limit (ulimit -v)")]
    Map {
        /// Size asked for.
        mib: u64,
        /// What vm-memory said.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
    /// Regions that no machine of this build has.
    #[error("the memory layout {0:?} is not one that this build makes: both hosts must run compatible versions")]
    Layout(Vec<MemoryRegion>),
    /// A page number past the end.
    #[error("pages {first}..{end} do not exist in a machine of {pages} pages")]
    OutOfRange {
        /// First page.
        first: u64,
        /// One past the last page.
        end: u64,
        /// Pages of the machine.
        pages: u64,
    },
    /// A system call on the memfd failed.
    #[error("{call} on guest memory at page {page} failed: the host is probably out of memory, see its kernel log")]
    Io {
        /// The system call.
        call: &'static str,
        /// First page concerned.
        page: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// KVM refused a memory slot.
    #[error("KVM refuses memory slot {slot} ({action})")]
    Slot {
        /// Slot number.
        slot: u32,
        /// What was being done.
        action: &'static str,
        /// What KVM said.
        #[source]
        source: vmm_sys_util::errno::Error,
    },
}

/// A machine's memory.
#[derive(Clone, Debug)]
pub struct Memory {
    ram: GuestRam,
    file: Arc<File>,
    regions: Arc<[MemoryRegion]>,
    /// Pages that hold data already: they are mapped and copied to instead of being written through the file.
    filled: Arc<AtomicBitmap>,
}

impl Memory {
    /// Memory of `mib` MiB, all zeroes and not yet backed by pages.
    pub fn new(mib: u64) -> Result<Self, MemoryError> {
        Self::with_regions(regions(mib))
    }

    fn with_regions(regions: Vec<MemoryRegion>) -> Result<Self, MemoryError> {
        let bytes: u64 = regions.iter().map(|region| region.bytes).sum();
        let mib = bytes >> 20;
        let allocate = |step| move |error: nix::Error| MemoryError::Allocate { mib, step, source: error.into() };
        let fd = memfd_create(c"guest-ram", MFdFlags::MFD_CLOEXEC).map_err(allocate("memfd_create"))?;
        let file = Arc::new(File::from(fd));
        nix::unistd::ftruncate(&*file, bytes.cast_signed()).map_err(allocate("ftruncate"))?;
        let mut offset = 0;
        let mut ranges = Vec::with_capacity(regions.len());
        for region in &regions {
            let backing = FileOffset::from_arc(Arc::clone(&file), offset);
            ranges.push((GuestAddress(region.gpa), region.bytes as usize, Some(backing)));
            offset += region.bytes;
        }
        let ram = GuestRam::from_ranges_with_files(ranges).map_err(|source| MemoryError::Map { mib, source })?;
        for region in ram.iter() {
            prefer_huge_pages(region);
        }
        let page = std::num::NonZeroUsize::new(PAGE_BYTES as usize).unwrap_or(std::num::NonZeroUsize::MIN);
        let filled = Arc::new(AtomicBitmap::new(bytes as usize, page));
        Ok(Self { ram, file, regions: regions.into(), filled })
    }

    /// The view for devices.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    /// Number of pages over all regions.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_BYTES
    }

    /// Bytes that the host has allocated for it.
    pub fn resident_bytes(&self) -> u64 {
        // `st_blocks` counts 512-byte units whatever the block size is (stat(2)).
        nix::sys::stat::fstat(&*self.file).map_or(0, |stat| stat.st_blocks.cast_unsigned() * 512)
    }
}

/// Asks for transparent huge pages. It has an effect only where `shmem_enabled` allows it, and is harmless elsewhere.
fn prefer_huge_pages(region: &GuestRegionMmap<AtomicBitmap>) {
    // SAFETY: the range is one whole mapping that this process owns; the advice changes no contents.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    if result != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "no huge pages for guest memory");
    }
}

impl AsRawFd for Memory {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}
