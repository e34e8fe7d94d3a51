//! The disk writer and verifier, without a disk: it says what to do next and is told what came of it.
//!
//! It goes over its area in chunks of 64 KiB, again and again. A batch of chunks is read and compared with what the last
//! pass left there, written with new sequence numbers, and flushed; then one of its chunks is read back. So a write that
//! was lost, at once or by a migration much later, is found when its chunk is due again at the latest.

extern crate alloc;

use alloc::vec::Vec;

use super::{Defects, block};

/// Blocks of a chunk, and its bytes: one request to the disk.
pub const CHUNK_BLOCKS: u64 = 16;
pub const CHUNK_BYTES: usize = block::BYTES * CHUNK_BLOCKS as usize;

/// Chunks written between two flushes, 2 MiB.
const BATCH_CHUNKS: usize = 32;

/// One request to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Read a chunk that was written as `sequence`, before it is written again.
    CheckOld { chunk: usize, sequence: u64 },
    /// Write a chunk as `sequence`.
    Write { chunk: usize, sequence: u64 },
    /// Make all that was written durable.
    Flush,
    /// Read a chunk back that was just written and flushed.
    ReadBack { chunk: usize, sequence: u64 },
}

/// Where the current batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Writing,
    Flushing,
    ReadingBack,
}

/// What was counted so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub sequence: u64,
    pub blocks_written: u64,
    pub blocks_checked: u64,
    pub flushes: u64,
    pub io_errors: u64,
    pub defects: Defects,
}

/// The state of writer and verifier.
pub struct Verifier {
    /// The sequence number that each chunk holds; 0 if that is not known.
    sequences: Vec<u64>,
    wanted_chunks: usize,
    cursor: usize,
    phase: Phase,
    /// Chunks of this batch that were begun, and that are over.
    begun: usize,
    done: usize,
    /// A checked chunk that is to be written now.
    to_write: Vec<usize>,
    in_flight: usize,
    counters: Counters,
}

impl Verifier {
    /// A verifier over no chunks.
    pub fn new() -> Self {
        Self {
            sequences: Vec::new(),
            wanted_chunks: 0,
            cursor: 0,
            phase: Phase::Writing,
            begun: 0,
            done: 0,
            to_write: Vec::new(),
            in_flight: 0,
            counters: Counters::default(),
        }
    }

    /// Changes the size of the area; it takes effect with the next batch.
    pub fn resize(&mut self, chunks: usize) {
        self.wanted_chunks = chunks;
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn batch(&self) -> usize {
        BATCH_CHUNKS.min(self.sequences.len())
    }

    fn begin_batch(&mut self) {
        self.phase = Phase::Writing;
        self.begun = 0;
        self.done = 0;
        let missing = self.wanted_chunks.saturating_sub(self.sequences.len());
        if self.sequences.try_reserve_exact(missing).is_err() {
            self.wanted_chunks = self.sequences.len();
        }
        self.sequences.resize(self.wanted_chunks, 0);
        if self.cursor >= self.sequences.len() {
            self.cursor = 0;
        }
    }

    /// What to do next, if anything can be done before the requests in flight come back. `may_begin` says that the rate
    /// allows another chunk to be begun; it was if the job is `CheckOld`, or a `Write` and the second value is true.
    pub fn next(&mut self, may_begin: bool) -> Option<(Job, bool)> {
        if self.begun == 0 && self.in_flight == 0 && self.sequences.len() != self.wanted_chunks {
            self.begin_batch();
        }
        let job = match self.phase {
            Phase::Writing => self.next_write(may_begin),
            Phase::Flushing if self.in_flight == 0 => Some((Job::Flush, false)),
            Phase::ReadingBack if self.in_flight == 0 => {
                let chunk = self.cursor;
                Some((Job::ReadBack { chunk, sequence: self.sequences[chunk] }, false))
            }
            Phase::Flushing | Phase::ReadingBack => None,
        };
        self.in_flight += usize::from(job.is_some());
        job
    }

    fn next_write(&mut self, may_begin: bool) -> Option<(Job, bool)> {
        if let Some(chunk) = self.to_write.pop() {
            return Some((self.write(chunk), false));
        }
        if !may_begin || self.begun >= self.batch() {
            return None;
        }
        let chunk = (self.cursor + self.begun) % self.sequences.len();
        self.begun += 1;
        match self.sequences[chunk] {
            0 => Some((self.write(chunk), true)),
            sequence => Some((Job::CheckOld { chunk, sequence }, true)),
        }
    }

    fn write(&mut self, chunk: usize) -> Job {
        self.counters.sequence += 1;
        // Until the write has come back, the chunk holds nobody knows what.
        self.sequences[chunk] = 0;
        Job::Write { chunk, sequence: self.counters.sequence }
    }

    /// Tells what came of a job. `data` is what was read.
    pub fn finish(&mut self, job: Job, outcome: Result<(), ()>, data: &[u8]) {
        self.in_flight -= 1;
        if outcome.is_err() {
            self.counters.io_errors += 1;
        }
        match job {
            Job::CheckOld { chunk, sequence } => {
                if outcome.is_ok() {
                    self.compare(chunk, sequence, data);
                }
                self.to_write.push(chunk);
            }
            Job::Write { chunk, sequence } => {
                if outcome.is_ok() {
                    self.sequences[chunk] = sequence;
                    self.counters.blocks_written += CHUNK_BLOCKS;
                }
                self.done += 1;
                if self.done == self.batch() {
                    self.phase = Phase::Flushing;
                }
            }
            Job::Flush => {
                self.counters.flushes += u64::from(outcome.is_ok());
                if self.sequences[self.cursor] == 0 { self.end_batch() } else { self.phase = Phase::ReadingBack }
            }
            Job::ReadBack { chunk, sequence } => {
                if outcome.is_ok() {
                    self.compare(chunk, sequence, data);
                }
                self.end_batch();
            }
        }
    }

    fn end_batch(&mut self) {
        self.cursor = (self.cursor + self.batch()) % self.sequences.len().max(1);
        self.begin_batch();
    }

    fn compare(&mut self, chunk: usize, sequence: u64, data: &[u8]) {
        let first = chunk as u64 * CHUNK_BLOCKS;
        for (address, block) in (first..).zip(data.as_chunks::<{ block::BYTES }>().0) {
            self.counters.blocks_checked += 1;
            if let Err(defect) = block::check(block, sequence, address) {
                self.counters.defects.count(defect);
            }
        }
    }
}

/// The content of a [`Job::Write`].
pub fn fill(chunk: usize, sequence: u64, data: &mut [u8]) {
    let first = chunk as u64 * CHUNK_BLOCKS;
    for (address, block) in (first..).zip(data.as_chunks_mut::<{ block::BYTES }>().0) {
        block::write(block, sequence, address);
    }
}
