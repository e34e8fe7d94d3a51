//! Guest memory: private anonymous memory in one or two regions, on huge pages where the host has them.
//!
//! ```text
//! guest-physical   0 ........... 3 GiB   (devices, APICs)   4 GiB ...........
//!                  | region 0          |                    | region 1
//! page number      0 ................ n                      n ...
//! ```
//!
//! Pages are numbered through all regions, as `migration::guest` counts them. Not a memfd: hosts give no huge pages to shared
//! memory unless somebody has told them to (`shmem_enabled`), and to anonymous memory they do as they come
//! (docs/design/0005).

mod collapse;
mod dirty;
mod filling;
mod give_back;
mod layout;
mod mapping;
mod page_size;
mod pages;
mod resident;
mod slots;
pub mod uffd;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use migration::guest::{MemoryRegion, PAGE_BYTES};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub use dirty::{DirtyRings, DirtyTracker, TrackError};
pub use layout::{DEVICE_HOLE, regions};
pub use mapping::WriteLog;
pub use pages::Residence;
pub use resident::Usage;
pub use slots::Slots;

/// Guest RAM as devices see it. Writes through it mark the bitmap, so that a migration learns of pages that devices wrote;
/// whatever writes behind its back (io_uring, a kernel ring) marks them itself. Cheap to clone.
pub type GuestRam = GuestMemoryMmap<WriteLog>;

/// Why guest memory cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the memory itself.
    #[error(
        "the host refuses {mib} MiB of guest memory: lower memory_mib, free memory or add swap, or raise the address space \
         limit (ulimit -v) or vm.overcommit_memory"
    )]
    Allocate {
        /// Size asked for.
        mib: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
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
    /// A system call on guest memory failed.
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
    /// It is not known which pages are there.
    #[error("the kernel does not say which pages are in memory (/proc/self/pagemap): mount /proc where the VMM runs")]
    PageMap(#[source] io::Error),
    /// Pages could not be stored.
    #[error("storing pages of an arriving machine failed: the host is probably out of memory, see its kernel log")]
    Fill(#[source] userfaultfd::Error),
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine's memory.
#[derive(Clone, Debug)]
pub struct Memory {
    ram: GuestRam,
    regions: Arc<[MemoryRegion]>,
    page_map: Arc<pages::PageMap>,
    last_usage: Arc<resident::LastUsage>,
    filling: Arc<OnceLock<filling::Filling>>,
    late: Arc<give_back::Gate>,
}

impl Memory {
    /// Memory of `mib` MiB, all zeroes and not yet backed by pages.
    pub fn new(mib: u64) -> Result<Self, MemoryError> {
        Self::with_regions(regions(mib))
    }

    pub(crate) fn with_regions(regions: Vec<MemoryRegion>) -> Result<Self, MemoryError> {
        let mib = regions.iter().map(|region| region.bytes).sum::<u64>() >> 20;
        let allocate = |source| MemoryError::Allocate { mib, source };
        let mapped: io::Result<Vec<_>> =
            regions.iter().map(|region| mapping::region(region.gpa, region.bytes as usize)).collect();
        let ram =
            GuestRam::from_regions(mapped.map_err(allocate)?).map_err(|_| MemoryError::Layout(regions.clone()))?;
        Ok(Self {
            ram,
            regions: regions.into(),
            page_map: Arc::new(pages::PageMap::open()),
            last_usage: Arc::default(),
            filling: Arc::default(),
            late: Arc::default(),
        })
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

    /// Where the regions are mapped, ascending by guest-physical address.
    fn mapped(&self) -> impl Iterator<Item = (usize, usize)> {
        self.ram.iter().map(|region| (region.as_ptr() as usize, region.len() as usize))
    }
}
