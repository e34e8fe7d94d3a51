//! How memory that nothing runs on yet is filled: what an arriving machine, or a snapshot, brings.
//!
//! How a page gets into fresh memory costs more than its copy. 512 MiB on two quiet cores, Linux 6.18, pieces of 16 KiB:
//!
//! | | ms |
//! |---|---|
//! | fault by fault | 310 to 430 |
//! | populated (`MADV_POPULATE_WRITE`), then copied to | 190 to 230 |
//! | `UFFDIO_COPY`: neither cleared first, nor faulted | 130 to 170, in pieces of 64 KiB 115 to 120 |
//! | huge pages | 100 to 120, or 600 to 860 (see `page_size`) |
//!
//! So a granule is put on a huge page, or is registered with userfaultfd and filled by its copies. Nobody reads the faults:
//! nothing may touch such a granule before [`Memory::arrived`], and whoever does it all the same gets SIGBUS at once instead
//! of waiting for ever. Without userfaultfd small pages are populated.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use migration::page::SharedBitmap;
use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};

use super::mapping::HUGE_PAGE;
use super::page_size::{Choice, Kind};
use super::{Memory, MemoryError, lock};

/// Linux 5.14; older kernels answer EINVAL, and what is copied then faults page by page.
const MADV_POPULATE_WRITE: i32 = 23;

const PAGE: usize = 4096;

const GRANULE_PAGES: u64 = (HUGE_PAGE / PAGE) as u64;

/// Memory that is being filled.
#[derive(Debug)]
pub(super) struct Filling {
    uffd: Option<Uffd>,
    /// Granules that have been given their kind of page.
    begun: SharedBitmap,
    /// Granules of small pages.
    small: SharedBitmap,
    /// Granules registered with `uffd`; no others are touched by any other means than its copies.
    registered: SharedBitmap,
    /// Pages of such granules that are there: what comes again is copied over them without asking the kernel.
    filled: SharedBitmap,
    choice: Mutex<Choice>,
    over: AtomicBool,
}

