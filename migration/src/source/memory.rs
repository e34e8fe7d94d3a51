//! One memory channel at the source: pages out of the guest, through the zero test, into TLS.

use std::ops::Range;
use std::sync::Arc;

use super::context::{Context, Sent, Skipped};
use super::job::{Carry, Job, Share};
use crate::control::Control;
use crate::error::{Doing, MigrationError};
use crate::guest::{PAGE_BYTES, SourceGuest};
use crate::page::delta::Copies;
use crate::page::{SharedBitmap, is_zero};
use crate::transport::TransportError;
use crate::transport::channels::Channel;
use crate::transport::limiter::Limiter;
use crate::transport::stop::Stop;
use crate::urgency::Turns;
use crate::wire::frame::{MAX_RUNS, PageRun, RunKind};

const PAGE: usize = PAGE_BYTES as usize;

/// Pages with data in one frame. A quarter of a megabyte and what is encrypted from it stay in the second-level cache.
const BATCH_PAGES: usize = 64;

/// Pages looked at for one frame, if most of them are zero.
const LOOK_PAGES: usize = 2048;

pub(super) struct MemoryWorker {
    guest: Arc<dyn SourceGuest>,
    control: Control,
    stop: Stop,
    limiter: Arc<Limiter>,
    held: Arc<SharedBitmap>,
    skipped: Skipped,
    copies: Arc<Copies>,
    batch: Batch,
    turns: Turns,
}

/// Pages on their way into one frame.
///
/// They are copied out of the guest once, into a buffer that nobody else writes to, although TLS could encrypt straight
/// from guest memory: the guest may be writing at this very moment, and the zero test and the bytes that travel must have
/// seen the same page. A page that changes after the copy is dirty and will be sent again.
struct Batch {
    data: Box<[u8]>,
    /// Pages in `data`.
    filled: usize,
    /// Pages looked at.
    looked: usize,
    /// Pages that were zero.
    zeroes: usize,
    runs: Vec<PageRun>,
}

impl Batch {
    fn room(&self) -> usize {
        if self.looked >= LOOK_PAGES || self.runs.len() + BATCH_PAGES > MAX_RUNS {
            0
        } else {
            BATCH_PAGES - self.filled
        }
    }

    fn clear(&mut self) {
        (self.filled, self.looked, self.zeroes) = (0, 0, 0);
        self.runs.clear();
    }

    fn note(&mut self, page: u64, kind: RunKind) {
        match self.runs.last_mut() {
            Some(run) if run.kind == kind && run.first + u64::from(run.count) == page => run.count += 1,
            _ => self.runs.push(PageRun { first: page, count: 1, kind }),
        }
    }

    /// Pages that the guest does not use: the destination gets zeroes if it holds something else.
    fn skip(&mut self, pages: Range<u64>, held: &SharedBitmap) {
        for page in pages {
            self.looked += 1;
            self.zeroes += 1;
            if held.remove(page) {
                self.note(page, RunKind::Zero);
            }
        }
    }

    fn add(&mut self, guest: &dyn SourceGuest, pages: Range<u64>, held: &SharedBitmap) -> Result<(), MigrationError> {
        let count = (pages.end - pages.start) as usize;
        let start = self.filled;
        let buffer = &mut self.data[start * PAGE..(start + count) * PAGE];
        guest.read_pages(pages.start, buffer).doing("reading guest memory")?;
        self.looked += count;
        for (index, page) in pages.enumerate() {
            let at = (start + index) * PAGE;
            let bytes = &self.data[at..at + PAGE];
            let zero = is_zero(bytes);
            if zero {
                self.zeroes += 1;
                if !held.remove(page) {
                    // The destination holds nothing for it, and its memory began as zeroes.
                    continue;
                }
            } else {
                held.insert(page);
                let to = self.filled * PAGE;
                if to != at {
                    self.data.copy_within(at..at + PAGE, to);
                }
                self.filled += 1;
            }
            self.note(page, if zero { RunKind::Zero } else { RunKind::Data });
        }
        Ok(())
    }

    /// Keeps copies of the pages in `round` and, if `differ`, puts differences from earlier copies in their place. Returns how
    /// many.
    fn copy(&mut self, copies: &Copies, round: u32, differ: bool) -> u64 {
        let (mut at, mut differences) = (0, 0);
        for run in std::mem::take(&mut self.runs) {
            for page in run.first..run.first + u64::from(run.count) {
                if run.kind == RunKind::Zero {
                    copies.forget(page);
                    self.note(page, RunKind::Zero);
                    continue;
                }
                let bytes = &mut self.data[at..at + PAGE];
                at += PAGE;
                if differ && copies.differ(page, round, bytes) {
                    differences += 1;
                    self.note(page, RunKind::Delta);
                } else {
                    copies.keep(page, round, bytes);
                    self.note(page, RunKind::Data);
                }
            }
        }
        differences
    }

