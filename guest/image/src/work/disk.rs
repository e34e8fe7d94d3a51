//! Disk work: drives the verifier's jobs through the block device, several at once and without waiting for any.

use super::rate::{Meter, Pace};
use crate::oracle::verifier::{self, CHUNK_BYTES, Counters, Job, Verifier};
use crate::say;
use crate::time::Next;
use crate::virtio::block::{Block, Operation, REQUESTS};

const CHUNKS_PER_MIB: u64 = (1 << 20) / CHUNK_BYTES as u64;
/// Chunks completed, or begun, in one pass of the main loop: comparing or making one takes some 30 us.
const CHUNKS_A_PASS: usize = 4;
/// Chunks that may be begun at once after a pause.
const BURST: u64 = 16;
/// The account of the area takes 8 bytes for each chunk; this keeps it to 1 MiB of the heap.
const CHUNKS_MAX: u64 = 128 << 10;
/// Errors that are reported on the serial port; all are counted.
const REPORTS_MAX: u32 = 8;

/// The state of the disk work.
pub struct Disk {
    device: Block,
    verifier: Verifier,
    jobs: [Job; REQUESTS],
    pace: Pace,
    written: Meter,
    reports_left: u32,
}

impl Disk {
    /// On `device`, idle.
    pub fn new(device: Block) -> Self {
        Self {
            device,
            verifier: Verifier::new(),
            jobs: [Job::Flush; REQUESTS],
            pace: Pace::new(BURST),
            written: Meter::default(),
            reports_left: REPORTS_MAX,
        }
    }

    /// Sets size of the area and rate of the writer; the size that it has then, in MiB.
    pub fn set(&mut self, mib: u32, mib_per_second: u32) -> u32 {
        let disk = if self.device.read_only() { 0 } else { self.device.bytes() / CHUNK_BYTES as u64 };
        let chunks = (u64::from(mib) * CHUNKS_PER_MIB).min(disk).min(CHUNKS_MAX);
        self.verifier.resize(chunks as usize);
        self.pace.set(if chunks == 0 { 0 } else { u64::from(mib_per_second) * CHUNKS_PER_MIB });
        (chunks / CHUNKS_PER_MIB) as u32
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        self.verifier.counters()
    }

    /// Measured rate of the writer in MiB/s.
    pub fn mib_per_second(&self) -> u32 {
        ((self.written.per_second() + CHUNKS_PER_MIB / 2) / CHUNKS_PER_MIB) as u32
    }

    /// Completes what the device has done and queues what is due.
    pub fn poll(&mut self, now: u64) -> Next {
        self.device.acknowledge();
        self.written.update(now);
        self.pace.update(now);
        let completed = (0..CHUNKS_A_PASS).take_while(|_| self.complete()).count();
        let mut begun = 0;
        let next = loop {
            if !self.device.has_room() {
                break Next::Never;
            }
            if begun == CHUNKS_A_PASS {
                break Next::Now;
            }
            if !self.begin() {
                break self.pace.due(now, 1).map_or(Next::Never, Next::At);
            }
            begun += 1;
        };
        self.device.finish();
        if completed == CHUNKS_A_PASS { Next::Now } else { next }
    }

    /// Switches the device's interrupt on or off, and says whether a request is over already.
    pub fn set_interrupts(&mut self, enable: bool) -> bool {
        self.device.set_interrupts(enable)
    }

    /// Queues one job, if one is due.
    fn begin(&mut self) -> bool {
        let may_begin = self.pace.take(1);
        let job = self.verifier.next(may_begin);
        if may_begin && !matches!(job, Some((_, true))) {
            self.pace.give_back(1);
        }
        let Some((job, _)) = job else {
            return false;
        };
        let place = |chunk: usize| (chunk * CHUNK_BYTES) as u64;
        let operation = match job {
            Job::CheckOld { chunk, .. } | Job::ReadBack { chunk, .. } => Operation::Read(place(chunk)),
            Job::Write { chunk, .. } => Operation::Write(place(chunk)),
            Job::Flush if !self.device.can_flush() => {
                self.verifier.finish(job, Ok(()), &[]);
                return true;
            }
            Job::Flush => Operation::Flush,
        };
        let request = self.device.submit(operation, |data| {
            if let Job::Write { chunk, sequence } = job {
                verifier::fill(chunk, sequence, data);
            }
        });
        match request {
            Some(request) => self.jobs[request] = job,
            None => self.verifier.finish(job, Err(()), &[]),
        }
        true
    }

    /// Completes one request, if one is over.
    fn complete(&mut self) -> bool {
        let Self { device, verifier, jobs, written, reports_left, .. } = self;
        let before = verifier.counters();
        let job = device.poll(|request, succeeded, data| {
            let job = jobs[request];
            verifier.finish(job, if succeeded { Ok(()) } else { Err(()) }, data);
            written.count(u64::from(succeeded && matches!(job, Job::Write { .. })));
            job
        });
        let after = verifier.counters();
        if (before.io_errors, before.defects) != (after.io_errors, after.defects) && *reports_left != 0 {
            *reports_left -= 1;
            say!("headroom-guest disk: {job:?}: {} requests failed, {:?}", after.io_errors, after.defects);
        }
        job.is_some()
    }
}