impl Filling {
    fn begin(memory: &Memory) -> Self {
        let granules = memory.bytes().div_ceil(HUGE_PAGE as u64);
        for (address, bytes) in memory.mapped() {
            advise(address, bytes, libc::MADV_NOHUGEPAGE);
        }
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            // Needs no privilege, and nothing but this process touches this memory.
            .user_mode_only(true)
            .require_features(FeatureFlags::SIGBUS)
            .create();
        let uffd = uffd.inspect_err(|error| tracing::debug!(%error, "filling memory without userfaultfd")).ok();
        Self {
            uffd,
            begun: SharedBitmap::new(granules),
            small: SharedBitmap::new(granules),
            registered: SharedBitmap::new(granules),
            filled: SharedBitmap::new(granules * GRANULE_PAGES),
            choice: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    /// Gives a granule its kind of page, at its first time.
    fn begin_granule(&self, index: u64, address: usize, huge: bool) {
        if self.begun.contains(index) {
            return;
        }
        let mut choice = lock(&self.choice);
        if self.begun.contains(index) || self.over.load(Ordering::Acquire) {
            return;
        }
        let kind = if huge { choice.next() } else { Kind::Small };
        if kind == Kind::Small {
            self.small.insert(index);
            if let Some(uffd) = &self.uffd
                && uffd.register(address as *mut _, HUGE_PAGE).is_ok()
            {
                self.registered.insert(index);
            }
            self.begun.insert(index);
            return;
        }
        advise(address, HUGE_PAGE, libc::MADV_HUGEPAGE);
        self.begun.insert(index);
        // Other channels go on with their granules meanwhile.
        drop(choice);
        let start = Instant::now();
        populate(address, HUGE_PAGE);
        lock(&self.choice).populated_huge(start.elapsed());
    }

    /// Stores whole pages inside one granule.
    fn store(&self, index: u64, address: usize, source: &[u8]) -> Result<(), userfaultfd::Error> {
        if !self.small.contains(index) {
            copy(address, source);
            return Ok(());
        }
        let start = Instant::now();
        match &self.uffd {
            Some(uffd) if self.registered.contains(index) => {
                let first = index * GRANULE_PAGES + (address % HUGE_PAGE / PAGE) as u64;
                place(uffd, &self.filled, first, address, source)?;
            }
            _ => copy(address, source),
        }
        lock(&self.choice).filled_small(source.len(), start.elapsed());
        Ok(())
    }
}

/// Stores whole pages, of which `first` is the first in `filled`, where nothing is; where something is, over it.
fn place(
    uffd: &Uffd,
    filled: &SharedBitmap,
    first: u64,
    address: usize,
    source: &[u8],
) -> Result<(), userfaultfd::Error> {
    let mut done = 0;
    while done < source.len() {
        let page = first + (done / PAGE) as u64;
        let (there, upto) = (filled.contains(page), first + source.len().div_ceil(PAGE) as u64);
        let run = (page + 1..upto).find(|&next| filled.contains(next) != there).unwrap_or(upto) - page;
        let rest = &source[done..source.len().min(done + run as usize * PAGE)];
        if there {
            copy(address + done, rest);
            done += rest.len();
            continue;
        }
        // SAFETY: the source is a live slice; the target lies in a mapping that the caller keeps, and the kernel only fills
        // pages that nobody has seen yet.
        let result = unsafe { uffd.copy(rest.as_ptr().cast(), (address + done) as *mut _, rest.len(), false) };
        let stored = match result {
            Ok(bytes) | Err(userfaultfd::Error::PartiallyCopied(bytes)) => bytes,
            // It arrives again. By number: the crate's own error type is of another release of nix.
            Err(userfaultfd::Error::CopyFailed(errno)) if errno as i32 == libc::EEXIST => {
                let page = &rest[..PAGE.min(rest.len())];
                copy(address + done, page);
                page.len()
            }
            // All has arrived in the meantime, as somebody says who reads already: this is memory like any other.
            Err(userfaultfd::Error::CopyFailed(errno)) if errno as i32 == libc::ENOENT => {
                copy(address + done, rest);
                rest.len()
            }
            // The mapping changes at this moment: once more.
            Err(userfaultfd::Error::CopyFailed(errno)) if errno as i32 == libc::EAGAIN => 0,
            Err(error) => return Err(error),
        };
        for page in page..page + (stored / PAGE) as u64 {
            filled.insert(page);
        }
        done += stored;
    }
    Ok(())
}

fn copy(address: usize, source: &[u8]) {
    // SAFETY: the caller's range lies inside a live mapping that is writable; nothing runs in this machine yet, and no Rust
    // reference to guest memory exists.
    unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), address as *mut u8, source.len()) };
}

/// Gives memory to what is about to be written. Changes no contents.
fn populate(address: usize, bytes: usize) {
    // SAFETY: populating changes no contents. If the kernel does not know the advice, or has no memory, whoever writes
    // there finds out.
    unsafe { libc::madvise(address as *mut _, bytes, MADV_POPULATE_WRITE) };
}

fn advise(address: usize, bytes: usize, advice: i32) {
    // SAFETY: both kinds of advice that this file gives change no contents. A kernel without huge pages refuses it, and has
    // only small ones.
    unsafe { libc::madvise(address as *mut _, bytes, advice) };
}

impl Memory {
    fn filling(&self) -> Option<&Filling> {
        // Also by what was not announced: whoever copies as to any other memory must not meet another channel that begins here.
        let filling = self.filling.get_or_init(|| Filling::begin(self));
        (!filling.over.load(Ordering::Acquire)).then_some(filling)
    }

    /// `bytes` bytes at `address`, inside one region, are about to be written for the first time.
    pub(super) fn prepare(&self, address: usize, bytes: usize) {
        let Some(filling) = self.filling() else { return };
        self.each_granule(address, bytes, |index, granule, from, upto| {
            let Some(index) = index else { return Ok(()) };
            filling.begin_granule(index, granule, true);
            if filling.small.contains(index) && !filling.registered.contains(index) {
                let start = Instant::now();
                populate(from, upto - from);
                lock(&filling.choice).filled_small(0, start.elapsed());
            }
            Ok(())
        })
        .unwrap_or_default();
    }

