//! Reading and writing pages by number, for migration and snapshots.
//!
//! How a page gets into fresh memory matters more than the copy itself. 512 MiB in chunks of 2 MiB, quiet two-core machine,
//! microseconds a page:
//!
//! | way | fresh page | again |
//! | --- | --- | --- |
//! | copy to the mapping, one fault a page | 3.0-6.7 | 0.7 |
//! | `MADV_POPULATE_WRITE`, then copy | 2.4 | 0.7 |
//! | `pwrite` to the memfd | 1.3-1.5 | 1.5-1.8 |
//! | `fallocate`, then copy | 3.3 | 0.7 |
//!
//! Hence: `pwrite` where a page arrives for the first time; populate and copy where it arrives again. Pages that arrive
//! again are those that the guest works with: they are then mapped when it touches them after the resume.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use migration::guest::PAGE_BYTES;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Memory, MemoryError};

/// Linux 5.14; older kernels answer EINVAL and the copy faults page by page.
const MADV_POPULATE_WRITE: i32 = 23;

/// Pages in one answer of [`Memory::next_populated`], 2 MiB.
const GRANULE_PAGES: u64 = 512;

impl Memory {
    /// The first run of pages at or after `from` that may hold something: it begins with a page that the memfd has, and ends
    /// with the granule.
    ///
    /// Not by looking for the next hole: `SEEK_HOLE` walks all pages up to it, 7 to 14 ms for 512 MiB, and a kernel without
    /// preemption lets no vCPU run on that processor meanwhile.
    pub fn next_populated(&self, from: u64) -> Result<Option<Range<u64>>, MemoryError> {
        if from >= self.pages() {
            return Ok(None);
        }
        let Some(start) = self.seek(from, libc::SEEK_DATA)? else { return Ok(None) };
        let end = ((start / GRANULE_PAGES + 1) * GRANULE_PAGES).min(self.pages());
        self.note_resident(start..end)?;
        Ok(Some(start..end))
    }

    /// Notes which pages are in memory: they hold data and can be read through the mapping. Of the others nothing is known,
    /// since a page may be swapped out; they are read through the file, which neither allocates nor forgets one.
    fn note_resident(&self, pages: Range<u64>) -> Result<(), MemoryError> {
        if (pages.start..pages.end).all(|page| self.is_filled(page)) {
            return Ok(());
        }
        let mut resident = [0u8; GRANULE_PAGES as usize];
        let bytes = ((pages.end - pages.start) * PAGE_BYTES) as usize;
        self.each_piece(pages.start, bytes, |pointer, piece, first| {
            // SAFETY: `each_piece` hands out a live mapping that begins on a page boundary, and the table has a byte for each
            // page of a granule.
            let result = unsafe { libc::mincore(pointer.cast(), piece.len(), resident.as_mut_ptr()) };
            if result != 0 {
                return Err(io_error("mincore", first)(io::Error::last_os_error()));
            }
            for (page, _) in
                (first..).zip(&resident[..piece.len() / PAGE_BYTES as usize]).filter(|(_, flags)| **flags & 1 != 0)
            {
                self.filled.set_addr_range((page * PAGE_BYTES) as usize, PAGE_BYTES as usize);
            }
            Ok(())
        })
    }

    /// Copies pages `first..` into `buffer`. Pages without backing read as zeroes and stay without.
    pub fn read_pages(&self, first: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
        let end = first + (buffer.len() as u64).div_ceil(PAGE_BYTES);
        self.check(first, end)?;
        if !(first..end).all(|page| self.is_filled(page)) {
            return self.file.read_exact_at(buffer, first * PAGE_BYTES).map_err(io_error("pread", first));
        }
        self.each_piece(first, buffer.len(), |pointer, piece, _| {
            let target = &mut buffer[piece];
            // SAFETY: `each_piece` hands out `piece.len()` bytes inside a live mapping; the guest may write to them
            // meanwhile, so they are copied as raw memory and never seen as a Rust slice.
            unsafe { std::ptr::copy_nonoverlapping(pointer, target.as_mut_ptr(), target.len()) };
            Ok(())
        })
    }

    /// Stores pages `first..`. Not recorded as a write of the machine.
    pub fn write_pages(&self, first: u64, data: &[u8]) -> Result<(), MemoryError> {
        let end = first + (data.len() as u64).div_ceil(PAGE_BYTES);
        self.check(first, end)?;
        let mut page = first;
        while page < end {
            let known = self.is_filled(page);
            let mut run = page + 1;
            while run < end && self.is_filled(run) == known {
                run += 1;
            }
            let at = |page: u64| (((page - first) * PAGE_BYTES) as usize).min(data.len());
            let part = &data[at(page)..at(run)];
            if known {
                self.copy_in(page, part)?;
            } else {
                self.write_through_file(page, part)?;
            }
            page = run;
        }
        Ok(())
    }

