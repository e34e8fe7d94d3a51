//! A split virtqueue as the workers use it: over `virtio_queue`, with every rule of a chain checked.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, Segment};
use super::interrupt::Interrupt;
use super::state::QueueStateV1;
use crate::memory::GuestRam;

/// More descriptors or segments than this in one chain are taken for an attack: no driver of ours or of Linux comes near, and
/// `readv` takes no more (`UIO_MAXIOV`). An empty descriptor has no segment, and is read all the same: an indirect table has room for
/// 65,535 of them, and each entry of the queue can name it.
pub const MAX_SEGMENTS: usize = 1024;

/// The driver does not want interrupts (virtio 1.2, section 2.7.6); meaningful without `EVENT_IDX`.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// The rules of the ring were broken. The device needs a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The ring itself.
    #[error("the available index is further ahead than the queue is long, or a ring is not in RAM")]
    Ring,
    /// A chain.
    #[error("descriptor chain {0} is cut, endless, too long, out of RAM, or has readable parts after writable ones")]
    Chain(u16),
}

/// One live queue.
pub struct VirtQueue {
    queue: Queue,
    ram: GuestRam,
    interrupt: Arc<Interrupt>,
    broken: bool,
}

impl VirtQueue {
    /// A queue as the driver has set it up, or as it was saved; `None` if its size or addresses are impossible.
    pub fn new(
        state: &QueueStateV1,
        max_size: u16,
        event_idx: bool,
        ram: &GuestRam,
        interrupt: &Arc<Interrupt>,
    ) -> Option<Self> {
        let queue = Queue::try_from(QueueState {
            max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.descriptors,
            avail_ring: state.available,
            used_ring: state.used,
        })
        .ok()?;
        // `is_valid` would add sizes to addresses near the end of the address space without a check of its own.
        let far = u64::MAX - (1 << 32);
        let near = [state.descriptors, state.available, state.used].iter().all(|&address| address < far);
        (near && queue.is_valid(ram)).then(|| Self {
            queue,
            ram: ram.clone(),
            interrupt: Arc::clone(interrupt),
            broken: false,
        })
    }

    /// (next available, next used) index.
    pub fn progress(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Gives the queue up and tells the driver.
    fn fail(&mut self, error: QueueError) {
        if !self.broken {
            tracing::warn!(%error, "the guest broke a virtqueue: the device waits for a reset");
        }
        self.broken = true;
        self.interrupt.mark_needs_reset();
    }

    /// Gives the queue up because of a chain that makes no request.
    pub fn refuse(&mut self, head: u16) {
        self.fail(QueueError::Chain(head));
    }

    /// Gives the queue up because the device behind it has failed.
    pub fn give_up(&mut self) {
        self.broken = true;
        self.interrupt.mark_needs_reset();
    }

    /// Takes the next chain into `chain`, whose vectors are reused. False if there is none, or the queue is broken.
    pub fn pop(&mut self, chain: &mut Chain) -> bool {
        if self.broken {
            return false;
        }
        match self.try_pop(chain) {
            Ok(popped) => popped,
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    fn try_pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        chain.readable.clear();
        chain.writable.clear();
        let mut iterator = self.queue.iter(&self.ram).map_err(|_| QueueError::Ring)?;
        let Some(descriptors) = iterator.next() else { return Ok(false) };
        chain.head = descriptors.head_index();
        let wrong = QueueError::Chain(chain.head);
        let mut ended = false;
        for (count, descriptor) in (1..).zip(descriptors) {
            let into = if descriptor.is_write_only() { &mut chain.writable } else { &mut chain.readable };
            let bytes = descriptor.len() as usize;
            if !Segment::resolve(&self.ram, descriptor.addr().0, bytes, into) {
                return Err(wrong);
            }
            let disordered = !descriptor.is_write_only() && !chain.writable.is_empty();
            let segments = chain.readable.len() + chain.writable.len();
            if disordered || segments.max(count) > MAX_SEGMENTS {
                return Err(wrong);
            }
            // An iterator that stops after a descriptor that names a next one has met a loop or a wrong index.
            ended = !descriptor.has_next();
        }
        if ended { Ok(true) } else { Err(wrong) }
    }

    /// Gives the last `count` chains back: they will be popped again.
    pub fn unpop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Puts a chain into the used ring; `written` bytes of its writable segments were written.
    pub fn push_used(&mut self, head: u16, written: u32) {
        if !self.broken && self.queue.add_used(&self.ram, head, written).is_err() {
            self.fail(QueueError::Chain(head));
        }
    }

    /// Interrupts the driver if it wants to know of what was put into the used ring since the last call.
    pub fn signal(&mut self) {
        if self.broken {
            return;
        }
        match self.wants_interrupt() {
            Ok(true) => self.interrupt.used_buffer(),
            Ok(false) => {}
            Err(error) => self.fail(error),
        }
    }

    fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        if !self.queue.needs_notification(&self.ram).map_err(|_| QueueError::Ring)? {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return Ok(true);
        }
        let flags: u16 =
            self.ram.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed).map_err(|_| QueueError::Ring)?;
        Ok(flags & AVAIL_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to notify while the queue is being worked off.
    pub fn mute(&mut self) {
        if !self.broken && self.queue.disable_notification(&self.ram).is_err() {
            self.fail(QueueError::Ring);
        }
    }

    /// Asks the driver to notify; true if chains have arrived meanwhile, and must be looked at.
    pub fn listen(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&self.ram) {
            Ok(more) => more,
            Err(_) => {
                self.fail(QueueError::Ring);
                false
            }
        }
    }
}
