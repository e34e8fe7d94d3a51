//! Pages that arrive after the guest has begun to run (post-copy), on userfaultfd.
//!
//! Guest RAM is anonymous: a page is missing where the page table has nothing. So pages that will come again are given back,
//! and the mapping is registered for missing faults (userfaultfd(2), `UFFDIO_REGISTER_MODE_MISSING`). From then on every
//! first touch of a hole, by a vCPU, by a device thread, or by the kernel on their behalf, waits until `UFFDIO_COPY` has put
//! a page there. The copy is atomic: a page that is there already is refused with EEXIST and stays as it is.
//!
//! The whole of each region is registered, not each missing run: that would split the mapping thousands of times. A hole
//! that nobody sends anything for is filled with zeroes here, by whoever reads the faults.
//!
//! Nothing in this file touches guest memory through the mapping.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use migration::guest::{GuestError, GuestResult, Missing, PAGE_BYTES};
use migration::page::Bitmap;
use userfaultfd::{Event, EventBuffer, Uffd, UffdBuilder};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::mapping::HUGE_PAGE;
use super::{Memory, MemoryError};

const PAGE: usize = PAGE_BYTES as usize;
/// Faults read at once.
const EVENTS: usize = 64;
static ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// userfaultfd does not do what it must.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// It cannot be had.
    #[error(
        "this host cannot take machines by post-copy: no userfaultfd that serves faults of the kernel; give this user \
         /dev/userfaultfd (Linux 6.1), or the process CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"
    )]
    Unavailable(#[source] userfaultfd::Error),
    /// A request to it failed.
    #[error("userfaultfd failed ({action}, page {page})")]
    Request {
        /// What was being done.
        action: &'static str,
        /// Page concerned.
        page: u64,
        /// What the kernel said.
        #[source]
        source: userfaultfd::Error,
    },
    /// The pages could not be given back.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl From<UffdError> for GuestError {
    fn from(error: UffdError) -> Self {
        Self::new(crate::migrate::chain(&error))
    }
}

fn open() -> Result<Uffd, UffdError> {
    UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        // KVM and the kernel's side of devices touch guest memory too.
        .user_mode_only(false)
        .create()
        .map_err(UffdError::Unavailable)
}

/// Whether this process may use userfaultfd for guest memory.
///
/// # Errors
///
/// [`UffdError::Unavailable`].
pub fn check() -> Result<(), UffdError> {
    open().map(drop)
}

/// One mapped region: its first page and where that is mapped.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    first: u64,
    pages: u64,
    address: usize,
}

/// Memory of a machine that runs before all of it is here.
pub struct LatePages {
    memory: Memory,
    regions: Vec<Mapped>,
    uffd: Arc<Uffd>,
    announced: Bitmap,
    events: Mutex<EventBuffer>,
}

impl LatePages {
    /// Whoever touches one of `announced`, which are holes now, waits from here on.
    ///
    /// # Errors
    ///
    /// [`UffdError`] if userfaultfd cannot be had or refuses the mapping.
    pub fn new(memory: &Memory, announced: &Bitmap) -> Result<Self, UffdError> {
        let uffd = Arc::new(open()?);
        memory.arrived();
        let mut regions = Vec::new();
        let mut first = 0;
        for region in memory.ram().iter() {
            let mapped = Mapped { first, pages: region.len() / PAGE_BYTES, address: region.as_ptr() as usize };
            uffd.register(mapped.address as *mut _, region.len() as usize).map_err(|source| UffdError::Request {
                action: "registering guest memory",
                page: first,
                source,
            })?;
            first += mapped.pages;
            regions.push(mapped);
        }
        memory.late.set(Some(Arc::clone(&uffd)));
        let events = Mutex::new(EventBuffer::new(EVENTS));
        Ok(Self { memory: memory.clone(), regions, uffd, announced: announced.clone(), events })
    }

    fn page(&self, address: usize) -> Option<u64> {
        let inside =
            |region: &&Mapped| (region.address..region.address + region.pages as usize * PAGE).contains(&address);
        let region = self.regions.iter().find(inside)?;
        Some(region.first + ((address - region.address) / PAGE) as u64)
    }