    /// Makes the pages read as zeroes and gives their memory back.
    pub fn zero_pages(&self, pages: Range<u64>) -> Result<(), MemoryError> {
        self.check(pages.start, pages.end)?;
        // From the first page that is there to the end: to look for the holes between costs more than to punch them again.
        let Some(start) = self.seek(pages.start, libc::SEEK_DATA)?.filter(|&start| start < pages.end) else {
            return Ok(());
        };
        let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, length) = (start * PAGE_BYTES, (pages.end - start) * PAGE_BYTES);
        nix::fcntl::fallocate(&*self.file, mode, offset.cast_signed(), length.cast_signed())
            .map_err(|error| io_error("fallocate(PUNCH_HOLE)", start)(error.into()))?;
        self.filled.reset_addr_range(offset as usize, length as usize);
        Ok(())
    }

    fn write_through_file(&self, page: u64, data: &[u8]) -> Result<(), MemoryError> {
        let offset = page * PAGE_BYTES;
        self.file.write_all_at(data, offset).map_err(io_error("pwrite", page))?;
        self.filled.set_addr_range(offset as usize, data.len());
        Ok(())
    }

    fn copy_in(&self, page: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.each_piece(page, data.len(), |pointer, piece, _| {
            let source = &data[piece];
            // SAFETY: the range lies inside a live shared mapping (`each_piece`); populating changes no contents. A kernel
            // without the advice answers EINVAL, and the copy below faults the pages in instead.
            unsafe { libc::madvise(pointer.cast(), source.len(), MADV_POPULATE_WRITE) };
            // SAFETY: as above, `source.len()` bytes are mapped and writable; nothing runs in this machine yet, and no
            // Rust reference to guest memory exists.
            unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), pointer, source.len()) };
            Ok(())
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

    fn is_filled(&self, page: u64) -> bool {
        self.filled.dirty_at((page * PAGE_BYTES) as usize)
    }

    fn check(&self, first: u64, end: u64) -> Result<(), MemoryError> {
        let pages = self.pages();
        if first <= end && end <= pages { Ok(()) } else { Err(MemoryError::OutOfRange { first, end, pages }) }
    }

    fn seek(&self, page: u64, whence: i32) -> Result<Option<u64>, MemoryError> {
        let offset = (page * PAGE_BYTES).cast_signed();
        // SAFETY: plain system call on an open descriptor; nobody relies on the file position.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), offset, whence) };
        if found >= 0 {
            return Ok(Some(found.cast_unsigned() / PAGE_BYTES));
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(io_error("lseek", page)(error)),
        }
    }
}

fn io_error(call: &'static str, page: u64) -> impl FnOnce(io::Error) -> MemoryError {
    move |source| MemoryError::Io { call, page, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;

    #[test]
    fn pages_are_found_read_and_given_back() {
        let memory = Memory::new(16).unwrap();
        assert_eq!(memory.pages(), 4096);
        assert_eq!(memory.next_populated(0).unwrap(), None);
        let data: Vec<u8> = (0..3 * PAGE).map(|index| (index / PAGE + 1) as u8).collect();
        memory.write_pages(100, &data).unwrap();
        assert_eq!(memory.next_populated(0).unwrap(), Some(100..512));
        memory.write_pages(101, &data).unwrap();
        let mut read = vec![9; 6 * PAGE];
        memory.read_pages(99, &mut read).unwrap();
        let firsts: Vec<u8> = read.chunks(PAGE).map(|page| page[PAGE - 1]).collect();
        assert_eq!(firsts, [0, 1, 1, 2, 3, 0]);
        assert_eq!(memory.next_populated(103).unwrap(), Some(103..512));
        assert_eq!(memory.next_populated(104).unwrap(), None);
        memory.write_pages(1000, &data[..PAGE]).unwrap();
        assert_eq!(memory.next_populated(104).unwrap(), Some(1000..1024));
        memory.zero_pages(1000..1001).unwrap();
        assert_eq!(memory.resident_bytes(), 4 * PAGE_BYTES);
        memory.zero_pages(0..103).unwrap();
        assert_eq!(memory.next_populated(0).unwrap(), Some(103..512));
        memory.write_pages(102, &data[..PAGE]).unwrap();
        assert_eq!(memory.next_populated(0).unwrap(), Some(102..512));
    }

    #[test]
    fn reading_what_may_be_populated_allocates_nothing() {
        let memory = Memory::new(16).unwrap();
        let value = vm_memory::GuestAddress(700 * PAGE_BYTES);
        vm_memory::Bytes::write_obj(memory.ram(), 7u8, value).unwrap();
        let run = memory.next_populated(0).unwrap().unwrap();
        assert_eq!(run, 700..1024);
        assert!(memory.is_filled(700) && !memory.is_filled(701));
        let mut read = vec![9; (run.end - run.start) as usize * PAGE];
        memory.read_pages(run.start, &mut read).unwrap();
        assert_eq!((read[0], read[PAGE]), (7, 0));
        assert_eq!(memory.resident_bytes(), PAGE_BYTES);
    }

    #[test]
    fn page_numbers_run_across_regions() {
        let memory = Memory::with_regions(vec![
            migration::guest::MemoryRegion { gpa: 0, bytes: 2 * PAGE_BYTES },
            migration::guest::MemoryRegion { gpa: 1 << 32, bytes: 2 * PAGE_BYTES },
        ])
        .unwrap();
        for _ in 0..2 {
            memory.write_pages(1, &[7; 2 * PAGE]).unwrap();
        }
        let value: u8 = vm_memory::Bytes::read_obj(memory.ram(), vm_memory::GuestAddress(1 << 32)).unwrap();
        assert_eq!(value, 7);
        let mut read = [0; 2 * PAGE];
        memory.read_pages(2, &mut read).unwrap();
        assert_eq!((read[0], read[PAGE]), (7, 0));
        assert!(matches!(memory.read_pages(3, &mut read), Err(MemoryError::OutOfRange { end: 5, pages: 4, .. })));
        assert!(memory.write_pages(4, &read).is_err() && memory.zero_pages(0..5).is_err());
    }
}
