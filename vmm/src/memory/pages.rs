//! Reading and writing pages by number, for migration and snapshots.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use migration::guest::PAGE_BYTES;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Memory, MemoryError};

/// Pages in one answer of [`Memory::next_populated`], 2 MiB.
const GRANULE_PAGES: u64 = 512;

/// Where a page of guest memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residence {
    /// Nowhere: it reads as zeroes.
    Absent,
    /// In memory; also if that is the shared page of zeroes.
    Present,
    /// In swap: reading it would bring it back.
    Swapped,
}

/// What the kernel says of this process's pages, if `/proc` is mounted.
#[derive(Debug)]
pub(super) struct PageMap(Option<File>);

impl PageMap {
    /// Pages asked for at once: at first those of a granule, since most of memory that is used is followed by more of it, and more
    /// while nothing is found.
    const CHUNK: (usize, usize) = (GRANULE_PAGES as usize, 8192);
    /// Bytes of an entry (proc_pid_pagemap(5)).
    const ENTRY: usize = 8;
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    /// The page is in memory, or in swap.
    const POPULATED: u64 = Self::PRESENT | Self::SWAPPED;

    pub(super) fn open() -> Self {
        Self(File::open("/proc/self/pagemap").ok())
    }

    /// Where the page at `address` is. mincore(2) would not tell swap from nothing, and not need `/proc`.
    fn residence(&self, address: usize) -> io::Result<Residence> {
        let file = self.0.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let mut entry = [0; Self::ENTRY];
        file.read_exact_at(&mut entry, (address / PAGE_BYTES as usize * Self::ENTRY) as u64)?;
        let entry = u64::from_ne_bytes(entry);
        Ok(match (entry & Self::PRESENT != 0, entry & Self::SWAPPED != 0) {
            (true, _) => Residence::Present,
            (false, true) => Residence::Swapped,
            (false, false) => Residence::Absent,
        })
    }

    /// Whether all of `pages` pages from `address` on are in memory. False where the kernel does not say.
    pub(super) fn is_present(&self, address: usize, pages: usize) -> bool {
        let Some(file) = &self.0 else { return false };
        let mut entries = vec![0; pages * Self::ENTRY];
        let offset = address / PAGE_BYTES as usize * Self::ENTRY;
        let present = |entry: &[u8; Self::ENTRY]| u64::from_ne_bytes(*entry) & Self::PRESENT != 0;
        file.read_exact_at(&mut entries, offset as u64).is_ok() && entries.as_chunks().0.iter().all(present)
    }

    /// The first of `pages` pages from `address` on that may hold something.
    fn first(&self, address: usize, pages: usize) -> Option<usize> {
        let Some(file) = &self.0 else { return (pages > 0).then_some(0) };
        let mut entries = Vec::new();
        let (mut done, mut chunk) = (0, Self::CHUNK.0);
        while done < pages {
            let part = (pages - done).min(chunk);
            chunk = (chunk * 2).min(Self::CHUNK.1);
            entries.resize(part * Self::ENTRY, 0);
            let part = &mut entries[..];
            let offset = (address / PAGE_BYTES as usize + done) * Self::ENTRY;
            if file.read_exact_at(part, offset as u64).is_err() {
                // Better to look at a page in vain than to lose it.
                return Some(done);
            }
            let populated = |entry: &[u8]| {
                let value = entry.try_into().map_or(u64::MAX, u64::from_ne_bytes);
                value & Self::POPULATED != 0
            };
            if let Some(index) = part.chunks_exact(Self::ENTRY).position(populated) {
                return Some(done + index);
            }
            done += part.len() / Self::ENTRY;
        }
        None
    }
}

impl Memory {
    /// The first run of pages at or after `from` that may hold something: it begins with a page that has memory, and ends
    /// with the granule.
    ///
    /// # Errors
    ///
    /// None on this kind of memory.
    pub fn next_populated(&self, from: u64) -> Result<Option<Range<u64>>, MemoryError> {
        let mut base = 0;
        for (address, bytes) in self.mapped() {
            let pages = bytes as u64 / PAGE_BYTES;
            let skip = from.saturating_sub(base).min(pages);
            let start = address + (skip * PAGE_BYTES) as usize;
            if let Some(found) = self.page_map.first(start, (pages - skip) as usize) {
                let page = skip + found as u64;
                let end = ((page / GRANULE_PAGES + 1) * GRANULE_PAGES).min(pages);
                return Ok(Some(base + page..base + end));
            }
            base += pages;
        }
        Ok(None)
    }

