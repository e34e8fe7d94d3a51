//! A disk over a vector.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::absent::Arrivals;
use super::{Absent, Faults};
use crate::guest::{
    BLOCK_BYTES, BlockReader, BlockWriter, DestinationDisk, DiskLayout, GuestResult, Missing, SourceDisk,
};
use crate::mirror::{Bell, Gate, HOLD_MOST, Ticket};
use crate::page::Bitmap;

/// Blocks, and which of them were written. A block that was never written is a hole.
pub struct FakeDisk {
    layout: DiskLayout,
    blocks: Mutex<Vec<Option<Vec<u8>>>>,
    dirty: Mutex<Bitmap>,
    tracking: AtomicBool,
    /// Which writes may be answered.
    pub gate: Gate,
    /// Its writes cannot be mirrored.
    pub refuses_mirroring: AtomicBool,
    /// The last write, if it waits.
    unanswered: Mutex<Option<(Ticket, Instant)>>,
    faults: Arc<Faults>,
    /// Blocks written since the last durable flush.
    unflushed: AtomicU64,
    /// Requests in flight of a reader or writer.
    pub depth: usize,
    /// Blocks that have not arrived: the guest waits for them.
    pub absent: Arc<Absent>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeDisk {
    /// An empty disk.
    pub fn new(layout: DiskLayout, faults: Arc<Faults>) -> Arc<Self> {
        let blocks = layout.blocks();
        Arc::new(Self {
            blocks: Mutex::new(vec![None; blocks as usize]),
            dirty: Mutex::new(Bitmap::new(blocks)),
            tracking: AtomicBool::new(false),
            gate: Gate::default(),
            refuses_mirroring: AtomicBool::new(false),
            unanswered: Mutex::default(),
            layout,
            faults,
            unflushed: AtomicU64::new(0),
            depth: 8,
            absent: Absent::new(),
        })
    }

    /// The guest writes a block.
    pub fn guest_write(&self, block: u64, data: Vec<u8>) {
        self.absent.wait(block);
        let mut blocks = locked(&self.blocks);
        blocks[block as usize] = Some(data);
        if self.tracking.load(Ordering::SeqCst) {
            locked(&self.dirty).insert(block);
        }
        if let Some(ticket) = self.gate.ticket() {
            *locked(&self.unanswered) = Some((ticket, Instant::now()));
        }
    }

    /// Whether the guest's last write was answered; this guest waits for that before the next.
    pub fn is_answered(&self) -> bool {
        let mut unanswered = locked(&self.unanswered);
        let waits = unanswered.is_some_and(|(ticket, since)| !self.gate.passes(ticket) && since.elapsed() < HOLD_MOST);
        if !waits {
            *unanswered = None;
        }
        !waits
    }

    /// What a block holds; `None` is a hole.
    pub fn block(&self, block: u64) -> Option<Vec<u8>> {
        self.absent.wait(block);
        locked(&self.blocks)[block as usize].clone()
    }

    /// Puts something into a block behind everyone's back, as an old image or a fault would.
    pub fn poke(&self, block: u64, data: Vec<u8>) {
        locked(&self.blocks)[block as usize] = Some(data);
    }

    /// Starts or stops the recording of written blocks.
    pub fn track(&self, on: bool) {
        self.tracking.store(on, Ordering::SeqCst);
    }

    /// Whether writes are recorded.
    pub fn is_tracking(&self) -> bool {
        self.tracking.load(Ordering::SeqCst)
    }

    /// Blocks that were written and are not on stable storage.
    pub fn unflushed(&self) -> u64 {
        self.unflushed.load(Ordering::SeqCst)
    }

    fn collect(&self, into: &mut Bitmap) {
        self.gate.collect();
        let mut dirty = locked(&self.dirty);
        into.union(&dirty);
        dirty.clear();
    }
}

struct Queue {
    disk: Arc<FakeDisk>,
    queued: VecDeque<u64>,
}

impl BlockReader for Queue {
    fn depth(&self) -> usize {
        self.disk.depth
    }

    fn submit(&mut self, block: u64) -> GuestResult<()> {
        self.disk.faults.hit("disk.submit")?;
        self.queued.push_back(block);
        Ok(())
    }

