//! Pages that the running guest gives back to the host (balloon, free page reports).
//!
//! They read as zeroes from then on, and count as written, *after* they have been given back: whoever copies memory at the same
//! time and still sees the old contents is told to copy once more.
//!
//! While a post-copy fills this memory (`uffd`), a hole is more than a page of zeroes: whoever touches it waits, perhaps for a
//! page that has come already, and what is on its way would be put into it. So a page is given back and replaced by the shared
//! page of zeroes in one step, between two copies: from then on something is there, and what arrives late is dropped.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use migration::guest::PAGE_BYTES;
use userfaultfd::Uffd;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::mapping::HUGE_PAGE;
use super::{Memory, MemoryError};

/// What fills this memory while the guest runs, if something does. Held for reading while pages are put in.
#[derive(Debug, Default)]
pub(super) struct Gate(RwLock<Option<Arc<Uffd>>>);

impl Gate {
    /// No page is given back while the guard lives.
    pub(super) fn filling(&self) -> RwLockReadGuard<'_, Option<Arc<Uffd>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on holes are filled by `uffd`, or by the kernel.
    pub(super) fn set(&self, uffd: Option<Arc<Uffd>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = uffd;
    }
}

impl Memory {
    /// Gives the memory of whole pages back to the host; they read as zeroes from then on. What is not RAM is left out. The
    /// guest may run. Returns how many bytes were RAM.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Io`] if the kernel refuses; what was given back until then stays so.
    pub fn give_back(&self, addresses: Range<u64>) -> Result<u64, MemoryError> {
        let (mut first_page, mut done) = (0, 0);
        for region in self.ram.iter() {
            let (base, bytes) = (region.start_addr().0, region.len());
            let start = addresses.start.clamp(base, base + bytes).next_multiple_of(PAGE_BYTES);
            let end = addresses.end.min(base + bytes) / PAGE_BYTES * PAGE_BYTES;
            if start < end {
                let page = first_page + (start - base) / PAGE_BYTES;
                let (offset, length) = ((start - base) as usize, (end - start) as usize);
                self.replace_by_zeroes(region.as_ptr() as usize + offset, length, page)?;
                // Last: see above.
                (**region).bitmap().mark_dirty(offset, length);
                done += end - start;
            }
            first_page += bytes / PAGE_BYTES;
        }
        Ok(done)
    }

    fn replace_by_zeroes(&self, address: usize, bytes: usize, page: u64) -> Result<(), MemoryError> {
        let gate = self.late.0.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the range lies inside a live private mapping, and no Rust reference to guest memory exists whose contents
        // would change under it: the guest itself could change them at any moment, and all accesses allow for that.
        if unsafe { libc::madvise(address as *mut _, bytes, libc::MADV_DONTNEED) } != 0 {
            let source = std::io::Error::last_os_error();
            return Err(MemoryError::Io { call: "madvise(MADV_DONTNEED)", page, source });
        }
        let Some(uffd) = &*gate else { return Ok(()) };
        let (mut at, end) = (address, address + bytes);
        while at < end {
            // Never across a granule: where two mappings meet, which is between granules only, it would be refused.
            let length = (end - at).min(HUGE_PAGE - at % HUGE_PAGE);
            // SAFETY: as above; the kernel only fills pages that nobody has seen yet.
            match unsafe { uffd.zeropage(at as *mut _, length, true) } {
                Ok(placed) if placed > 0 => at += placed,
                // Nobody fills while the gate is held; but if something is there, nobody waits for it.
                Err(userfaultfd::Error::ZeropageFailed(errno)) if errno as i32 == libc::EEXIST => {
                    at += PAGE_BYTES as usize;
                }
                // The mapping changes at this moment: once more.
                Ok(_) => {}
                Err(userfaultfd::Error::ZeropageFailed(errno)) if errno as i32 == libc::EAGAIN => {}
                Err(error) => {
                    let source = std::io::Error::other(error);
                    return Err(MemoryError::Io { call: "UFFDIO_ZEROPAGE", page, source });
                }
            }
        }
        Ok(())
    }

    /// The numbers of the whole pages in a range of guest-physical addresses; `None` if not all of it is RAM of one region.
    pub fn page_numbers(&self, addresses: Range<u64>) -> Option<Range<u64>> {
        let region = self.ram.find_region(GuestAddress(addresses.start))?;
        let base = region.start_addr().0;
        if addresses.start > addresses.end || addresses.end - base > region.len() {
            return None;
        }
        let before = self.ram.iter().take_while(|other| other.start_addr().0 < base);
        let first: u64 = before.map(|other| other.len() / PAGE_BYTES).sum();
        let start = (addresses.start - base).div_ceil(PAGE_BYTES);
        let end = (addresses.end - base) / PAGE_BYTES;
        Some(first + start..first + end.max(start))
    }
}

#[cfg(test)]
mod tests {
    use migration::guest::{MemoryRegion, Missing as _};
    use migration::page::Bitmap as Pages;
    use vm_memory::Bytes;

    use super::super::Usage;
    use super::super::uffd::{LatePages, UffdError};
    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;

