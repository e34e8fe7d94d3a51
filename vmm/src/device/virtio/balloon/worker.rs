//! The balloon's thread: takes pages from the guest.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::page::SharedBitmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::hint::Hinting;
use super::reclaim::{frames, whole_pages};
use super::statistics::{BYTES_MAX, Statistics};
use super::{BATCH, QUEUES, feature, field, queue};
use crate::device::virtio::{Backend, Chain, Interrupt, VirtQueue};
use crate::memory::Memory;

/// What passed since the process started, in bytes.
#[derive(Debug, Default)]
pub struct BalloonCounters {
    /// Given back by inflating.
    pub inflated: AtomicU64,
    /// Given back by reports.
    pub reported: AtomicU64,
    /// Named as free to migrations.
    pub hinted: AtomicU64,
}

/// The configuration space, shared with the registers.
#[derive(Clone, Debug)]
pub struct ConfigSpace(pub Arc<Mutex<Vec<u8>>>);

impl Default for ConfigSpace {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(vec![0; field::BYTES])))
    }
}

impl ConfigSpace {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A field.
    pub fn get(&self, field: usize) -> u32 {
        let bytes = self.lock();
        bytes.get(field..).and_then(|rest| rest.first_chunk()).map_or(0, |&bytes| u32::from_le_bytes(bytes))
    }

    /// Changes a field.
    pub fn set(&self, field: usize, value: u32) {
        if let Some(place) = self.lock().get_mut(field..).and_then(|rest| rest.first_chunk_mut()) {
            *place = value.to_le_bytes();
        }
    }
}

/// What the worker is made of.
pub struct Parts {
    /// All of the machine's memory.
    pub memory: Memory,
    /// For changes of the configuration space.
    pub interrupt: Arc<Interrupt>,
    /// The configuration space.
    pub config: ConfigSpace,
    /// What passes.
    pub counters: Arc<BalloonCounters>,
    /// The last id of a session of free page hints; shared with whoever saves the balloon.
    pub hint_id: Arc<AtomicU32>,
}

/// State of the thread.
pub struct BalloonWorker {
    epoll: Epoll,
    /// Watched for edges, never read; written to come back to what a batch has left.
    kicks: [EventFd; QUEUES],
    queues: [Option<VirtQueue>; QUEUES],
    parts: Parts,
    hinting: Hinting,
    free: Option<Arc<SharedBitmap>>,
    /// The driver's list of figures, kept until new ones are wanted.
    held: Option<u16>,
    statistics: Statistics,
    can_hint: bool,
    paused: bool,
    /// The configuration has changed while paused.
    changed: bool,
    chain: Chain,
    scratch: Vec<u32>,
    runs: Vec<Range<u64>>,
}

// SAFETY: the chain points into guest RAM, see `Segment`, and is only used within a call.
unsafe impl Send for BalloonWorker {}