    fn complete(&mut self, take: &mut dyn FnMut(u64, &[u8])) -> GuestResult<bool> {
        // As real queues do, it completes out of order.
        let next = if self.queued.len() % 3 == 2 { self.queued.pop_back() } else { self.queued.pop_front() };
        let Some(block) = next else { return Ok(false) };
        self.disk.faults.hit("disk.complete")?;
        match self.disk.block(block) {
            Some(bytes) => take(block, &bytes),
            None => take(block, &vec![0; self.disk.layout.block_bytes(block) as usize]),
        }
        Ok(true)
    }
}

struct Writer(Arc<FakeDisk>);

impl BlockWriter for Writer {
    fn write(&mut self, block: u64, data: &[u8]) -> GuestResult<()> {
        self.0.faults.hit("disk.write")?;
        assert_eq!(data.len() as u64, self.0.layout.block_bytes(block), "the engine checks the length");
        self.0.poke(block, data.to_vec());
        self.0.unflushed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn zero(&mut self, blocks: Range<u64>) -> GuestResult<()> {
        self.0.faults.hit("disk.zero")?;
        assert!(blocks.end <= self.0.layout.blocks(), "the engine checks the range");
        let mut all = locked(&self.0.blocks);
        all[blocks.start as usize..blocks.end as usize].fill(None);
        self.0.unflushed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn flush(&mut self, durable: bool) -> GuestResult<()> {
        self.0.faults.hit("disk.flush")?;
        if durable {
            self.0.unflushed.store(0, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// One disk as both ends see it.
pub(super) struct Handle(pub(super) Arc<FakeDisk>);

impl SourceDisk for Handle {
    fn start_dirty_tracking(&self) -> GuestResult<()> {
        self.0.faults.hit("disk.start_dirty_tracking")?;
        self.0.track(true);
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        self.0.faults.hit("disk.stop_dirty_tracking")?;
        self.0.track(false);
        Ok(())
    }

    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()> {
        self.0.faults.hit("disk.collect_dirty")?;
        self.0.collect(into);
        Ok(())
    }

    fn start_mirroring(&self, bell: &Arc<Bell>) -> GuestResult<bool> {
        self.0.faults.hit("disk.start_mirroring")?;
        let mirrors = !self.0.refuses_mirroring.load(Ordering::SeqCst);
        if mirrors {
            self.0.gate.shut(Arc::clone(bell));
        }
        Ok(mirrors)
    }

    fn mirrored(&self) {
        self.0.gate.arrive();
    }

    fn stop_mirroring(&self) {
        self.0.gate.open();
    }

    fn next_data(&self, from: u64) -> GuestResult<Option<Range<u64>>> {
        self.0.faults.hit("disk.next_data")?;
        let blocks = locked(&self.0.blocks);
        let count = blocks.len() as u64;
        let Some(start) = (from..count).find(|&block| blocks[block as usize].is_some()) else { return Ok(None) };
        let end = (start..count).find(|&block| blocks[block as usize].is_none()).unwrap_or(count);
        Ok(Some(start..end))
    }

    fn reader(&self) -> GuestResult<Box<dyn BlockReader>> {
        self.0.faults.hit("disk.reader")?;
        Ok(Box::new(Queue { disk: Arc::clone(&self.0), queued: VecDeque::new() }))
    }
}

impl DestinationDisk for Handle {
    fn writer(&self) -> GuestResult<Box<dyn BlockWriter>> {
        self.0.faults.hit("disk.writer")?;
        Ok(Box::new(Writer(Arc::clone(&self.0))))
    }

    fn reader(&self) -> GuestResult<Box<dyn BlockReader>> {
        self.0.faults.hit("disk.reader")?;
        Ok(Box::new(Queue { disk: Arc::clone(&self.0), queued: VecDeque::new() }))
    }

    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()> {
        self.0.faults.hit("disk.collect_dirty")?;
        self.0.collect(into);
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        self.0.faults.hit("disk.stop_dirty_tracking")?;
        self.0.track(false);
        Ok(())
    }

    fn expect_blocks(&self, missing: &Bitmap) -> GuestResult<Arc<dyn Missing>> {
        self.0.faults.hit("disk.expect_blocks")?;
        let disk = Arc::clone(&self.0);
        let store = Box::new(move |block: u64, data: Option<&[u8]>| {
            locked(&disk.blocks)[block as usize] = data.map(<[u8]>::to_vec);
        });
        Ok(Arrivals::expect(&self.0.absent, &self.0.faults, missing, BLOCK, store))
    }
}

/// Bytes of a block, for sizes in tests.
pub(super) const BLOCK: usize = BLOCK_BYTES as usize;