    /// The destination gets other contents than what was copied.
    fn forget(&self, copies: &Copies) {
        self.pages().for_each(|page| copies.forget(page));
    }

    fn pages(&self) -> impl Iterator<Item = u64> {
        self.runs.iter().flat_map(|run| run.first..run.first + u64::from(run.count))
    }
}

impl MemoryWorker {
    pub(super) fn new(context: &Context, sent: &Sent, limiter: Arc<Limiter>) -> Self {
        Self {
            guest: Arc::clone(&context.guest),
            control: context.control.clone(),
            stop: context.stop.clone(),
            limiter,
            held: Arc::clone(&sent.held),
            skipped: Arc::clone(&sent.skipped),
            copies: Arc::clone(&sent.copies),
            batch: Batch {
                data: vec![0; BATCH_PAGES * PAGE].into_boxed_slice(),
                filled: 0,
                looked: 0,
                zeroes: 0,
                runs: Vec::with_capacity(BATCH_PAGES),
            },
            turns: Turns::new(),
        }
    }

    /// Takes pages in, without those that are named as free by now.
    fn look(&mut self, pages: Range<u64>, free: &SharedBitmap) -> Result<(), MigrationError> {
        let mut from = pages.start;
        while from < pages.end {
            let is_free = free.contains(from);
            let upto = (from..pages.end).find(|&page| free.contains(page) != is_free).unwrap_or(pages.end);
            // Asked once for each page: what is named between two answers counts as it was at the first one.
            if is_free {
                for page in from..upto {
                    self.skipped.insert(page);
                }
                self.batch.skip(from..upto, &self.held);
            } else {
                self.batch.add(&*self.guest, from..upto, &self.held)?;
            }
            from = upto;
        }
        Ok(())
    }

    /// Sends differences, and keeps copies for later ones, where the link is slow enough.
    fn differ(&mut self, channel: &mut Channel, round: u32) -> u64 {
        let (batch, copies) = (&mut self.batch, &*self.copies);
        if round > 0 && channel.wants_copies() {
            let differ = batch.pages().any(|page| copies.has(page)) && channel.differences_pay();
            return batch.copy(copies, round, differ);
        }
        if !copies.is_unused() {
            batch.forget(copies);
        }
        0
    }

    fn send(&mut self, channel: &mut Channel, round: u32, share: &mut Share) -> Result<(), MigrationError> {
        share.differences += self.differ(channel, round);
        let batch = &mut self.batch;
        if batch.looked == 0 {
            return Ok(());
        }
        if self.stop.is_raised() {
            return Err(TransportError::Stopped.into());
        }
        let data = &batch.data[..batch.filled * PAGE];
        let mut bytes = 0;
        if !batch.runs.is_empty() {
            channel.held_back(self.limiter.wait(|| self.stop.is_raised()));
            bytes = channel.send_pages(&batch.runs, data)?;
            self.limiter.charge(bytes);
        }
        share.totals.data += batch.filled as u64;
        share.totals.zero +=
            batch.runs.iter().filter(|run| run.kind == RunKind::Zero).map(|run| u64::from(run.count)).sum::<u64>();
        share.looked += batch.looked as u64;
        share.zeroes += batch.zeroes as u64;
        share.bytes += bytes;
        share.data_bytes += data.len() as u64;
        self.control.progress(bytes, (batch.looked * PAGE) as u64);
        batch.clear();
        Ok(())
    }
}

impl Carry for MemoryWorker {
    fn carry(&mut self, job: &Job, channel: &mut Channel) -> Result<Share, MigrationError> {
        let mut share = Share::default();
        while let Some(pages) = job.memory.take(self.batch.room()) {
            self.look(pages, job.memory.free())?;
            if self.batch.room() == 0 {
                self.send(channel, job.round, &mut share)?;
                if !job.last {
                    self.turns.pass();
                }
            }
        }
        self.send(channel, job.round, &mut share)?;
        Ok(share)
    }

    fn acknowledged(&mut self, job: &Job) {
        if let Some(mirror) = &job.mirror {
            mirror.memory_done();
        }
    }
}