    /// Where a page is now. It may be elsewhere a moment later.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfRange`], or [`MemoryError::PageMap`] where the kernel does not say.
    pub fn residence(&self, page: u64) -> Result<Residence, MemoryError> {
        self.check(page, page + 1)?;
        let mut residence = Residence::Absent;
        self.each_piece(page, PAGE_BYTES as usize, |pointer, _, _| {
            residence = self.page_map.residence(pointer as usize).map_err(MemoryError::PageMap)?;
            Ok(())
        })?;
        Ok(residence)
    }

    /// Copies pages `first..` into `buffer`. Pages without memory read as zeroes and stay without. Ends a filling.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfRange`].
    pub fn read_pages(&self, first: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
        self.check(first, first + (buffer.len() as u64).div_ceil(PAGE_BYTES))?;
        self.arrived();
        self.each_piece(first, buffer.len(), |pointer, piece, _| {
            let target = &mut buffer[piece];
            // SAFETY: `each_piece` hands out `piece.len()` bytes inside a live mapping; the guest may write to them
            // meanwhile, so they are copied as raw memory and never seen as a Rust slice.
            unsafe { std::ptr::copy_nonoverlapping(pointer, target.as_mut_ptr(), target.len()) };
            Ok(())
        })
    }

    /// These pages are about to be written, probably for the first time. Only a hint: what does not exist is not prepared.
    pub fn prepare_pages(&self, pages: Range<u64>) {
        let end = pages.end.min(self.pages());
        let bytes = end.saturating_sub(pages.start) * PAGE_BYTES;
        let prepared = self.each_piece(pages.start, bytes as usize, |pointer, piece, _| {
            self.prepare(pointer as usize, piece.len());
            Ok(())
        });
        debug_assert!(prepared.is_ok());
    }

    /// Stores pages `first..` of a machine that does not run yet; see [`Memory::arrived`]. Not recorded as a write of the machine.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfRange`].
    pub fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.check(first, first + (data.len() as u64).div_ceil(PAGE_BYTES))?;
        self.each_piece(first, data.len(), |pointer, piece, _| self.fill(pointer as usize, &data[piece]))
    }

    /// Makes the pages read as zeroes and gives their memory back.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] if they do not exist, or the kernel refuses.
    pub fn zero_pages(&self, pages: Range<u64>) -> Result<(), MemoryError> {
        self.check(pages.start, pages.end)?;
        let bytes = ((pages.end - pages.start) * PAGE_BYTES) as usize;
        self.each_piece(pages.start, bytes, |pointer, piece, first| {
            self.emptied(pointer as usize, piece.len());
            // SAFETY: the range lies inside a live private mapping; nothing runs in this machine yet, and no Rust reference to
            // guest memory exists whose contents would change under it.
            let result = unsafe { libc::madvise(pointer.cast(), piece.len(), libc::MADV_DONTNEED) };
            if result == 0 {
                Ok(())
            } else {
                Err(io_error("madvise(MADV_DONTNEED)", first)(io::Error::last_os_error()))
            }
        })
    }

    /// Calls `action` with a pointer to each contiguous piece of `length` bytes from `page`, the piece's range within
    /// them, and the page number that it starts with.
    fn each_piece(
        &self,
        page: u64,
        length: usize,
        mut action: impl FnMut(*mut u8, Range<usize>, u64) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let (start, end) = ((page * PAGE_BYTES) as usize, (page * PAGE_BYTES) as usize + length);
        let mut base = 0;
        for region in self.ram.iter() {
            let size = region.len() as usize;
            let (from, upto) = (start.max(base), end.min(base + size));
            if from < upto {
                // SAFETY: `from - base` is below the length of this region's mapping.
                let pointer = unsafe { region.as_ptr().add(from - base) };
                action(pointer, from - start..upto - start, from as u64 / PAGE_BYTES)?;
            }
            base += size;
        }
        Ok(())
    }

    fn check(&self, first: u64, end: u64) -> Result<(), MemoryError> {
        let pages = self.pages();
        if first <= end && end <= pages { Ok(()) } else { Err(MemoryError::OutOfRange { first, end, pages }) }
    }
}

fn io_error(call: &'static str, page: u64) -> impl FnOnce(io::Error) -> MemoryError {
    move |source| MemoryError::Io { call, page, source }
}