    fn two_regions() -> Memory {
        let region = |gpa| MemoryRegion { gpa, bytes: 4 << 20 };
        Memory::with_regions(vec![region(0), region(1 << 32)]).unwrap()
    }

    fn dirty(memory: &Memory, gpa: u64) -> bool {
        let region = memory.ram().find_region(GuestAddress(gpa)).unwrap();
        (**region).bitmap().dirty_at((gpa - region.start_addr().0) as usize)
    }

    #[test]
    fn pages_read_as_zeroes_cost_nothing_and_count_as_written() {
        let memory = two_regions();
        memory.write_pages(0, &vec![7; 8 << 20]).unwrap();
        memory.arrived();
        assert_eq!(memory.give_back(0x1000..0x3000).unwrap(), 0x2000);
        // Ragged, past the end of the first region, and into the second one.
        assert_eq!(memory.give_back((4 << 20) - 0x1800..(1 << 32) + 0x1fff).unwrap(), 0x2000);
        assert_eq!(memory.give_back(1 << 40..(1 << 40) + 0x1000).unwrap(), 0);
        assert_eq!(memory.give_back(u64::MAX - 5..u64::MAX).unwrap(), 0);
        let byte = |gpa| memory.ram().read_obj::<u8>(GuestAddress(gpa)).unwrap();
        let found =
            [0, 0x1000, 0x2fff, 0x3000, (4 << 20) - 0x1001, (4 << 20) - 1, 1 << 32, (1 << 32) + 0x1000].map(byte);
        assert_eq!(found, [7, 0, 0, 7, 7, 0, 0, 7]);
        let marks = [0, 0x1000, 0x2000, 0x3000, 1 << 32, (1 << 32) + 0x1000].map(|gpa| dirty(&memory, gpa));
        assert_eq!(marks, [false, true, true, false, true, false]);
        memory.give_back(0..1 << 33).unwrap();
        assert_eq!(Usage::now(Some(&memory)).ram_bytes, 0);
    }

    #[test]
    fn page_numbers_go_through_the_regions() {
        let memory = two_regions();
        assert_eq!(memory.page_numbers(0x1000..0x3000), Some(1..3));
        assert_eq!(memory.page_numbers(0x1001..0x3fff), Some(2..3));
        assert_eq!(memory.page_numbers(0x1001..0x1fff), Some(2..2));
        assert_eq!(memory.page_numbers(1 << 32..(1 << 32) + 0x1000), Some(1024..1025));
        assert_eq!(memory.page_numbers((4 << 20) - 0x1000..(4 << 20) + 0x1000), None);
        assert_eq!(memory.page_numbers(5 << 20..6 << 20), None);
    }

    /// What was given back in post-copy is nobody's to wait for, and what arrives late does not come back.
    #[test]
    fn in_postcopy_nothing_comes_back() {
        let memory = two_regions();
        memory.write_pages(0, &[1; 16 * PAGE]).unwrap();
        let mut missing = Pages::new(memory.pages());
        missing.insert_range(4..12);
        memory.forget_pages(&missing).unwrap();
        let late = match LatePages::new(&memory, &missing) {
            Err(UffdError::Unavailable(error)) => return println!("SKIPPED: {error}"),
            late => late.unwrap(),
        };
        late.fill(8, &[2; PAGE]).unwrap();
        // There from the beginning, missing, arrived, never touched.
        for page in [2, 5, 8, 100] {
            memory.give_back(page * PAGE_BYTES..(page + 1) * PAGE_BYTES).unwrap();
        }
        let byte = |page: u64| memory.ram().read_obj::<u8>(GuestAddress(page * PAGE_BYTES)).unwrap();
        // Nobody reads the faults: a single one would wait for ever.
        assert_eq!([2, 5, 8, 100].map(byte), [0; 4]);
        late.fill(4, &[3; 8 * PAGE]).unwrap();
        assert_eq!([4, 5, 6, 8, 11].map(byte), [3, 0, 3, 0, 3]);
        // The guest has them for itself again.
        memory.ram().write_obj(9u8, GuestAddress(5 * PAGE_BYTES)).unwrap();
        late.fill(5, &[3; PAGE]).unwrap();
        assert_eq!([5, 2].map(byte), [9, 0]);
        late.finish().unwrap();
        memory.give_back(0..16 * PAGE_BYTES).unwrap();
        assert_eq!([2, 5, 8].map(byte), [0; 3]);
    }

    /// Whoever waits for a page that is given back at this moment goes on.
    #[test]
    fn whoever_waits_already_goes_on() {
        let memory = two_regions();
        let mut missing = Pages::new(memory.pages());
        missing.insert_range(0..1);
        let Ok(late) = LatePages::new(&memory, &missing) else { return };
        let ram = memory.ram().clone();
        let waiting = std::thread::spawn(move || ram.read_obj::<u8>(GuestAddress(3)).unwrap());
        let (mut wanted, start) = (Vec::new(), std::time::Instant::now());
        while wanted.is_empty() {
            assert!(start.elapsed().as_secs() < 10, "no fault came");
            late.wanted(&mut wanted).unwrap();
        }
        memory.give_back(0..PAGE_BYTES).unwrap();
        assert_eq!(waiting.join().unwrap(), 0);
    }
}
