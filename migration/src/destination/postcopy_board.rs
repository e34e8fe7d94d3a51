//! What has not arrived yet, seen from the destination: who waits for it, and how long that took.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::context::Context;
use crate::error::{Doing, MigrationError};
use crate::guest::{Missing, PAGE_BYTES};
use crate::page::Bitmap;
use crate::wire::WireError;
use crate::wire::message::PostcopyFigures;
use crate::wire::missing::MissingList;

/// Shared by the fault thread, all push threads, and the supervisor.
pub(super) struct Board {
    memory: Item,
    disks: Vec<Item>,
    latencies: Mutex<Latencies>,
    finished: AtomicBool,
}

/// Memory, or one disk.
struct Item {
    name: String,
    missing: Arc<dyn Missing>,
    /// What was announced: nothing else is accepted.
    expected: Bitmap,
    state: Mutex<Left>,
}

struct Left {
    left: Bitmap,
    count: u64,
    /// Asked for, and since when the guest waits.
    asked: BTreeMap<u64, Instant>,
    pushed: u64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Item {
    fn new(name: String, missing: Arc<dyn Missing>, expected: Bitmap) -> Self {
        let left = Left { left: expected.clone(), count: expected.count(), asked: BTreeMap::new(), pushed: 0 };
        Self { name, missing, expected, state: Mutex::new(left) }
    }

    /// Hands those of `range` that are not here yet to `fill`, in runs; the rest is dropped.
    fn arrive(
        &self,
        range: Range<u64>,
        latencies: &Mutex<Latencies>,
        mut fill: impl FnMut(Range<u64>) -> Result<(), MigrationError>,
    ) -> Result<(), MigrationError> {
        if let Some(stranger) = range.clone().find(|&number| !self.expected.contains(number)) {
            let what = format!("unannounced {}", self.name);
            return Err(WireError::OutOfRange { what, first: stranger, count: 1, limit: self.expected.len() }.into());
        }
        let mut from = range.start;
        loop {
            let run = locked(&self.state).left.next_run(from, range.end.saturating_sub(from));
            let Some(run) = run.filter(|run| run.start < range.end) else { return Ok(()) };
            let run = run.start..run.end.min(range.end);
            // Without the lock: a copy that came twice is noticed by whoever stores it.
            fill(run.clone())?;
            self.note(run.clone(), latencies);
            from = run.end;
            if from >= range.end {
                return Ok(());
            }
        }
    }

    fn note(&self, run: Range<u64>, latencies: &Mutex<Latencies>) {
        let now = Instant::now();
        let mut state = locked(&self.state);
        for number in run {
            if !state.left.contains(number) {
                continue;
            }
            state.left.remove(number);
            state.count -= 1;
            match state.asked.remove(&number) {
                Some(since) => locked(latencies).add(now - since),
                None => state.pushed += 1,
            }
        }
    }

    /// What the guest has begun to wait for and was not asked for yet.
    fn wanted(&self, scratch: &mut Vec<u64>) -> Result<(), MigrationError> {
        scratch.clear();
        self.missing.wanted(scratch).doing("asking what the guest waits for")?;
        let now = Instant::now();
        let mut state = locked(&self.state);
        scratch.retain(|&number| {
            let fresh = state.left.contains(number) && !state.asked.contains_key(&number);
            if fresh {
                state.asked.insert(number, now);
            }
            fresh
        });
        Ok(())
    }
}

impl Board {
    /// The guest may run from here on although `list` is missing.
    pub(super) fn new(context: &Context, list: &MissingList) -> Result<Self, MigrationError> {
        let memory = context.guest.expect_pages(&list.pages).doing("preparing memory for post-copy")?;
        let mut disks = Vec::new();
        for (number, (disk, bitmap)) in context.guest.disks().iter().zip(&list.disks).enumerate() {
            let missing = disk.expect_blocks(bitmap).doing("preparing a disk for post-copy")?;
            disks.push(Item::new(format!("blocks of disk {number}"), missing, bitmap.clone()));
        }
        Ok(Self {
            memory: Item::new("pages".to_owned(), memory, list.pages.clone()),
            disks,
            latencies: Mutex::new(Latencies::new()),
            finished: AtomicBool::new(false),
        })
    }

    fn items(&self) -> impl Iterator<Item = (Option<u16>, &Item)> {
        [(None, &self.memory)].into_iter().chain((0u16..).map(Some).zip(&self.disks))
    }

    /// Descriptors that become readable when the guest waits for something.
    pub(super) fn ready(&self) -> Vec<BorrowedFd<'_>> {
        self.items().map(|(_, item)| item.missing.ready()).collect()
    }

    /// Calls `ask` with everything that the guest has begun to wait for.
    pub(super) fn wanted(
        &self,
        scratch: &mut Vec<u64>,
        mut ask: impl FnMut(Option<u16>, u64) -> Result<(), MigrationError>,
    ) -> Result<(), MigrationError> {
        for (disk, item) in self.items() {
            item.wanted(scratch)?;
            scratch.iter().try_for_each(|&number| ask(disk, number))?;
        }
        Ok(())
    }

