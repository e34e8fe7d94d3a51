//! The disk's thread: takes requests from the queue, keeps them in flight at the image, and answers them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::answers::{Answer, Answers};
use super::counters::BlockCounters;
use super::request::{Limits, Status, Verdict, identity, parse};
use super::transfer::{BOUNCE_BYTES, Mode, Step, Transfer};
use super::{IN_FLIGHT_MAX, feature};
use crate::device::virtio::{Backend, Chain, Segment, VirtQueue};
use crate::disk::{AlignedBuffer, RawDisk, Ring};
use crate::memory::GuestRam;

/// Bounce buffers in use at once: 1 MiB together.
const BOUNCES_MAX: usize = 8;

/// Requests taken before the worker looks at its control descriptor.
const BATCH_MAX: usize = 1024;

const KICK: u64 = 0;
const RING: u64 = 1;
const LATE: u64 = 2;
const MIRRORED: u64 = 3;
const HELD: u64 = 4;

/// State of the thread.
pub struct BlockWorker {
    /// Dropped, and with that closed, before the transfers whose memory it uses; `drop` has waited for them by then.
    ring: Ring,
    transfers: Vec<Transfer>,
    free: Vec<usize>,
    /// Transfers that wait for a bounce buffer.
    waiting: VecDeque<usize>,
    /// Transfers that wait for blocks which have not arrived yet (post-copy).
    held: Vec<usize>,
    /// Answers to writes that are being mirrored.
    answers: Answers,
    bounces: usize,
    /// One that was used last: a driver that needs one will need it again.
    spare: Option<AlignedBuffer>,
    epoll: Epoll,
    /// Watched for edges, never read; written to come back to what a batch has left.
    kick: EventFd,
    queue: Option<VirtQueue>,
    paused: bool,
    /// The ring failed: nothing works any more.
    dead: bool,
    mode: Mode,
    disk: Arc<RawDisk>,
    ram: GuestRam,
    counters: Arc<BlockCounters>,
    chain: Chain,
    data: Vec<Segment>,
}

