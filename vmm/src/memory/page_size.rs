//! Which pages an arriving machine is put on: huge ones, unless they are dearer here.
//!
//! As a rule a huge page costs half as much as the 512 small ones it stands for, and the guest runs faster on it. Not where
//! memory is fragmented, so that the kernel must move other pages away first, nor on a host that is itself a virtual machine
//! and reports free memory to its own host, which takes huge pages first and gives them back one fault at a time (512 MiB: 820 ms
//! instead of 240). The kernel does not tell, so the first granules that arrive are a trial of both.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::mapping::HUGE_PAGE;
use super::{Memory, lock};

/// Linux 5.14; older kernels answer EINVAL, and what is copied then faults page by page.
const MADV_POPULATE_WRITE: i32 = 23;

/// Granules tried of each kind; the quicker one of a kind counts.
const TRIALS: usize = 2;

/// What the trial has shown so far.
#[derive(Debug, Default)]
pub(super) struct PageSize {
    trial: Mutex<Trial>,
    decided: AtomicBool,
}

#[derive(Debug, Default)]
struct Trial {
    tried: Vec<usize>,
    huge: Vec<Duration>,
    small: Vec<Duration>,
}

impl Trial {
    /// What to try next; `None` when both are known.
    fn next(&self) -> Option<Kind> {
        match (self.huge.len(), self.small.len()) {
            (TRIALS, TRIALS) => None,
            (huge, small) if huge <= small => Some(Kind::Huge),
            _ => Some(Kind::Small),
        }
    }

    fn result(&self) -> Kind {
        if self.small.iter().min() < self.huge.iter().min() { Kind::Small } else { Kind::Huge }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Huge,
    Small,
}

/// Gives memory to what is about to be written. Changes no contents.
pub(super) fn populate(address: usize, bytes: usize) {
    // SAFETY: populating changes no contents. If the kernel does not know the advice, or has no memory, whoever writes
    // there finds out.
    unsafe { libc::madvise(address as *mut _, bytes, MADV_POPULATE_WRITE) };
}

fn advise(address: usize, bytes: usize, kind: Kind) {
    let advice = if kind == Kind::Huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: the advice changes no contents. A kernel without huge pages refuses it, and has only small ones.
    unsafe { libc::madvise(address as *mut _, bytes, advice) };
}

impl Memory {
    /// To be called before memory at `address` is written for the first time.
    pub(super) fn choose_page_size(&self, address: usize) {
        let this = &*self.page_size;
        if this.decided.load(Ordering::Relaxed) {
            return;
        }
        let mut trial = lock(&this.trial);
        let granule = address / HUGE_PAGE * HUGE_PAGE;
        let Some(kind) = trial.next() else { return };
        let inside = |(start, bytes): (usize, usize)| start <= granule && granule + HUGE_PAGE <= start + bytes;
        if trial.tried.contains(&granule) || !self.mapped().any(inside) {
            return;
        }
        trial.tried.push(granule);
        advise(granule, HUGE_PAGE, kind);
        let start = Instant::now();
        populate(granule, HUGE_PAGE);
        let times = if kind == Kind::Huge { &mut trial.huge } else { &mut trial.small };
        times.push(start.elapsed());
        if trial.next().is_none() {
            let result = trial.result();
            tracing::debug!(huge = ?trial.huge, small = ?trial.small, ?result, "pages for the machine that arrives");
            self.advise_all(result);
            this.decided.store(true, Ordering::Relaxed);
        }
    }

    /// To be called when all has arrived: what the guest touches for the first time may be on huge pages again.
    pub fn arrived(&self) {
        self.advise_all(Kind::Huge);
    }

    fn advise_all(&self, kind: Kind) {
        for (address, bytes) in self.mapped() {
            advise(address, bytes, kind);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_are_tried_in_turn_and_the_quicker_one_wins() {
        let ms = Duration::from_millis;
        let mut trial = Trial::default();
        let mut order = Vec::new();
        for (huge, small) in [(9, 3), (1, 2)] {
            for _ in 0..2 {
                let kind = trial.next().unwrap();
                order.push(kind);
                if kind == Kind::Huge { trial.huge.push(ms(huge)) } else { trial.small.push(ms(small)) }
            }
        }
        assert_eq!(order, [Kind::Huge, Kind::Small, Kind::Huge, Kind::Small]);
        assert_eq!((trial.next(), trial.result()), (None, Kind::Huge));
        trial.huge = vec![ms(3); 2];
        assert_eq!(trial.result(), Kind::Small);
        trial.small = vec![ms(3); 2];
        assert_eq!(trial.result(), Kind::Huge, "alike: the guest likes huge pages better");
    }

    #[test]
    fn the_trial_ends_after_the_first_granules_and_keeps_what_they_hold() {
        let memory = Memory::new(64).unwrap();
        let granule = |index: u64| vec![index as u8 + 1; 3 * 4096];
        for index in 0..8 {
            memory.write_pages(index * 512 + 7, &granule(index)).unwrap();
            memory.write_pages(index * 512 + 100, &granule(index)).unwrap();
        }
        assert!(memory.page_size.decided.load(Ordering::Relaxed));
        assert_eq!(lock(&memory.page_size.trial).tried.len(), 2 * TRIALS);
        memory.arrived();
        for index in 0..8 {
            for start in [7, 100] {
                let mut read = vec![0; 3 * 4096];
                memory.read_pages(index * 512 + start, &mut read).unwrap();
                assert!(read == granule(index), "granule {index}");
            }
        }
    }
}