#[cfg(test)]
mod tests {
    use super::super::resident::Usage;
    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;

    #[test]
    fn pages_are_found_read_and_given_back() {
        let memory = Memory::new(64).unwrap();
        assert_eq!(memory.pages(), 16384);
        assert_eq!(memory.next_populated(0).unwrap(), None);
        let data: Vec<u8> = (0..3 * PAGE).map(|index| (index / PAGE + 1) as u8).collect();
        memory.write_pages(600, &data).unwrap();
        memory.write_pages(601, &data).unwrap();
        let run = memory.next_populated(0).unwrap().unwrap();
        // On huge pages all of a granule is there, on small ones what was written.
        assert!((512..=600).contains(&run.start) && run.end == 1024, "{run:?}");
        let mut read = vec![9; 6 * PAGE];
        memory.read_pages(599, &mut read).unwrap();
        let firsts: Vec<u8> = read.chunks(PAGE).map(|page| page[PAGE - 1]).collect();
        assert_eq!(firsts, [0, 1, 1, 2, 3, 0]);
        assert_eq!(memory.next_populated(1024).unwrap(), None);
        memory.write_pages(12000, &data[..PAGE]).unwrap();
        let run = memory.next_populated(1024).unwrap().unwrap();
        assert!(run.contains(&12000), "{run:?}");
        memory.zero_pages(1024..16384).unwrap();
        assert_eq!(memory.next_populated(1024).unwrap(), None);
        memory.zero_pages(512..602).unwrap();
        assert_eq!(memory.next_populated(0).unwrap(), Some(602..1024));
        memory.read_pages(599, &mut read).unwrap();
        let firsts: Vec<u8> = read.chunks(PAGE).map(|page| page[PAGE - 1]).collect();
        assert_eq!(firsts, [0, 0, 0, 2, 3, 0]);
        memory.zero_pages(0..16384).unwrap();
        assert_eq!(Usage::now(Some(&memory)).ram_bytes, 0);
    }

    #[test]
    fn it_is_known_where_a_page_is() {
        let memory = Memory::new(16).unwrap();
        assert_eq!(memory.residence(7).unwrap(), Residence::Absent);
        memory.write_pages(7, &[1; PAGE]).unwrap();
        assert_eq!(memory.residence(7).unwrap(), Residence::Present);
        memory.zero_pages(0..4096).unwrap();
        assert_eq!(memory.residence(7).unwrap(), Residence::Absent);
        assert!(matches!(memory.residence(4096), Err(MemoryError::OutOfRange { .. })));
        assert!(PageMap(None).residence(0).is_err());
    }

    #[test]
    fn without_the_page_map_everything_may_be_populated() {
        assert_eq!(PageMap(None).first(0, 10), Some(0));
        assert_eq!(PageMap(None).first(0, 0), None);
        // Past the end of user space nothing can be read.
        assert_eq!(PageMap::open().first(usize::MAX - 64 * PAGE, 10), Some(0));
    }

    #[test]
    fn page_numbers_run_across_regions() {
        let memory = Memory::with_regions(vec![
            migration::guest::MemoryRegion { gpa: 0, bytes: 2 * PAGE_BYTES },
            migration::guest::MemoryRegion { gpa: 1 << 32, bytes: 2 * PAGE_BYTES },
        ])
        .unwrap();
        assert_eq!(memory.next_populated(0).unwrap(), None);
        for _ in 0..2 {
            memory.write_pages(1, &[7; 2 * PAGE]).unwrap();
        }
        assert_eq!(memory.next_populated(0).unwrap(), Some(1..2));
        assert_eq!(memory.next_populated(2).unwrap(), Some(2..4));
        assert_eq!(memory.next_populated(3).unwrap(), None);
        let value: u8 = vm_memory::Bytes::read_obj(memory.ram(), vm_memory::GuestAddress(1 << 32)).unwrap();
        assert_eq!(value, 7);
        let mut read = [0; 2 * PAGE];
        memory.read_pages(2, &mut read).unwrap();
        assert_eq!((read[0], read[PAGE]), (7, 0));
        assert!(matches!(memory.read_pages(3, &mut read), Err(MemoryError::OutOfRange { end: 5, pages: 4, .. })));
        assert!(memory.write_pages(4, &read).is_err() && memory.zero_pages(0..5).is_err());
        memory.zero_pages(0..4).unwrap();
        assert_eq!(memory.next_populated(0).unwrap(), None);
    }
}