impl BlockWorker {
    /// For a device that has not been started by its driver.
    pub fn new(disk: Arc<RawDisk>, ram: GuestRam, kick: EventFd, counters: Arc<BlockCounters>) -> io::Result<Self> {
        let ring = Ring::new(IN_FLIGHT_MAX as u32)?;
        let epoll = Epoll::new()?;
        let watch = |token| EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), watch(KICK))?;
        epoll.ctl(ControlOperation::Add, ring.as_raw_fd(), watch(RING))?;
        if let Some(late) = disk.late() {
            epoll.ctl(ControlOperation::Add, late.arrived_fd(), watch(LATE))?;
        }
        let answers = Answers::new()?;
        epoll.ctl(ControlOperation::Add, disk.mirrored_fd(), watch(MIRRORED))?;
        epoll.ctl(ControlOperation::Add, answers.timer(), watch(HELD))?;
        Ok(Self {
            ring,
            transfers: (0..IN_FLIGHT_MAX).map(|_| Transfer::default()).collect(),
            free: (0..IN_FLIGHT_MAX).collect(),
            waiting: VecDeque::new(),
            held: Vec::new(),
            answers,
            bounces: 0,
            spare: None,
            epoll,
            kick,
            queue: None,
            paused: false,
            dead: false,
            mode: Mode {
                image: disk.image().file().as_raw_fd(),
                alignment: disk.image().buffer_alignment(),
                write_through: false,
            },
            disk,
            ram,
            counters,
            chain: Chain::default(),
            data: Vec::new(),
        })
    }

    /// Takes requests while there are any and there is room, and answers what is done, until nothing more can be done now.
    fn pump(&mut self) {
        self.reap();
        let mut budget = BATCH_MAX;
        loop {
            if self.paused || self.dead || self.free.is_empty() {
                break;
            }
            let Some(queue) = &mut self.queue else { break };
            queue.mute();
            while !self.free.is_empty() && budget > 0 && self.take_one() {
                budget -= 1;
            }
            self.submit();
            self.reap();
            self.signal();
            if budget == 0 {
                // A guest that never stops must not keep out whoever wants to pause or reset the device.
                if let Err(error) = self.kick.write(1) {
                    self.die(&error);
                }
                break;
            }
            // With all slots in use nothing is asked for: the next completion comes back here.
            if !self.free.is_empty() && !self.queue.as_mut().is_some_and(VirtQueue::listen) {
                break;
            }
        }
        self.submit();
        self.signal();
    }

    /// Takes one request and starts it. False if there is none.
    fn take_one(&mut self) -> bool {
        let Some(queue) = &mut self.queue else { return false };
        if !queue.pop(&mut self.chain) {
            return false;
        }
        let image = self.disk.image();
        let limits = Limits { bytes: image.bytes(), read_only: image.is_read_only() };
        let (verdict, status) = parse(&self.chain, limits, &mut self.data);
        let (verdict, status) = match (verdict, status) {
            (Verdict::Malformed, _) | (_, None) => {
                queue.refuse(self.chain.head);
                return false;
            }
            (verdict, Some(status)) => (verdict, status),
        };
        match verdict {
            Verdict::Malformed => {}
            Verdict::Answer { status: code, identity: wanted } => {
                let mut written = 1;
                if wanted {
                    let room = Chain::bytes(&self.chain.writable) - 1;
                    let identity = identity(image.id());
                    let length = room.min(identity.len());
                    written += Chain::copy_in(&self.ram, &self.chain.writable, 0, &identity[..length]) as u32;
                }
                status.write(&self.ram, &[code as u8]);
                queue.push_used(self.chain.head, written);
                self.count(code);
            }
            Verdict::Work(work) => {
                let Some(slot) = self.free.pop() else { return false };
                let transfer = &mut self.transfers[slot];
                transfer.begin(self.chain.head, work, &mut self.data, status, self.mode);
                // The first of the two marks; see `disk::Tracker`.
                let tracker = self.disk.tracker();
                transfer.for_each_change(|offset, length| tracker.mark(offset, length));
                if self.disk.late().is_some_and(|late| late.is_open()) {
                    transfer.touch();
                }
                if self.lacks(slot, true) {
                    self.held.push(slot);
                } else {
                    self.step(slot);
                }
            }
        }
        true
    }

    /// Whether a transfer touches blocks that have not arrived; with `ask`, they are asked for.
    fn lacks(&self, slot: usize, ask: bool) -> bool {
        let Some(late) = self.disk.late() else { return false };
        let mut lacking = false;
        self.transfers[slot].for_each_touched(|offset, length| lacking |= late.lacks(offset, length, ask));
        lacking
    }

    /// Forgets the requests that wait for blocks: after a reset nothing may be written to memory that the driver has taken
    /// back, or answered in a queue that is another one by then. Nothing of them was done, and nobody was told that it was.
    fn forget_held(&mut self) {
        self.free.append(&mut self.held);
    }

    /// Starts the transfers whose blocks have arrived.
    fn release(&mut self) {
        for slot in std::mem::take(&mut self.held) {
            if self.lacks(slot, false) {
                self.held.push(slot);
            } else {
                self.step(slot);
            }
        }
    }

    /// Does what a transfer needs next.
    fn step(&mut self, slot: usize) {
        match self.transfers[slot].next(self.mode) {
            Step::Submit(entry) => {
                // SAFETY: vectors, bounce buffer and guest RAM stay until the completion has been reaped: the slot is not
                // free before, and `drop` waits for all that is in flight.
                if let Err(error) = unsafe { self.ring.push(&entry.user_data(slot as u64)) } {
                    self.die(&error);
                }
            }
            Step::NeedsBounce if self.bounces == BOUNCES_MAX => self.waiting.push_back(slot),
            Step::NeedsBounce => match self.spare.take().map_or_else(|| AlignedBuffer::new(BOUNCE_BYTES), Ok) {
                Ok(buffer) => {
                    self.bounces += 1;
                    self.transfers[slot].lend(buffer);
                    self.step(slot);
                }
                Err(error) => {
                    tracing::error!(disk = self.disk.image().describe(), %error, "no memory for a bounce buffer");
                    self.finish(slot, Status::Error);
                }
            },
            Step::Done(status) => self.finish(slot, status),
        }
    }

    /// Takes all completions.
    fn reap(&mut self) {
        while let Some(entry) = self.ring.reap() {
            self.completed(entry.user_data() as usize, entry.result());
        }
    }

    fn completed(&mut self, slot: usize, result: i32) {
        match self.transfers[slot].advance(result, &self.ram, self.mode) {
            Some(status) => self.finish(slot, status),
            None => self.step(slot),
        }
    }

    /// Shows the guest the answer. Dirty blocks and dirty pages are marked before.
    fn finish(&mut self, slot: usize, status: Status) {
        let transfer = &mut self.transfers[slot];
        let tracker = self.disk.tracker();
        let mut changed = false;
        transfer.for_each_change(|offset, length| {
            tracker.mark(offset, length);
            changed = true;
        });
        let (read, written) = transfer.volume();
        let (used, bounce) = transfer.finish(status, &self.ram);
        let head = transfer.head;
        BlockCounters::add(&self.counters.read_bytes, read);
        BlockCounters::add(&self.counters.write_bytes, written);
        self.count(status);
        let ticket = if changed { self.disk.gate().ticket() } else { None };
        if let Some(ticket) = ticket {
            self.answers.hold(ticket, Answer { head, used });
        } else if let Some(queue) = &mut self.queue {
            queue.push_used(head, used);
        }
        self.free.push(slot);
        if let Some(bounce) = bounce {
            if let Some(next) = self.waiting.pop_front() {
                self.transfers[next].lend(bounce);
                self.step(next);
            } else {
                self.bounces -= 1;
                self.spare = Some(bounce);
            }
        }
    }

    /// Gives the answers that need not wait any longer; with `all`, all.
    fn answer(&mut self, all: bool) {
        while let Some(Answer { head, used }) = self.answers.next(self.disk.gate(), all) {
            if let Some(queue) = &mut self.queue {
                queue.push_used(head, used);
            }
        }
    }

    fn count(&self, status: Status) {
        BlockCounters::add(&self.counters.requests, 1);
        BlockCounters::add(&self.counters.failed_requests, u64::from(status != Status::Ok));
    }

    fn submit(&mut self) {
        if let Err(error) = self.ring.submit() {
            self.die(&error);
        }
    }

    fn signal(&mut self) {
        if let Some(queue) = &mut self.queue {
            queue.signal();
        }
    }

    /// The ring is of no use any more.
    fn die(&mut self, error: &io::Error) {
        if !self.dead {
            tracing::error!(disk = self.disk.image().describe(), %error, "io_uring failed: the disk stops");
            self.dead = true;
            if let Some(queue) = &mut self.queue {
                queue.give_up();
            }
        }
    }

    /// Waits until nothing is in flight.
    fn drain(&mut self) {
        // A machine is not saved or sent on before all of it is here: what is held then can go on.
        self.release();
        while !self.dead && self.ring.in_flight() > 0 {
            match self.ring.wait() {
                Ok(Some(entry)) => self.completed(entry.user_data() as usize, entry.result()),
                Ok(None) => break,
                Err(error) => self.die(&error),
            }
        }
        // A machine that stands still must have answered all that is done: its state says so.
        self.answer(true);
        self.signal();
    }
}