    /// Fills whole pages from `first` on; those that are there stay.
    fn copy(&self, first: u64, data: &[u8]) -> Result<(), UffdError> {
        let (mut page, mut data) = (first, data);
        let _gate = self.memory.late.filling();
        while data.len() >= PAGE {
            let Some(region) = self.regions.iter().find(|region| page < region.first + region.pages) else {
                let (end, pages) = (page + 1, self.memory.pages());
                return Err(MemoryError::OutOfRange { first: page, end, pages }.into());
            };
            let room = (region.first + region.pages - page) as usize * PAGE;
            let target = region.address + (page - region.first) as usize * PAGE;
            // Never across a granule: where two mappings meet, which is between granules only, a copy would be refused.
            let room = room.min(HUGE_PAGE - target % HUGE_PAGE);
            let length = (data.len() / PAGE * PAGE).min(room);
            // SAFETY: the source is a live slice of at least `length` bytes; the target lies in a mapping that `self.memory`
            // keeps, and the kernel only fills pages that nobody has seen yet.
            let result = unsafe { self.uffd.copy(data.as_ptr().cast(), target as *mut _, length, true) };
            let done = match result {
                Ok(done) | Err(userfaultfd::Error::PartiallyCopied(done)) if done > 0 => done,
                // By number: the crate's own error type is of another release of nix.
                Err(userfaultfd::Error::CopyFailed(errno)) if errno as i32 == libc::EEXIST => {
                    // Somebody may have come to wait for it just before it was there.
                    let _ = self.uffd.wake(target as *mut _, PAGE);
                    PAGE
                }
                // The mapping changes at this moment: once more.
                Ok(_) | Err(userfaultfd::Error::PartiallyCopied(_)) => 0,
                Err(source) => return Err(UffdError::Request { action: "storing a page", page, source }),
            };
            page += (done / PAGE) as u64;
            data = &data[done..];
        }
        Ok(())
    }

    fn events(&self, into: &mut Vec<u64>) -> Result<(), UffdError> {
        let mut buffer = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let request = |source| UffdError::Request { action: "reading faults", page: 0, source };
            let before = into.len();
            let mut strangers = 0;
            for event in self.uffd.read_events(&mut buffer).map_err(request)? {
                let Event::Pagefault { addr, .. } = event.map_err(request)? else { continue };
                match self.page(addr as usize) {
                    Some(page) if self.announced.contains(page) => into.push(page),
                    Some(page) => {
                        strangers += 1;
                        self.copy(page, &ZERO_PAGE)?;
                    }
                    None => {}
                }
            }
            if into.len() == before && strangers == 0 {
                return Ok(());
            }
        }
    }
}

