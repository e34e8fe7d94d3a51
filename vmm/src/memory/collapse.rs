//! Huge pages put together again.
//!
//! A post-copy forgets single pages of what is on huge ones, which splits these, and they come back small. The kernel's own
//! thread (khugepaged) looks at some 16 MiB every ten seconds by default; until it has come round, the guest pays for small
//! pages, and the host for what nobody uses of a split one. So granules of which parts came late are collapsed when all has
//! arrived (madvise(2), `MADV_COLLAPSE`, Linux 6.1), one by one with pauses between: whoever uses a granule at that moment waits
//! while 2 MiB are copied.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use migration::guest::PAGE_BYTES;
use migration::page::Bitmap;

use super::Memory;
use super::mapping::HUGE_PAGE;

/// Older kernels answer EINVAL.
const MADV_COLLAPSE: i32 = 25;

/// A pause is so many times as long as what it follows: all of this takes a tenth of a processor.
const PAUSE: u32 = 9;

const STACK_BYTES: usize = 64 << 10;

impl Memory {
    /// Puts the granules that `late` touches on huge pages, as far as all of a granule is there: nothing that the guest has never
    /// used is populated. Goes on behind the caller's back, and ends when nobody else uses this memory any more.
    pub(super) fn collapse(&self, late: &Bitmap) {
        let granules = self.granules(late);
        if granules.is_empty() {
            return;
        }
        let memory = self.clone();
        let thread = std::thread::Builder::new().name("huge-pages".into()).stack_size(STACK_BYTES);
        if let Err(error) = thread.spawn(move || memory.collapse_all(&granules)) {
            tracing::debug!(%error, "huge pages are left to the kernel");
        }
    }

    fn collapse_all(&self, granules: &[usize]) {
        let mut huge = 0;
        for &address in granules {
            // The last one to hold it is this thread.
            if Arc::strong_count(&self.late) == 1 {
                return;
            }
            let start = Instant::now();
            match self.collapse_one(address) {
                Ok(collapsed) => huge += usize::from(collapsed),
                Err(error) => {
                    tracing::debug!(%error, huge, "this kernel does not put huge pages together");
                    return;
                }
            }
            std::thread::sleep(start.elapsed() * PAUSE);
        }
        tracing::debug!(huge, granules = granules.len(), "huge pages are back");
    }

    /// False if it is left to the kernel: parts of it are missing, somebody holds a page of it, or there is no memory.
    fn collapse_one(&self, address: usize) -> io::Result<bool> {
        if !self.page_map.is_present(address, HUGE_PAGE / PAGE_BYTES as usize) {
            return Ok(false);
        }
        // SAFETY: the granule lies inside a mapping that `self` keeps; collapsing changes no contents.
        if unsafe { libc::madvise(address as *mut _, HUGE_PAGE, MADV_COLLAPSE) } == 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EINVAL) => Err(error),
            _ => Ok(false),
        }
    }

    /// Where the granules are mapped that `pages` touches; none that is cut off by the end of a region.
    fn granules(&self, pages: &Bitmap) -> Vec<usize> {
        let (mut granules, mut first) = (Vec::new(), 0);
        for (address, bytes) in self.mapped() {
            let end = first + bytes as u64 / PAGE_BYTES;
            let mut from = first;
            while let Some(run) = pages.next_run(from, 1).filter(|run| run.start < end) {
                let granule = (run.start - first) * PAGE_BYTES / HUGE_PAGE as u64;
                from = first + (granule + 1) * (HUGE_PAGE as u64 / PAGE_BYTES);
                if from <= end {
                    granules.push(address + granule as usize * HUGE_PAGE);
                }
            }
            first = end;
        }
        granules
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use migration::guest::Missing as _;

    use super::super::Usage;
    use super::super::uffd::LatePages;
    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;
    const GRANULE: u64 = HUGE_PAGE as u64 / PAGE_BYTES;

    /// Bytes on huge pages from `address` on, by smaps.
    fn huge_bytes(memory: &Memory) -> usize {
        let (address, bytes) = memory.mapped().next().unwrap();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut inside, mut huge) = (false, 0);
        for line in maps.lines() {
            if let Some(kib) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
                huge += kib.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10;
            } else if let Some((start, _)) = line.split_once('-').filter(|(_, rest)| rest.contains(' ')) {
                inside =
                    usize::from_str_radix(start, 16).is_ok_and(|start| (address..address + bytes).contains(&start));
            }
        }
        huge
    }

    #[test]
    fn granules_are_those_that_came_late() {
        let memory = Memory::new(16).unwrap();
        let (address, _) = memory.mapped().next().unwrap();
        let mut late = Bitmap::new(memory.pages());
        assert!(memory.granules(&late).is_empty());
        late.insert_range(3..5);
        late.insert_range(2 * GRANULE - 1..2 * GRANULE + 1);
        late.insert_range(memory.pages() - 1..memory.pages());
        let numbers: Vec<usize> = memory.granules(&late).iter().map(|at| (at - address) / HUGE_PAGE).collect();
        assert_eq!(numbers, [0, 1, 2, 7]);
    }

    #[test]
    fn huge_pages_come_back_after_a_post_copy_and_nothing_else_is_populated() {
        let memory = Memory::new(16).unwrap();
        // All of two granules, and a part of a third.
        memory.write_pages(0, &vec![1; (2 * GRANULE + 9) as usize * PAGE]).unwrap();
        let mut late = Bitmap::new(memory.pages());
        late.insert_range(GRANULE - 3..GRANULE + 3);
        late.insert_range(2 * GRANULE + 1..2 * GRANULE + 3);
        memory.forget_pages(&late).unwrap();
        let Ok(pages) = LatePages::new(&memory, &late) else { return };
        pages.fill(GRANULE - 3, &[2; 6 * PAGE]).unwrap();
        pages.fill(2 * GRANULE + 1, &[2; 2 * PAGE]).unwrap();
        let before = memory.usage().ram_bytes;
        assert_eq!(huge_bytes(&memory), 0, "split by what was forgotten");
        pages.finish().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while huge_bytes(&memory) < 2 * HUGE_PAGE {
            assert!(Instant::now() < deadline, "{} bytes are on huge pages", huge_bytes(&memory));
            std::thread::yield_now();
        }
        // The third granule was looked at as well when this thread is gone.
        while Arc::strong_count(&memory.late) > 2 {
            assert!(Instant::now() < deadline, "the thread does not end");
            std::thread::yield_now();
        }
        assert_eq!(huge_bytes(&memory), 2 * HUGE_PAGE);
        assert_eq!(Usage::now(Some(&memory)).ram_bytes, before);
        let mut all = vec![0; (2 * GRANULE + 9) as usize * PAGE];
        memory.read_pages(0, &mut all).unwrap();
        assert!(all.chunks(PAGE).zip(0..).all(|(page, at)| page == [if late.contains(at) { 2 } else { 1 }; PAGE]));
    }
}
