//! A round: what is to be carried, and what was.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::mirroring::Mirror;
use crate::error::{Doing, MigrationError};
use crate::guest::{DiskLayout, SourceDisk};
use crate::page::{Bitmap, SharedBitmap};
use crate::transport::channels::Channel;
use crate::wire::message::Totals;

/// One round, as all workers get it.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) round: u32,
    pub(super) last: bool,
    pub(super) memory: Arc<MemoryWork>,
    pub(super) disk: Arc<DiskWork>,
    /// Writes of the guest wait, and are sent as they come.
    pub(super) mirror: Option<Mirror>,
}

/// What one worker did in one round.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    /// Pages or blocks sent with data, and sent as zeroes.
    pub(super) totals: Totals,
    /// Of the pages with data, those that were sent as differences.
    pub(super) differences: u64,
    /// Pages looked at, and those of them that were zero, sent or not.
    pub(super) looked: u64,
    pub(super) zeroes: u64,
    /// On the wire, before TLS.
    pub(super) bytes: u64,
    /// Of page or block data.
    pub(super) data_bytes: u64,
    /// Of zeroes that were not sent.
    pub(super) skipped_bytes: u64,
    /// Of block data that the destination held already.
    pub(super) reused_bytes: u64,
    /// Blocks that were sent while a write of the guest waited for that.
    pub(super) mirrored: u64,
    /// From the start of the round until the acknowledgement, without waiting for writes.
    pub(super) busy: Duration,
    /// From the end of sending until the acknowledgement.
    pub(super) settle: Duration,
}

impl Share {
    pub(super) fn add(&mut self, other: &Share) {
        self.totals.data += other.totals.data;
        self.totals.zero += other.totals.zero;
        self.differences += other.differences;
        self.looked += other.looked;
        self.zeroes += other.zeroes;
        self.bytes += other.bytes;
        self.data_bytes += other.data_bytes;
        self.skipped_bytes += other.skipped_bytes;
        self.mirrored += other.mirrored;
        self.busy = self.busy.max(other.busy);
        self.settle = self.settle.max(other.settle);
    }

    /// What was carried after this, in the same round and on the same channel.
    pub(super) fn follow(&mut self, next: &Share) {
        let busy = self.busy + next.busy + next.settle;
        self.add(next);
        (self.busy, self.settle) = (busy, next.settle);
    }
}

/// What both kinds of worker do to carry out a round.
pub(super) trait Carry: Send + 'static {
    fn carry(&mut self, job: &Job, channel: &mut Channel) -> Result<Share, MigrationError>;

    /// What was carried has been acknowledged.
    fn acknowledged(&mut self, job: &Job);

    /// Waits for more that belongs to the round, and carries it. `None` if nothing will come.
    fn carry_on(&mut self, job: &Job, channel: &mut Channel) -> Result<Option<Share>, MigrationError> {
        let _ = (job, channel);
        Ok(None)
    }
}

/// The pages of one round, shared by all memory channels: each takes the next run when it has room.
pub(super) struct MemoryWork {
    pages: Bitmap,
    /// Named as free since they were collected.
    free: Arc<SharedBitmap>,
    next: Mutex<u64>,
}

impl MemoryWork {
    pub(super) fn new(pages: Bitmap) -> Self {
        Self { free: Arc::new(SharedBitmap::new(pages.len())), pages, next: Mutex::new(0) }
    }

    pub(super) fn free(&self) -> &Arc<SharedBitmap> {
        &self.free
    }

    pub(super) fn count(&self) -> u64 {
        self.pages.count()
    }

    pub(super) fn take(&self, limit: usize) -> Option<Range<u64>> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let run = self.pages.next_run(*next, limit as u64)?;
        *next = run.end;
        Some(run)
    }
}

/// The blocks of one round, disk by disk.
#[derive(Default)]
pub(super) struct DiskWork {
    /// Blocks to read and send.
    pub(super) data: Vec<Bitmap>,
    /// Blocks known to be holes: sent as zeroes without being read, since the destination's file may be an old one.
    pub(super) holes: Vec<Vec<Range<u64>>>,
}

impl DiskWork {
    /// Everything: what the file system has data for, and the holes between.
    pub(super) fn everything(disks: &[Arc<dyn SourceDisk>], layout: &[DiskLayout]) -> Result<Self, MigrationError> {
        let mut work = Self::default();
        for (disk, layout) in disks.iter().zip(layout) {
            let blocks = layout.blocks();
            let (mut data, mut holes, mut from) = (Bitmap::new(blocks), Vec::new(), 0);
            while from < blocks {
                let run = disk.next_data(from).doing("looking for data on a disk")?.unwrap_or(blocks..blocks);
                let (start, end) = (run.start.clamp(from, blocks), run.end.clamp(from, blocks));
                if from < start {
                    holes.push(from..start);
                }
                data.insert_range(start..end);
                from = end.max(start);
                if run.is_empty() && start < blocks {
                    data.insert_range(start..blocks);
                    break;
                }
            }
            work.data.push(data);
            work.holes.push(holes);
        }
        Ok(work)
    }

    /// Only what the guest has written.
    pub(super) fn dirty(data: Vec<Bitmap>) -> Self {
        let holes = vec![Vec::new(); data.len()];
        Self { data, holes }
    }

    pub(super) fn count(&self) -> u64 {
        self.data.iter().map(Bitmap::count).sum()
    }
}
