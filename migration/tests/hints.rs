//! A guest that uses pages, lets them go, names them as free, and uses them again, while it moves: what is in use arrives, what
//! is free need not, and hints of the past do no harm.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration::guest::{GuestResult, MachineLayout, PAGE_BYTES, SourceDisk, SourceGuest, StatePayload};
use migration::page::{Bitmap, SharedBitmap};
use migration::policy::MigrationMode;
use migration::report::{Outcome, Report};
use migration::testing::{FakeMachine, Pair, Workload, World, machines};
use migration::{destination, source};

const PAGES: u64 = 4096;
const PAGE: usize = PAGE_BYTES as usize;

fn content(page: u64, step: u64) -> Vec<u8> {
    let word = (page << 32 | step) | 1 << 63;
    word.to_le_bytes().into_iter().cycle().take(PAGE).collect()
}

/// xorshift64* (Vigna 2016).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

/// What the guest and its balloon know.
struct Mind {
    random: Random,
    /// What each page in use holds.
    steps: Vec<Option<u64>>,
    step: u64,
    paused: bool,
    /// Session that is shown, and the one that the guest has begun; hints on their way, with the session they were made in.
    shown: u64,
    begun: u64,
    queue: VecDeque<(u64, u64)>,
    free: Option<Arc<SharedBitmap>>,
    finished: bool,
    sessions: u64,
}

/// A fake machine with such a guest.
struct Hinter {
    inner: Arc<FakeMachine>,
    world: Arc<World>,
    mind: Mutex<Mind>,
    over: AtomicBool,
}

impl Hinter {
    fn new(inner: Arc<FakeMachine>, world: Arc<World>, seed: u64) -> Arc<Self> {
        let mind = Mind {
            random: Random(seed),
            steps: vec![None; PAGES as usize],
            step: 0,
            paused: false,
            shown: 0,
            begun: 0,
            queue: VecDeque::new(),
            free: None,
            finished: false,
            sessions: 0,
        };
        let hinter = Arc::new(Self { inner, world, mind: Mutex::new(mind), over: AtomicBool::new(false) });
        for page in 0..PAGES {
            hinter.mind().take(&hinter.inner, page);
        }
        // Half of it is free from the beginning.
        for page in (0..PAGES).filter(|page| page / 64 % 2 == 1) {
            hinter.mind().steps[page as usize] = None;
        }
        let guest = Arc::clone(&hinter);
        std::thread::spawn(move || guest.live());
        hinter
    }

    fn mind(&self) -> MutexGuard<'_, Mind> {
        self.mind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) {
        while !self.over.load(Ordering::SeqCst) {
            let mut mind = self.mind();
            for _ in 0..40 {
                if !mind.paused {
                    mind.act(&self.inner);
                }
            }
            drop(mind);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Everything that was in use when the machine stopped is at the destination.
    fn check(&self, destination: &FakeMachine) {
        self.over.store(true, Ordering::SeqCst);
        let mut held = vec![0; PAGE];
        let mind = self.mind();
        for (page, step) in (0..).zip(&mind.steps) {
            let Some(step) = step else { continue };
            destination.memory.read(page, &mut held);
            assert!(held == content(page, *step), "page {page} does not hold step {step}");
        }
        assert!(mind.finished && mind.free.is_none());
        assert_eq!(self.world.violations(), Vec::<String>::new());
    }
}

impl Mind {
    /// Uses a page: a guest that takes a page writes to it.
    fn take(&mut self, machine: &FakeMachine, page: u64) {
        self.step += 1;
        machine.memory.write(page, &content(page, self.step), true);
        self.steps[page as usize] = Some(self.step);
    }

    /// One thing that the guest, or its balloon at the host, does now.
    fn act(&mut self, machine: &FakeMachine) {
        // Few pages are busy, so that one page goes through everything.
        let busy = self.random.below(4) > 0;
        let page = self.random.below(if busy { 64 } else { PAGES });
        match self.random.below(8) {
            0 | 1 => self.take(machine, page),
            2 => self.steps[page as usize] = None,
            3 if self.begun != self.shown => {
                self.begun = self.shown;
                let free = (0..PAGES).filter(|&page| self.begun > 0 && self.steps[page as usize].is_none());
                self.queue.extend(free.map(|page| (self.begun, page)));
            }
            4 | 5 if self.steps[page as usize].is_none() && self.begun > 0 => {
                // All that is free around it, as guests name their memory in large pieces.
                for page in page..(page + 64).min(PAGES) {
                    if self.steps[page as usize].is_none() {
                        self.queue.push_back((self.begun, page));
                    }
                }
            }
            _ => {
                for _ in 0..self.random.below(256) {
                    let Some((session, page)) = self.queue.pop_front() else { return };
                    if session == self.shown
                        && let Some(free) = &self.free
                    {
                        free.insert(page);
                    }
                }
            }
        }
    }
}

impl SourceGuest for Hinter {
    fn layout(&self) -> GuestResult<MachineLayout> {
        self.inner.layout()
    }
    fn start_dirty_tracking(&self) -> GuestResult<()> {
        self.inner.start_dirty_tracking()
    }
    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        SourceGuest::stop_dirty_tracking(&*self.inner)
    }
    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()> {
        if self.mind().free.is_some() {
            self.world.violation("the dirty log was read while hints came");
        }
        SourceGuest::collect_dirty(&*self.inner, into)
    }
    fn next_populated(&self, from: u64) -> GuestResult<Option<Range<u64>>> {
        self.inner.next_populated(from)
    }
    fn read_pages(&self, first: u64, buffer: &mut [u8]) -> GuestResult<()> {
        SourceGuest::read_pages(&*self.inner, first, buffer)
    }
    fn start_free_page_hints(&self, free: &Arc<SharedBitmap>) -> GuestResult<bool> {
        let mut mind = self.mind();
        if free.count() > 0 || !self.inner.memory.is_tracking() {
            self.world.violation("hints were asked for with those of another round, or before writes are recorded");
        }
        mind.sessions += 1;
        mind.shown = mind.sessions;
        mind.free = Some(Arc::clone(free));
        mind.finished = false;
        Ok(true)
    }
    fn free_page_hints_are_over(&self) -> bool {
        let mind = self.mind();
        mind.begun == mind.shown && mind.queue.is_empty()
    }
    fn stop_free_page_hints(&self, done: bool) -> GuestResult<()> {
        let mut mind = self.mind();
        mind.free = None;
        mind.shown = 0;
        mind.finished |= done;
        Ok(())
    }
    fn pause(&self) -> GuestResult<()> {
        let mut mind = self.mind();
        if !mind.finished && mind.sessions > 0 {
            self.world.violation("the machine was stopped while its guest keeps pages free");
        }
        mind.paused = true;
        drop(mind);
        self.inner.pause()
    }
    fn resume(&self) -> GuestResult<()> {
        self.mind().paused = false;
        SourceGuest::resume(&*self.inner)
    }
    fn save_state(&self) -> GuestResult<Vec<StatePayload>> {
        self.inner.save_state()
    }
    fn fence(&self) -> GuestResult<()> {
        self.inner.fence()
    }
    fn unfence(&self) -> GuestResult<()> {
        self.inner.unfence()
    }
    fn disks(&self) -> Vec<Arc<dyn SourceDisk>> {
        SourceGuest::disks(&*self.inner)
    }
}