impl Missing for LatePages {
    fn ready(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    fn wanted(&self, into: &mut Vec<u64>) -> GuestResult<()> {
        Ok(self.events(into)?)
    }

    fn fill(&self, first: u64, data: &[u8]) -> GuestResult<()> {
        Ok(self.copy(first, data)?)
    }

    fn fill_zero(&self, range: Range<u64>) -> GuestResult<()> {
        for page in range {
            self.copy(page, &ZERO_PAGE)?;
        }
        Ok(())
    }

    fn finish(&self) -> GuestResult<()> {
        self.memory.late.set(None);
        self.memory.want_huge_pages(true);
        for region in &self.regions {
            let result = self.uffd.unregister(region.address as *mut _, region.pages as usize * PAGE);
            result.map_err(|source| UffdError::Request {
                action: "releasing guest memory",
                page: region.first,
                source,
            })?;
        }
        self.memory.collapse(&self.announced);
        Ok(())
    }
}

impl Memory {
    /// Makes these pages holes again, that stay holes: where huge pages are wanted, the kernel (khugepaged) may at any moment
    /// put one together from what is there, with zeroes for what is not, until the mapping is registered. What then arrives
    /// would find the place taken.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] if the kernel refuses.
    pub fn forget_pages(&self, pages: &Bitmap) -> Result<(), MemoryError> {
        self.arrived();
        self.want_huge_pages(false);
        let mut from = 0;
        while let Some(run) = pages.next_run(from, u64::MAX) {
            from = run.end;
            self.zero_pages(run)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn wait_for(late: &LatePages) -> Vec<u64> {
        let mut wanted = Vec::new();
        let start = Instant::now();
        while wanted.is_empty() {
            assert!(start.elapsed() < Duration::from_secs(10), "no fault came");
            let mut fds = [PollFd::new(late.ready(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(100u8)).unwrap();
            late.wanted(&mut wanted).unwrap();
        }
        wanted
    }

    #[test]
    fn whoever_touches_a_missing_page_waits_for_it_and_for_no_other() {
        let memory = Memory::new(16).unwrap();
        memory.write_pages(0, &[1; 8 * PAGE]).unwrap();
        let mut missing = Bitmap::new(memory.pages());
        missing.insert_range(2..6);
        memory.forget_pages(&missing).unwrap();
        let late = match LatePages::new(&memory, &missing) {
            Err(UffdError::Unavailable(error)) => {
                println!("SKIPPED: {error}");
                return;
            }
            late => Arc::new(late.unwrap()),
        };
        let read = |page: u64| {
            let ram = memory.ram().clone();
            std::thread::spawn(move || ram.read_obj::<u8>(GuestAddress(page * PAGE_BYTES + 7)).unwrap())
        };
        assert_eq!(read(1).join().unwrap(), 1);
        let waiting = [read(3), read(5)];
        let mut wanted = wait_for(&late);
        while wanted.len() < 2 {
            wanted.extend(wait_for(&late));
        }
        wanted.sort_unstable();
        assert_eq!(wanted, [3, 5]);
        assert!(waiting.iter().all(|thread| !thread.is_finished()));
        late.fill(3, &[3; PAGE]).unwrap();
        late.fill_zero(5..6).unwrap();
        assert_eq!(waiting.map(|thread| thread.join().unwrap()), [3, 0]);

        // What the guest has written is not overwritten by a copy that comes late, nor is what lies beside it.
        memory.ram().write_obj(9u8, GuestAddress(3 * PAGE_BYTES + 7)).unwrap();
        late.fill(2, &[2; 4 * PAGE]).unwrap();
        let held = [1, 2, 3, 4, 5].map(|page| read(page).join().unwrap());
        assert_eq!(held, [1, 2, 9, 2, 0]);

        // A hole that nothing was announced for reads as zeroes; somebody has to look at the faults for that.
        let never = read(4000);
        let mut none = Vec::new();
        let start = Instant::now();
        while !never.is_finished() {
            assert!(start.elapsed() < Duration::from_secs(10));
            late.wanted(&mut none).unwrap();
        }
        assert_eq!((never.join().unwrap(), none), (0, Vec::new()));

        late.finish().unwrap();
        assert_eq!(read(4001).join().unwrap(), 0);
        let mut all = vec![0; 8 * PAGE];
        memory.read_pages(0, &mut all).unwrap();
        assert_eq!(all.chunks(PAGE).map(|page| page[7]).collect::<Vec<_>>(), [1, 1, 2, 9, 2, 0, 1, 1]);
    }

    #[test]
    fn pages_are_stored_across_mappings() {
        let memory = Memory::new(16).unwrap();
        let (address, _) = memory.mapped().next().unwrap();
        // SAFETY: the granule lies in the mapping, and nothing was written to it; the advice splits the mapping in three.
        unsafe { libc::madvise((address + HUGE_PAGE) as *mut _, HUGE_PAGE, libc::MADV_NOHUGEPAGE) };
        let Ok(late) = LatePages::new(&memory, &Bitmap::full(memory.pages())) else { return };
        late.fill(500, &[5; 600 * PAGE]).unwrap();
        late.finish().unwrap();
        let mut all = vec![0; 600 * PAGE];
        memory.read_pages(500, &mut all).unwrap();
        assert!(all.iter().all(|&byte| byte == 5));
    }

    /// The kernel may put huge pages together at any moment; here it is told to, which it does to the same rules.
    #[test]
    fn no_huge_page_fills_what_was_forgotten() {
        const MADV_COLLAPSE: i32 = 25;
        let memory = Memory::new(16).unwrap();
        memory.write_pages(512, &[1; 512 * PAGE]).unwrap();
        let mut missing = Bitmap::new(memory.pages());
        missing.insert_range(661..670);
        memory.forget_pages(&missing).unwrap();
        let (address, _) = memory.mapped().next().unwrap();
        // SAFETY: changes no contents.
        let collapsed = unsafe { libc::madvise((address + HUGE_PAGE) as *mut _, HUGE_PAGE, MADV_COLLAPSE) };
        assert_ne!(collapsed, 0, "a huge page in place of what is to come");
        let Ok(late) = LatePages::new(&memory, &missing) else { return };
        late.fill(661, &[2; 9 * PAGE]).unwrap();
        let mut all = vec![0; 512 * PAGE];
        memory.read_pages(512, &mut all).unwrap();
        assert!(
            all.chunks(PAGE).zip(512..).all(|(page, number)| page[0] == if missing.contains(number) { 2 } else { 1 })
        );
        late.finish().unwrap();
    }

    #[test]
    fn the_end_lets_everyone_go_on() {
        let memory = Memory::new(16).unwrap();
        let missing = Bitmap::full(memory.pages());
        let Ok(late) = LatePages::new(&memory, &missing) else { return };
        let ram = memory.ram().clone();
        let waiting = std::thread::spawn(move || ram.read_obj::<u8>(GuestAddress(0)).unwrap());
        assert_eq!(wait_for(&late), [0]);
        late.finish().unwrap();
        assert_eq!(waiting.join().unwrap(), 0);
    }
}