    /// Stores whole pages at `address`, inside one region.
    pub(super) fn fill(&self, address: usize, source: &[u8]) -> Result<(), MemoryError> {
        let Some(filling) = self.filling() else {
            copy(address, source);
            return Ok(());
        };
        self.each_granule(address, source.len(), |index, granule, from, upto| {
            let part = &source[from - address..upto - address];
            match index {
                Some(index) => {
                    // Not announced: probably a page in the midst of zeroes, for which 2 MiB would be a waste.
                    filling.begin_granule(index, granule, false);
                    filling.store(index, from, part).map_err(MemoryError::Fill)
                }
                None => {
                    copy(from, part);
                    Ok(())
                }
            }
        })
    }

    /// What lies in this range is about to be given back to the kernel.
    pub(super) fn emptied(&self, address: usize, bytes: usize) {
        let Some(filling) = self.filling.get() else { return };
        self.each_granule(address, bytes, |index, granule, from, upto| {
            if let Some(index) = index {
                let page = |address: usize| index * GRANULE_PAGES + ((address - granule) / PAGE) as u64;
                for page in page(from)..page(upto) {
                    filling.filled.remove(page);
                }
            }
            Ok(())
        })
        .unwrap_or_default();
    }

    /// Calls `action` with each granule that the range touches: its number, unless it is cut off by the end of a region,
    /// where it begins, and from where to where it is touched.
    fn each_granule(
        &self,
        address: usize,
        bytes: usize,
        mut action: impl FnMut(Option<u64>, usize, usize, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut base = 0;
        let mut region = None;
        for (start, length) in self.mapped() {
            if (start..start + length).contains(&address) {
                region = Some((start, length, base));
            }
            base += (length / HUGE_PAGE) as u64;
        }
        let Some((start, length, base)) = region else { return Ok(()) };
        let mut from = address;
        while from < address + bytes {
            let granule = from / HUGE_PAGE * HUGE_PAGE;
            let upto = (address + bytes).min(granule + HUGE_PAGE);
            let whole = granule + HUGE_PAGE <= start + length;
            action(whole.then(|| base + ((granule - start) / HUGE_PAGE) as u64), granule, from, upto)?;
            from = upto;
        }
        Ok(())
    }

    /// Whether the kernel may put guest memory on huge pages from here on.
    pub(super) fn want_huge_pages(&self, wanted: bool) {
        let advice = if wanted { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        self.mapped().for_each(|(address, bytes)| advise(address, bytes, advice));
    }

    /// To be called when all has arrived, and before anything but the methods of this type touches memory: from here on it is
    /// like any other, and what the guest touches for the first time may be on huge pages. Idempotent.
    pub fn arrived(&self) {
        let Some(filling) = self.filling.get() else { return };
        if filling.over.load(Ordering::Acquire) {
            return;
        }
        // Whoever comes second goes on when the first is done.
        let _choice = lock(&filling.choice);
        if filling.over.load(Ordering::Acquire) {
            return;
        }
        for (address, bytes) in self.mapped() {
            if let Some(Err(error)) = filling.uffd.as_ref().map(|uffd| uffd.unregister(address as *mut _, bytes)) {
                tracing::error!(%error, "guest memory stays registered");
            }
            advise(address, bytes, libc::MADV_HUGEPAGE);
        }
        filling.over.store(true, Ordering::Release);
        tracing::debug!(granules = filling.begun.count(), small = filling.small.count(), "memory is filled");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(page: u64, pages: usize) -> Vec<u8> {
        (0..pages * PAGE).map(|index| (page as usize + index / PAGE + index % PAGE) as u8).collect()
    }

    fn check(memory: &Memory, page: u64, pages: usize) {
        let mut read = vec![0; pages * PAGE];
        memory.read_pages(page, &mut read).unwrap();
        assert!(read == contents(page, pages), "page {page}");
    }

    /// Whatever a granule is put on.
    fn fill_and_check(memory: &Memory) {
        for granule in 0..8 {
            for start in [7, 100] {
                let first = granule * 512 + start;
                memory.prepare_pages(first..first + 3);
                memory.write_pages(first, &vec![9; 3 * PAGE]).unwrap();
                // Again, the middle alone and then with neighbours that are not there.
                memory.write_pages(first + 1, &contents(first + 1, 1)).unwrap();
                memory.write_pages(first - 1, &contents(first - 1, 5)).unwrap();
            }
        }
        // Never announced; given back and stored again; across two granules; past the end.
        memory.write_pages(5000, &contents(5000, 2)).unwrap();
        memory.write_pages(40, &contents(40, 4)).unwrap();
        memory.zero_pages(40..44).unwrap();
        memory.write_pages(41, &contents(41, 2)).unwrap();
        memory.prepare_pages(500..530);
        memory.write_pages(500, &contents(500, 30)).unwrap();
        memory.prepare_pages(16380..20000);
        memory.arrived();
        memory.arrived();
        for granule in 0..8 {
            check(memory, granule * 512 + 6, 5);
            check(memory, granule * 512 + 99, 5);
        }
        check(memory, 5000, 2);
        check(memory, 41, 2);
        check(memory, 500, 30);
        let mut rest = vec![1; PAGE];
        for hole in [40, 43, 2000, 16383] {
            memory.read_pages(hole, &mut rest).unwrap();
            assert!(rest == [0; PAGE], "page {hole}");
        }
        memory.write_pages(2000, &contents(2000, 1)).unwrap();
        check(memory, 2000, 1);
    }

    #[test]
    fn all_that_was_stored_is_there_and_the_rest_is_zero() {
        let memory = Memory::new(64).unwrap();
        fill_and_check(&memory);
        let filling = memory.filling.get().unwrap();
        assert!(filling.begun.count() >= 8 && filling.small.count() >= 1);
        assert_eq!(filling.uffd.is_some(), filling.registered.count() > 0);
    }

    #[test]
    fn without_userfaultfd_as_well() {
        let memory = Memory::new(64).unwrap();
        memory.filling.set(Filling { uffd: None, ..Filling::begin(&memory) }).unwrap();
        fill_and_check(&memory);
        assert_eq!(memory.filling.get().unwrap().registered.count(), 0);
    }

    #[test]
    fn every_kind_of_page_in_every_order() {
        let memory = Memory::new(64).unwrap();
        let filling = Filling::begin(&memory);
        // Every other granule on a huge page: as many pieces of the mapping as there can be.
        for index in (1..32).step_by(2) {
            filling.begun.insert(index);
        }
        memory.filling.set(filling).unwrap();
        fill_and_check(&memory);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let starts = maps.lines().filter_map(|line| usize::from_str_radix(line.split_once('-')?.0, 16).ok());
        let pieces: Vec<_> =
            starts.filter(|&start| memory.mapped().any(|(ram, bytes)| (ram..ram + bytes).contains(&start))).collect();
        assert_eq!(pieces.len(), 1, "one mapping again, as post-copy and the kernel like it");
    }

    #[test]
    fn who_reads_too_early_harms_nobody() {
        let memory = Memory::new(64).unwrap();
        memory.prepare_pages(0..16);
        memory.write_pages(0, &contents(0, 16)).unwrap();
        check(&memory, 0, 16);
        // As a channel that had looked before.
        let filling = memory.filling.get().unwrap();
        let (address, _) = memory.mapped().next().unwrap();
        filling.store(0, address + 14 * PAGE, &contents(14, 40)).unwrap();
        check(&memory, 0, 54);
    }

    #[test]
    fn channels_fill_side_by_side() {
        let memory = Memory::new(64).unwrap();
        std::thread::scope(|scope| {
            for channel in 0..4 {
                let memory = &memory;
                scope.spawn(move || {
                    for piece in (0..1024).filter(|piece| piece % 4 == channel) {
                        let first = piece * 16;
                        if piece % 3 != 0 {
                            memory.prepare_pages(first..first + 16);
                        }
                        memory.write_pages(first, &contents(first, 16)).unwrap();
                    }
                });
            }
        });
        memory.arrived();
        for piece in 0..1024 {
            check(&memory, piece * 16, 16);
        }
    }
}
