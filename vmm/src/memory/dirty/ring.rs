//! The dirty rings of a machine's vCPUs, merged into bitmaps, and what each vCPU dirties.
//!
//! While pages are tracked a thread harvests the rings now and then. So little is left to do at the end of a round and in the
//! downtime, and it is seen how fast a vCPU writes before it comes to pages that it has written already. What was
//! harvested is write-protected again at the end of the round only, or when a ring fills up: each time costs the guest a fault
//! for each page.
//!
//! Where the processor notes pages in a buffer of its own (PML) they come into the ring when the vCPU next leaves the guest. Until then
//! they are missing in a round and are reported in a later one: the last collection is made while the machine is paused.
//!
//! # When a ring overflows
//!
//! Rings are used only where KVM was seen to stop a vCPU in time ([`crate::vcpu::ring_probe`]). Should one be found without a free
//! entry all the same, KVM may have written over entries that nobody had read, and over harvested ones, whose pages are then
//! never protected again. Nothing that rings say is trusted from there on: logging is switched off for good, so that the vCPU
//! runs on, and stays off in later migrations: the ring's places no longer agree with KVM's, and what it would push would never be
//! found. Every round reports every page. A migration then ends by post-copy or by a copy of all memory while the machine
//! stands, or as not converging, as its limits say.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};
use migration::guest::PAGE_BYTES;

use super::super::Slots;
use super::log::words;
use crate::kvm::KvmError;
use crate::kvm::dirty_ring::{self, Ring};

/// Rings are harvested so often.
const TICK: Duration = Duration::from_millis(25);

/// So many resets in a row that reset nothing are not due to signals.
const IDLE_MOST: u32 = 100;

/// Samples of one vCPU in a round; with more of them every other one is forgotten.
const SAMPLES: usize = 64;

/// What an operator is told when a ring was full to its last entry.
pub(super) const OVERRUN: &str = "a vCPU has filled its dirty ring to the last entry, so that nobody knows all pages that it wrote: \
     every round sends all of them from then on; set dirty_tracking to \"log\" for this machine and restart it";

/// Stack of the thread that harvests.
const STACK_BYTES: usize = 64 << 10;

/// The rings of a machine.
#[derive(Debug)]
pub struct DirtyRings {
    vm: Arc<VmFd>,
    slots: Arc<Slots>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    vcpus: Vec<Vcpu>,
    /// For each slot the pages that were harvested and not collected; empty while nothing is tracked.
    pending: Vec<Vec<u64>>,
    /// When the round began.
    since: Instant,
    /// How often tracking was switched on: tells the thread whose turn it is.
    generation: u64,
    on: bool,
    /// Entries were lost: rings are not used any more.
    overrun: bool,
    /// The next round has to report every page.
    everything: bool,
}

#[derive(Debug)]
struct Vcpu {
    ring: Ring,
    /// Entries that were harvested and not reset.
    unreset: u32,
    written: Written,
    /// Bytes per second in the round before.
    rate: f64,
}

/// Pages written by a vCPU since the round began.
#[derive(Debug, Default)]
struct Written {
    pages: u64,
    samples: Vec<(Duration, u64)>,
}

impl Written {
    fn add(&mut self, pages: u64, elapsed: Duration) {
        self.pages += pages;
        if self.samples.len() == SAMPLES {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.samples.push((elapsed, self.pages));
    }

    /// Bytes per second until half of what was written was written: later it came to pages that it had written before, and those
    /// leave no entry.
    fn rate(&self, elapsed: Duration) -> f64 {
        let per_second = |pages: u64, time: Duration| (pages * PAGE_BYTES) as f64 / time.as_secs_f64().max(1e-6);
        let half = self.samples.iter().find(|(_, pages)| pages * 2 >= self.pages);
        let early = half.map_or(0.0, |&(time, pages)| per_second(pages, time));
        early.max(per_second(self.pages, elapsed))
    }
}

impl DirtyRings {
    /// The rings of these vCPUs, each with so many entries.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if one cannot be mapped.
    pub fn new(vm: Arc<VmFd>, slots: Arc<Slots>, vcpus: &[VcpuFd], entries: u32) -> Result<Self, KvmError> {
        let one = |fd| {
            let ring = Ring::new(fd, entries)?;
            Ok(Vcpu { ring, unreset: 0, written: Written::default(), rate: 0.0 })
        };
        let vcpus = vcpus.iter().map(one).collect::<Result<_, KvmError>>()?;
        Ok(Self { vm, slots, state: Mutex::new(State::new(vcpus)), changed: Condvar::new() })
    }

    /// A vCPU has left the guest because its ring is full. When this returns there is room.
    ///
    /// # Errors
    ///
    /// [`KvmError::Ioctl`] if KVM refuses.
    pub fn relieve(&self) -> Result<(), KvmError> {
        let mut state = self.lock();
        self.harvest(&mut state);
        self.reset(&mut state)
    }