fn run(seed: u64, prepare: impl FnOnce(&mut Pair, &FakeMachine)) -> (Arc<Hinter>, Arc<FakeMachine>, Report) {
    let (world, from, to) = machines(PAGES, &[]);
    from.boot(Workload::default());
    let hinter = Hinter::new(Arc::clone(&from), world, seed);
    let mut pair = Pair::new();
    prepare(&mut pair, &to);
    let receiving = pair.receive(&to);
    let report = source::run(Arc::clone(&hinter) as _, pair.source_options.clone(), &pair.source_control);
    let received: Result<destination::Received, _> = receiving.join().expect("no panic");
    assert_eq!(received.is_ok(), report.outcome == Outcome::Completed, "{received:?} {}", report.reason);
    (hinter, to, report)
}

#[test]
fn what_is_in_use_arrives_and_what_is_free_is_left_out() {
    let mut left_out = 0;
    for seed in 1..=12 {
        let (hinter, to, report) = run(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15), |pair, _| {
            let limits = &mut pair.source_options.limits;
            limits.streams = 1 + (seed % 3) as u16;
            limits.downtime = Duration::from_millis(if seed % 2 == 0 { 2 } else { 300 });
            limits.force_switchover = true;
            limits.max_rounds = 8;
            limits.bandwidth_bytes_per_second = Some(256 << 20);
        });
        assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
        assert_eq!(report.verification.memory_digest_ok, Some(true), "{:?}", report.verification);
        left_out += report.rounds[0].zero_pages;
        hinter.check(&to);
    }
    // Half of the pages are free.
    assert!(left_out > 12 * PAGES / 4, "only {left_out} pages were left out");
}

#[test]
fn in_postcopy_too() {
    for seed in 1..=4 {
        let (hinter, to, report) = run(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15), |pair, to| {
            to.offers_postcopy.store(true, Ordering::SeqCst);
            pair.source_options.limits.mode = MigrationMode::Postcopy;
        });
        assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
        assert_eq!(report.verification.memory_digest_ok, Some(true), "{:?}", report.verification);
        hinter.check(&to);
    }
}

#[test]
fn full_images_have_nothing_left_out() {
    let (hinter, to, report) = run(7, |pair, _| pair.source_options.limits.compare_full = true);
    assert_eq!(report.outcome, Outcome::Completed, "{}", report.reason);
    assert_eq!(hinter.mind().sessions, 0);
    hinter.mind().finished = true;
    hinter.check(&to);
}

/// However it ends, the guest gets its pages back.
#[test]
fn a_cancelled_migration_asks_for_no_more_hints() {
    let (hinter, _, report) = run(5, |pair, _| {
        pair.source_control.set_bandwidth(Some(1 << 20));
        let control = pair.source_control.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            control.cancel()
        });
    });
    assert_eq!(report.outcome, Outcome::Cancelled, "{}", report.reason);
    let start = Instant::now();
    while !hinter.mind().finished {
        assert!(start.elapsed() < Duration::from_secs(5), "hints are still wanted");
    }
    assert!(hinter.mind().free.is_none() && hinter.mind().sessions > 0);
    hinter.over.store(true, Ordering::SeqCst);
}