impl Backend for BlockWorker {
    fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    fn ready(&mut self, token: u64) {
        // A paused device starts nothing; it looks again when it goes on.
        if token == LATE && !self.paused {
            self.release();
        }
        if matches!(token, MIRRORED | HELD) {
            self.answer(false);
        }
        self.pump();
    }

    fn activate(&mut self, features: u64, queues: Vec<Option<VirtQueue>>) {
        self.queue = queues.into_iter().next().flatten();
        self.mode.write_through = features & feature::FLUSH == 0;
        self.pump();
    }

    fn pause(&mut self) {
        self.paused = true;
        self.drain();
        if !self.held.is_empty() {
            // Nobody saves a machine before all of it is here: the VMM refuses that while its migration is under way.
            tracing::warn!(
                disk = self.disk.image().describe(),
                requests = self.held.len(),
                "paused with requests that wait for blocks"
            );
        }
    }

    fn run(&mut self) {
        self.paused = false;
        self.release();
        self.pump();
    }

    fn stop_queue(&mut self, _index: usize) {
        self.drain();
        self.forget_held();
        self.queue = None;
    }

    fn progress(&self) -> Vec<Option<(u16, u16)>> {
        vec![self.queue.as_ref().map(VirtQueue::progress)]
    }
}

impl Drop for BlockWorker {
    fn drop(&mut self) {
        self.drain();
        if self.ring.in_flight() > 0 {
            // The kernel may still write there: give the memory up rather than free it too early.
            std::mem::forget(std::mem::take(&mut self.transfers));
            std::mem::forget(self.ram.clone());
        }
    }
}