    /// Whether entries were lost.
    pub fn overrun(&self) -> bool {
        self.lock().overrun
    }

    /// Begins to collect what is written to slots of these lengths in bytes.
    ///
    /// # Errors
    ///
    /// The kernel's, if the thread cannot be made.
    pub(super) fn begin(self: &Arc<Self>, slots: impl Iterator<Item = u64>) -> std::io::Result<()> {
        let mut state = self.lock();
        state.pending = slots.map(|bytes| vec![0; words(bytes)]).collect();
        state.everything = false;
        state.new_round();
        state.vcpus.iter_mut().for_each(|vcpu| vcpu.rate = 0.0);
        state.generation += 1;
        let (rings, generation) = (Arc::clone(self), state.generation);
        let thread = std::thread::Builder::new().name("dirty-ring".into()).stack_size(STACK_BYTES);
        let spawned = thread.spawn(move || rings.harvest_all_the_time(generation));
        state.on = spawned.is_ok();
        spawned.map(drop)
    }

    /// Forgets what was not collected.
    pub(super) fn end(&self) -> Result<(), KvmError> {
        let mut state = self.lock();
        self.harvest(&mut state);
        state.pending = Vec::new();
        state.on = false;
        self.changed.notify_all();
        self.reset(&mut state)
    }

    /// Harvests everything; once [`DirtyRings::take`] was called for each slot, `finish` ends the round.
    pub(super) fn collect(&self) {
        self.harvest(&mut self.lock());
    }

    /// Moves what was written in a slot into `words`.
    pub(super) fn take(&self, slot: u32, words: &mut [u64]) {
        if let Some(pending) = self.lock().pending.get_mut(slot as usize) {
            words.copy_from_slice(pending);
            pending.fill(0);
        }
    }

    /// A round has ended. From here on a further write to a page that was collected is seen. True if nobody knows all that was
    /// written in it.
    pub(super) fn finish(&self, paused: bool) -> Result<bool, KvmError> {
        let mut state = self.lock();
        state.new_round();
        if !paused {
            self.reset(&mut state)?;
        }
        Ok(std::mem::take(&mut state.everything) || state.overrun)
    }

    /// As if a signal had come in a reset.
    #[cfg(test)]
    pub(super) fn cut_short(&self) {
        self.begin_anew(&mut self.lock());
    }

    pub(super) fn before_run(&self) -> Result<(), KvmError> {
        self.reset(&mut self.lock())
    }

    /// Bytes per second that each vCPU dirtied in the last round; empty once entries were lost.
    pub(super) fn rates(&self) -> Vec<f64> {
        let state = self.lock();
        if state.overrun { Vec::new() } else { state.vcpus.iter().map(|vcpu| vcpu.rate).collect() }
    }

    fn reset(&self, state: &mut State) -> Result<(), KvmError> {
        let expected: u64 = state.vcpus.iter().map(|vcpu| u64::from(vcpu.unreset)).sum();
        if expected == 0 {
            return Ok(());
        }
        let mut reset = u64::from(dirty_ring::reset(&self.vm)?);
        let (cut_short, mut idle) = (reset < expected, 0);
        // It stops for good at an entry that was written over after it was harvested.
        while reset < expected && idle < IDLE_MOST {
            let more = dirty_ring::reset(&self.vm)?;
            reset += u64::from(more);
            idle = if more == 0 { idle + 1 } else { 0 };
        }
        state.vcpus.iter_mut().for_each(|vcpu| vcpu.unreset = 0);
        if reset < expected {
            self.give_up(state);
        } else if cut_short {
            self.begin_anew(state);
        }
        Ok(())
    }

    /// Of the pages that were reset some may not be protected: a signal came, see [`dirty_ring::reset`].
    fn begin_anew(&self, state: &mut State) {
        tracing::warn!(
            "a signal has cut the reset of dirty rings short: all pages are protected anew, and sent once more"
        );
        if let Err(error) = self.slots.log(false).and_then(|()| self.slots.log(true)) {
            tracing::error!(%error, "pages cannot be protected anew");
            self.give_up(state);
        }
        // What was written in between left no entry.
        state.everything = true;
    }

    fn harvest(&self, state: &mut State) {
        if state.harvest() {
            self.give_up(state);
        }
    }

    /// A ring was full to its last entry. Nothing is written to any of them from here on.
    fn give_up(&self, state: &mut State) {
        if std::mem::replace(&mut state.overrun, true) {
            return;
        }
        tracing::warn!("{OVERRUN}");
        if let Err(error) = self.slots.log(false) {
            tracing::error!(%error, "the dirty rings stay on");
        }
        // What is still in them makes room, so that the vCPU is not held for it.
        state.harvest();
        if let Err(error) = dirty_ring::reset(&self.vm) {
            tracing::error!(%error, "dirty rings cannot be emptied");
        }
        state.vcpus.iter_mut().for_each(|vcpu| vcpu.unreset = 0);
    }