    /// What was asked for and has not come: to be asked for again in a new session.
    pub(super) fn asked(&self) -> Vec<(Option<u16>, u64)> {
        let asked = |(disk, item): (Option<u16>, &Item)| {
            locked(&item.state).asked.keys().map(|&number| (disk, number)).collect::<Vec<_>>()
        };
        self.items().flat_map(asked).collect()
    }

    /// Pages came.
    pub(super) fn pages(&self, first: u64, data: &[u8]) -> Result<(), MigrationError> {
        let count = data.len() as u64 / PAGE_BYTES;
        self.memory.arrive(first..first + count, &self.latencies, |run| {
            let at = |page: u64| ((page - first) * PAGE_BYTES) as usize;
            self.memory.missing.fill(run.start, &data[at(run.start)..at(run.end)]).doing("storing pages")
        })
    }

    /// Pages came that are zero.
    pub(super) fn zero_pages(&self, pages: Range<u64>) -> Result<(), MigrationError> {
        self.memory.arrive(pages, &self.latencies, |run| self.memory.missing.fill_zero(run).doing("zeroing pages"))
    }

    fn disk(&self, number: u16) -> Result<&Item, WireError> {
        let (limit, first) = (self.disks.len() as u64, u64::from(number));
        let outside = WireError::OutOfRange { what: "disks".to_owned(), first, count: 1, limit };
        self.disks.get(usize::from(number)).ok_or(outside)
    }

    /// A block came; its length was checked.
    pub(super) fn block(&self, disk: u16, block: u64, data: &[u8]) -> Result<(), MigrationError> {
        let item = self.disk(disk)?;
        let store = |run: Range<u64>| item.missing.fill(run.start, data).doing("writing a disk");
        item.arrive(block..block + 1, &self.latencies, store)
    }

    /// Blocks came that are zero.
    pub(super) fn zero_blocks(&self, disk: u16, blocks: Range<u64>) -> Result<(), MigrationError> {
        let item = self.disk(disk)?;
        let store = |run: Range<u64>| item.missing.fill_zero(run).doing("punching a hole into a disk");
        item.arrive(blocks, &self.latencies, store)
    }

    /// What has not arrived.
    pub(super) fn left(&self) -> MissingList {
        let left = |item: &Item| locked(&item.state).left.clone();
        MissingList { pages: left(&self.memory), disks: self.disks.iter().map(left).collect() }
    }

    /// Whether everything has.
    pub(super) fn is_complete(&self) -> bool {
        self.items().all(|(_, item)| locked(&item.state).count == 0)
    }

    /// Nobody waits from here on: all has arrived, or none of it matters. Blocks are on stable storage afterwards.
    pub(super) fn finish(&self) -> Result<(), MigrationError> {
        if self.finished.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let mut result = Ok(());
        for (_, item) in self.items() {
            result = result.and(item.missing.finish().doing("ending post-copy"));
        }
        result
    }

    /// What was measured.
    pub(super) fn figures(&self) -> PostcopyFigures {
        let latencies = locked(&self.latencies);
        PostcopyFigures {
            faults: latencies.count,
            fault_ns_p50: latencies.quantile(0.5),
            fault_ns_p99: latencies.quantile(0.99),
            pushed_pages: locked(&self.memory.state).pushed,
        }
    }
}

/// Steps in each doubling: quantiles are right within one in sixteen.
const STEPS: u64 = 16;

/// A histogram with logarithmic buckets.
struct Latencies {
    buckets: Vec<u64>,
    count: u64,
}

impl Latencies {
    fn new() -> Self {
        Self { buckets: vec![0; 64 * STEPS as usize], count: 0 }
    }

    fn bucket(nanoseconds: u64) -> usize {
        let value = nanoseconds.max(STEPS);
        let exponent = u64::from(value.ilog2());
        let step = (value >> (exponent - u64::from(STEPS.ilog2()))) - STEPS;
        (exponent * STEPS + step) as usize
    }

    fn add(&mut self, time: Duration) {
        let bucket = Self::bucket(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        self.buckets[bucket] += 1;
        self.count += 1;
    }

    /// The middle of the bucket that holds the quantile; 0 if there is none.
    fn quantile(&self, share: f64) -> u64 {
        let rank = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (bucket, &count) in (0u64..).zip(&self.buckets) {
            seen += count;
            if count > 0 && seen >= rank {
                let (exponent, step) = (bucket / STEPS, bucket % STEPS);
                let width = 1u64 << (exponent - u64::from(STEPS.ilog2()));
                return (STEPS + step) * width + width / 2;
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_within_a_sixteenth() {
        let mut latencies = Latencies::new();
        for microseconds in 1..=1000 {
            latencies.add(Duration::from_micros(microseconds));
        }
        for (share, expected) in [(0.5, 500_000.0), (0.99, 990_000.0), (0.001, 1_000.0)] {
            let found = latencies.quantile(share) as f64;
            assert!((found / expected - 1.0).abs() < 1.0 / 16.0, "{share}: {found}");
        }
        latencies.add(Duration::MAX);
        latencies.add(Duration::ZERO);
        assert_eq!(Latencies::new().quantile(0.5), 0);
    }
}
