//! One piece of anonymous memory, aligned for huge pages, with guards around it.
//!
//! ```text
//!  reserved, no access  | at least a page |   RAM, read and write   | at least a page |
//!                                         ^ multiple of 2 MiB
//! ```
//!
//! KVM maps 2 MiB at once only where host and guest addresses agree in their lower 21 bits, and transparent huge pages
//! begin at such addresses too; `mmap` aligns by itself only since Linux 6.7. The guards keep the kernel from merging RAM
//! with a neighbour, and turn a stray access past either end into a fault.

use std::io;
use std::ops::Deref;
use std::ptr::{NonNull, null_mut};

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

/// Size and alignment of a huge page on x86-64.
pub(super) const HUGE_PAGE: usize = 2 << 20;

const GUARD: usize = 4096;

/// What this process has mapped; given back on drop.
#[derive(Debug)]
struct Mapping {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

// SAFETY: it is only an address and a length; nothing is read or written through it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the whole of what `reserve` mapped, and whoever used it is gone (see `WriteLog`).
        unsafe { libc::munmap(self.start.as_ptr(), self.bytes) };
    }
}

/// Pages of a region that devices wrote. It also owns the region's mapping, because vm-memory does not take over mappings
/// that it has not made: a region drops this last, so that the mapping lives exactly as long as the region.
#[derive(Debug)]
pub struct WriteLog {
    pages: AtomicBitmap,
    _mapping: Mapping,
}

impl Deref for WriteLog {
    type Target = AtomicBitmap;

    fn deref(&self) -> &AtomicBitmap {
        &self.pages
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = <AtomicBitmap as WithBitmapSlice<'a>>::S;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.pages.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S {
        self.pages.slice_at(offset)
    }
}

/// A region of `bytes` bytes at guest-physical address `gpa`: all zeroes, and nothing of it in memory yet.
///
/// # Errors
///
/// What the kernel said.
pub(super) fn region(gpa: u64, bytes: usize) -> io::Result<GuestRegionMmap<WriteLog>> {
    let mapping = reserve(bytes + HUGE_PAGE + 2 * GUARD)?;
    let start = mapping.start.as_ptr() as usize;
    let offset = (start + GUARD).next_multiple_of(HUGE_PAGE) - start;
    // SAFETY: `offset + bytes + GUARD` is at most what was reserved, since rounding up adds less than HUGE_PAGE.
    let ram = unsafe { mapping.start.as_ptr().byte_add(offset) };
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the range lies in our own reservation, which nobody uses yet.
    if unsafe { libc::mprotect(ram, bytes, access) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // A mapping that has had a page can be cut into pieces with other advice and becomes one again; pieces that get their first
    // page each for itself stay apart for good (the kernel's `anon_vma`), and a copy by userfaultfd ends where a piece does.
    // SAFETY: as above; the page is nobody's, and all zeroes before and after.
    unsafe {
        ram.cast::<u8>().write_volatile(0);
        libc::madvise(ram, GUARD, libc::MADV_DONTNEED);
    }
    // SAFETY: as above; the advice changes no contents.
    if unsafe { libc::madvise(ram, bytes, libc::MADV_HUGEPAGE) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "no huge pages for guest memory");
    }
    let log = WriteLog { pages: AtomicBitmap::with_len(bytes), _mapping: mapping };
    let builder = MmapRegionBuilder::new_with_bitmap(bytes, log).with_mmap_prot(access).with_mmap_flags(flags);
    // SAFETY: the range is mapped, and stays so for as long as the region, which owns the mapping through its bitmap.
    let region = unsafe { builder.with_raw_mmap_pointer(ram.cast()) }.build().map_err(io::Error::other)?;
    GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

fn reserve(bytes: usize) -> io::Result<Mapping> {
    // Not MAP_NORESERVE: what has no access is not accounted, and `mprotect` then accounts for all of RAM at once, so that a
    // host that cannot have it refuses at the start and not by killing somebody later.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping without a fixed address touches nothing that exists.
    let start = unsafe { libc::mmap(null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start).map(|start| Mapping { start, bytes }).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, MemoryRegionAddress};

    use super::*;

    #[test]
    fn a_region_is_aligned_and_lives_as_long_as_its_last_user() {
        let region = std::sync::Arc::new(region(0, 3 << 20).unwrap());
        let address = region.as_ptr();
        assert_eq!(address as usize % HUGE_PAGE, 0);
        region.write_obj(5u8, MemoryRegionAddress((3 << 20) - 1)).unwrap();
        assert!((**region).bitmap().dirty_at((3 << 20) - 1) && !(**region).bitmap().dirty_at(0));
        let other = std::sync::Arc::clone(&region);
        drop(region);
        assert_eq!(other.read_obj::<u8>(MemoryRegionAddress((3 << 20) - 1)).unwrap(), 5);
    }
}