    fn harvest_all_the_time(&self, generation: u64) {
        let mut state = self.lock();
        loop {
            state = self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
            if !state.on || state.generation != generation {
                return;
            }
            self.harvest(&mut state);
            // Before the vCPU has to leave the guest for it.
            let fills_up = |vcpu: &Vcpu| vcpu.unreset > vcpu.ring.capacity() / 4 * 3;
            if state.vcpus.iter().any(fills_up)
                && let Err(error) = self.reset(&mut state)
            {
                tracing::warn!(%error, "dirty rings cannot be reset");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn new(vcpus: Vec<Vcpu>) -> Self {
        Self {
            vcpus,
            pending: Vec::new(),
            since: Instant::now(),
            generation: 0,
            on: false,
            overrun: false,
            everything: false,
        }
    }

    /// True if a ring was full to its last entry.
    fn harvest(&mut self) -> bool {
        let Self { vcpus, pending, since, .. } = self;
        let elapsed = since.elapsed();
        let mut full = false;
        for vcpu in vcpus {
            let found = vcpu.ring.harvest(|slot, page| {
                let word = pending.get_mut(slot as usize).and_then(|words| words.get_mut((page / 64) as usize));
                if let Some(word) = word {
                    *word |= 1 << (page % 64);
                }
            });
            vcpu.unreset = vcpu.unreset.saturating_add(found);
            full |= vcpu.unreset >= vcpu.ring.capacity();
            vcpu.written.add(found.into(), elapsed);
        }
        full
    }

    fn new_round(&mut self) {
        let elapsed = self.since.elapsed();
        for vcpu in &mut self.vcpus {
            vcpu.rate = vcpu.written.rate(elapsed);
            vcpu.written = Written::default();
        }
        self.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::dirty_ring::testing;

    #[test]
    fn the_rate_is_that_before_pages_were_written_again() {
        let mut written = Written::default();
        // 100 pages in each 25 ms, until all 400 of the working set are written.
        for tick in 1..=40u32 {
            written.add(if tick <= 4 { 100 } else { 0 }, TICK * tick);
        }
        assert!((written.rate(Duration::from_secs(1)) - 4000.0 * 4096.0).abs() < 1.0);
    }

    /// Bursts of writes of any size between looks and resets: either every page is found, or it is found that one was not.
    #[test]
    fn an_overrun_is_always_noticed_and_only_then() {
        const ENTRIES: u32 = 64;
        let (mut overruns, mut clean) = (0, 0);
        for seed in 1..=2000u64 {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut next = |below: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % below
            };
            let (ring, mut kvm) = testing::pair(ENTRIES);
            let vcpu = Vcpu { ring, unreset: 0, written: Written::default(), rate: 0.0 };
            let mut state = State::new(vec![vcpu]);
            state.pending = vec![vec![0; 1024 / 64]];
            let mut written = vec![0u64; 1024 / 64];
            let burst = 1 + next(40);
            loop {
                for _ in 0..next(burst + 1) {
                    let page = next(1024);
                    written[(page / 64) as usize] |= 1 << (page % 64);
                    kvm.push(page);
                }
                let full = kvm.used() >= ENTRIES;
                assert_eq!(state.harvest(), full, "seed {seed}");
                if full {
                    overruns += 1;
                    break;
                }
                assert_eq!(state.pending[0], written, "seed {seed}");
                if next(3) == 0 {
                    assert_eq!(kvm.reset(), state.vcpus[0].unreset, "seed {seed}");
                    state.vcpus[0].unreset = 0;
                }
                clean += 1;
                if clean % 500 == 0 {
                    break;
                }
            }
        }
        assert!(overruns > 500 && clean > 500, "{overruns} {clean}");
    }

    #[test]
    fn a_round_shorter_than_a_tick_has_its_mean() {
        let mut written = Written::default();
        written.add(10, Duration::from_millis(1));
        assert!((written.rate(Duration::from_millis(1)) - 10_000.0 * 4096.0).abs() < 1.0);
        assert!((Written::default().rate(Duration::ZERO)).abs() < 1.0);
    }

    #[test]
    fn a_long_round_keeps_few_samples_of_all_of_it() {
        let mut written = Written::default();
        (1..=10_000u32).for_each(|tick| written.add(1, TICK * tick));
        assert!(written.samples.len() <= SAMPLES);
        assert!((written.rate(TICK * 10_000) / (40.0 * 4096.0) - 1.0).abs() < 0.1);
    }
}