impl BalloonWorker {
    /// For a balloon that has not been started by its driver.
    pub fn new(kicks: [EventFd; QUEUES], parts: Parts) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for (token, kick) in (0u64..).zip(&kicks) {
            let edge = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
            epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), edge)?;
        }
        let hinting = Hinting::new(parts.hint_id.load(Ordering::SeqCst));
        Ok(Self {
            epoll,
            kicks,
            queues: Default::default(),
            parts,
            hinting,
            free: None,
            held: None,
            statistics: Statistics::default(),
            can_hint: false,
            paused: false,
            changed: false,
            chain: Chain::default(),
            scratch: Vec::new(),
            runs: Vec::new(),
        })
    }

    /// Serves a batch of one queue.
    fn serve(&mut self, index: usize) {
        if self.paused {
            return;
        }
        let Some(Some(mut queue)) = self.queues.get_mut(index).map(Option::take) else { return };
        queue.mute();
        let mut full = true;
        for _ in 0..BATCH {
            if !queue.pop(&mut self.chain) {
                if queue.listen() {
                    continue;
                }
                full = false;
                break;
            }
            self.take(index, &mut queue);
        }
        queue.signal();
        self.queues[index] = Some(queue);
        // Others have their turn before the rest: the other queues, and whoever wants to pause the balloon.
        if full && let Err(error) = self.kicks[index].write(1) {
            tracing::error!(%error, "cannot come back to a queue of the balloon");
        }
    }

    /// Does what a chain asks for.
    fn take(&mut self, index: usize, queue: &mut VirtQueue) {
        let head = self.chain.head;
        let fine = match index {
            queue::INFLATE => self.inflate(),
            queue::STATISTICS => {
                self.read_statistics();
                // It goes back when new figures are wanted; a driver that offers a second list gets the first one back.
                if let Some(earlier) = self.held.replace(head) {
                    queue.push_used(earlier, 0);
                }
                return;
            }
            queue::HINTS => self.take_hints(),
            queue::REPORTS => self.take_reports(),
            // Deflating (queue 1) needs nothing: a page comes back when it is touched.
            _ => true,
        };
        if fine {
            queue.push_used(head, 0);
        } else {
            queue.refuse(head);
        }
    }

    fn inflate(&mut self) -> bool {
        if !frames(&self.chain.readable, &mut self.scratch, &mut self.runs) {
            return false;
        }
        let given = self.give_back();
        self.parts.counters.inflated.fetch_add(given, Ordering::Relaxed);
        true
    }

    fn take_reports(&mut self) -> bool {
        if !self.find_pages() {
            return false;
        }
        // What the guest expects in its free pages, a page of the host's does not hold.
        if self.parts.config.get(field::POISON) == 0 {
            let given = self.give_back();
            self.parts.counters.reported.fetch_add(given, Ordering::Relaxed);
        }
        true
    }

    fn take_hints(&mut self) -> bool {
        let mut id = [0; 4];
        if Chain::copy_out(&self.chain.readable, 0, &mut id) == id.len() {
            self.hinting.guest_says(u32::from_le_bytes(id));
        }
        if !self.find_pages() {
            return false;
        }
        if self.hinting.counts()
            && self.parts.config.get(field::POISON) == 0
            && let Some(free) = &self.free
        {
            for run in self.runs.drain(..) {
                let Some(pages) = self.parts.memory.page_numbers(run) else { continue };
                let bytes = (pages.end - pages.start) * super::PAGE_BYTES;
                self.parts.counters.hinted.fetch_add(bytes, Ordering::Relaxed);
                for page in pages {
                    free.insert(page);
                }
            }
        }
        true
    }

    /// The pages of the chain's writable segments. False if they are more than the machine has: they overlap, and a guest could
    /// keep this thread busy for ever.
    fn find_pages(&mut self) -> bool {
        self.runs.clear();
        let segments = &self.chain.writable;
        if Chain::bytes(segments) as u64 > self.parts.memory.bytes() {
            return false;
        }
        self.runs.extend(segments.iter().map(whole_pages).filter(|run| !run.is_empty()));
        true
    }

    /// Gives the runs back to the host; returns how many bytes.
    fn give_back(&mut self) -> u64 {
        let mut given = 0;
        for run in self.runs.drain(..) {
            match self.parts.memory.give_back(run) {
                Ok(bytes) => given += bytes,
                // The guest keeps what it would have given.
                Err(error) => tracing::warn!(%error, "cannot give memory of the guest back to the host"),
            }
        }
        given
    }

    fn read_statistics(&mut self) {
        let mut list = [0; BYTES_MAX];
        let length = Chain::copy_out(&self.chain.readable, 0, &mut list);
        self.statistics = Statistics::parse(&list[..length]);
    }

    /// The latest figures; asks for new ones.
    pub fn statistics(&mut self) -> Statistics {
        if !self.paused
            && let Some(queue) = &mut self.queues[queue::STATISTICS]
            && let Some(head) = self.held.take()
        {
            queue.push_used(head, 0);
            queue.signal();
        }
        self.statistics
    }

    fn config_changed(&mut self) {
        if self.paused {
            self.changed = true;
        } else {
            self.parts.interrupt.config_changed();
        }
    }

    /// Asks the guest to give so many pages back.
    pub fn set_target(&mut self, pages: u32) {
        self.parts.config.set(field::TARGET, pages);
        self.config_changed();
    }

    fn show_command(&mut self) {
        self.parts.config.set(field::COMMAND, self.hinting.shown());
        self.config_changed();
    }

    /// Asks the guest for the pages that are free from now on. False if its driver does not know of that.
    pub fn start_hints(&mut self, free: Arc<SharedBitmap>) -> bool {
        if !self.can_hint || self.queues[queue::HINTS].is_none() || self.parts.config.get(field::POISON) != 0 {
            return false;
        }
        self.hinting.start();
        self.parts.hint_id.store(self.hinting.last(), Ordering::SeqCst);
        self.free = Some(free);
        self.show_command();
        true
    }

    /// Whether the guest has named all that it has.
    pub fn hints_are_over(&self) -> bool {
        self.hinting.is_over()
    }

    /// From here on nothing is named any more; `done`: nor will it be again.
    pub fn stop_hints(&mut self, done: bool) {
        self.free = None;
        let before = self.hinting.shown();
        if done {
            self.hinting.finish();
        } else {
            self.hinting.stop();
        }
        if self.can_hint && before != self.hinting.shown() {
            self.show_command();
        }
    }
}

impl Backend for BalloonWorker {
    fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    fn ready(&mut self, token: u64) {
        self.serve(token as usize);
    }

    fn activate(&mut self, features: u64, queues: Vec<Option<VirtQueue>>) {
        self.can_hint = features & feature::HINTS != 0;
        self.held = None;
        for (place, queue) in self.queues.iter_mut().zip(queues) {
            *place = queue;
        }
        (0..QUEUES).for_each(|index| self.serve(index));
    }

    fn pause(&mut self) {
        if !self.paused
            && self.held.take().is_some()
            && let Some(queue) = &mut self.queues[queue::STATISTICS]
        {
            // Whoever goes on, here or elsewhere, takes it again.
            queue.unpop(1);
        }
        self.paused = true;
    }

    fn run(&mut self) {
        self.paused = false;
        if std::mem::take(&mut self.changed) {
            self.parts.interrupt.config_changed();
        }
        (0..QUEUES).for_each(|index| self.serve(index));
    }

    fn stop_queue(&mut self, index: usize) {
        self.queues[index] = None;
        if index == queue::STATISTICS {
            self.held = None;
        }
    }

    fn reset(&mut self) {
        self.free = None;
        self.can_hint = false;
        self.hinting.stop();
        self.statistics = Statistics::default();
        for field in [field::ACTUAL, field::COMMAND, field::POISON] {
            self.parts.config.set(field, 0);
        }
    }

    fn progress(&self) -> Vec<Option<(u16, u16)>> {
        self.queues.iter().map(|queue| queue.as_ref().map(VirtQueue::progress)).collect()
    }
}
