//! The card's thread: frames in both directions, and announcements.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::announce::{Announcer, TIMES};
use super::control::{self, ControlQueue};
use super::counters::NetCounters;
use super::receive::{Batch, Passed, Receive};
use super::space::CONFIG_STATUS;
use super::transmit::Transmit;
use super::{QUEUES, Tap, feature};
use crate::device::virtio::{Backend, Interrupt, VirtQueue};
use crate::memory::GuestRam;

const RECEIVE_KICK: u64 = 0;
const TRANSMIT_KICK: u64 = 1;
const TAP: u64 = 2;
const TIMER: u64 = 3;
const CONTROL_KICK: u64 = 4;

/// Index of the queues (virtio 1.2, section 5.1.2).
const RECEIVE: usize = 0;
const CONTROL: usize = 2;

/// State of the thread.
pub struct NetWorker {
    tap: Arc<Tap>,
    epoll: Epoll,
    /// Watched for edges, never read; written to come back to what a batch has left.
    kicks: [EventFd; QUEUES],
    /// Does not block: an event in the same batch may have armed it anew since it went off.
    timer: TimerFd,
    receive: Receive,
    transmit: Transmit,
    control: ControlQueue,
    /// What the driver has accepted.
    features: u64,
    /// The tap is watched: there is a driver with buffers.
    watching: bool,
    paused: bool,
    link_up: Arc<AtomicBool>,
    announcer: Arc<Announcer>,
    /// Announcements sent since the last request; all of [`TIMES`] when idle.
    announced: usize,
    ram: GuestRam,
    interrupt: Arc<Interrupt>,
    config: Arc<Mutex<Vec<u8>>>,
    counters: Arc<NetCounters>,
}

/// What a worker needs besides its tap.
pub struct Parts {
    /// Guest RAM.
    pub ram: GuestRam,
    /// For changes of the link.
    pub interrupt: Arc<Interrupt>,
    /// The configuration space, for the same.
    pub config: Arc<Mutex<Vec<u8>>>,
    /// What passes.
    pub counters: Arc<NetCounters>,
    /// Whether the tap is there; shared with whoever saves the card.
    pub link_up: Arc<AtomicBool>,
    /// Shared with whoever asks for an announcement.
    pub announcer: Arc<Announcer>,
}

impl NetWorker {
    /// For a card that has not been started by its driver.
    pub fn new(tap: Arc<Tap>, kicks: [EventFd; QUEUES], parts: Parts) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        let edge = |token| EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        epoll.ctl(ControlOperation::Add, kicks[0].as_raw_fd(), edge(RECEIVE_KICK))?;
        epoll.ctl(ControlOperation::Add, kicks[1].as_raw_fd(), edge(TRANSMIT_KICK))?;
        epoll.ctl(ControlOperation::Add, kicks[CONTROL].as_raw_fd(), edge(CONTROL_KICK))?;
        epoll.ctl(ControlOperation::Add, timer.as_fd().as_raw_fd(), EpollEvent::new(EventSet::IN, TIMER))?;
        let Parts { ram, interrupt, config, counters, link_up, announcer } = parts;
        Ok(Self {
            tap,
            epoll,
            kicks,
            timer,
            receive: Receive::default(),
            transmit: Transmit::default(),
            control: ControlQueue::default(),
            features: 0,
            watching: false,
            paused: false,
            link_up,
            announcer,
            announced: TIMES.len(),
            ram,
            interrupt,
            config,
            counters,
        })
    }

    /// Starts or stops to watch the tap. Unwatched, a tap with frames does not wake anybody.
    fn watch(&mut self, on: bool) {
        if on == self.watching {
            return;
        }
        let operation = if on { ControlOperation::Add } else { ControlOperation::Delete };
        match self.epoll.ctl(operation, self.tap.as_raw_fd(), EpollEvent::new(EventSet::IN, TAP)) {
            Ok(()) => self.watching = on,
            Err(error) => tracing::error!(network = self.tap.id(), %error, "cannot watch the tap"),
        }
    }

    fn receive(&mut self) {
        if self.paused || !self.link_up.load(Ordering::SeqCst) {
            return;
        }
        let mut passed = Passed::default();
        let ended = loop {
            match self.receive.batch(&self.tap, &self.ram, &mut passed) {
                Batch::Starved if self.receive.listen() => {}
                ended => break ended,
            }
        };
        let counters = &self.counters;
        add(&counters.receive_frames, passed.frames);
        add(&counters.receive_bytes, passed.bytes);
        add(&counters.dropped_frames, passed.dropped);
        match ended {
            // After a full batch the tap, watched for its level, wakes again.
            Batch::Empty | Batch::Full => self.watch(true),
            Batch::Starved => self.watch(false),
            Batch::Gone => self.link_down(),
        }
    }

    fn transmit(&mut self) {
        if self.paused {
            return;
        }
        let mut passed = Passed::default();
        let ended = self.transmit.batch(&self.tap, &self.announcer, &mut passed);
        let counters = &self.counters;
        add(&counters.transmit_frames, passed.frames);
        add(&counters.transmit_bytes, passed.bytes);
        add(&counters.dropped_frames, passed.dropped);
        // Others have their turn before the rest: the other direction, and whoever wants to pause the card.
        if ended == Batch::Full
            && let Err(error) = self.kicks[1].write(1)
        {
            tracing::error!(network = self.tap.id(), %error, "cannot come back to the transmit queue");
        }
    }

    fn control(&mut self) {
        if self.paused {
            return;
        }
        let mut announced = 0;
        let ended = self.control.batch(&self.ram, &mut announced);
        if announced > 0 {
            control::ask(&mut lock(&self.config), false);
            add(&self.counters.announced, announced);
        }
        if ended == Batch::Full
            && let Err(error) = self.kicks[CONTROL].write(1)
        {
            tracing::error!(network = self.tap.id(), %error, "cannot come back to the control queue");
        }
    }

    /// The tap is gone: tells the guest. What it still sends is dropped.
    fn link_down(&mut self) {
        self.watch(false);
        self.link_up.store(false, Ordering::SeqCst);
        lock(&self.config)[CONFIG_STATUS] = 0;
        self.interrupt.config_changed();
    }

    /// Repeats an announcement that has just been made, and asks the guest to make its own.
    pub fn repeat_announcement(&mut self) {
        if self.features & feature::GUEST_ANNOUNCE != 0 && !self.paused && self.link_up.load(Ordering::SeqCst) {
            control::ask(&mut lock(&self.config), true);
            self.interrupt.config_changed();
        }
        self.announced = 1;
        self.arm_timer();
    }

    fn arm_timer(&mut self) {
        if let Some(next) = TIMES.get(self.announced) {
            let wait = next.saturating_sub(TIMES[self.announced - 1]);
            let once = Expiration::OneShot(wait.into());
            if let Err(error) = self.timer.set(once, TimerSetTimeFlags::empty()) {
                tracing::warn!(network = self.tap.id(), %error, "cannot repeat the announcement");
            }
        }
    }
}

fn lock(config: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    config.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add(counter: &AtomicU64, amount: u64) {
    if amount > 0 {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}

impl Backend for NetWorker {
    fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    fn ready(&mut self, token: u64) {
        match token {
            TRANSMIT_KICK => self.transmit(),
            RECEIVE_KICK | TAP => self.receive(),
            CONTROL_KICK => self.control(),
            _ => {
                if self.timer.wait().is_ok() && self.announced < TIMES.len() {
                    self.announcer.announce(&self.tap);
                    self.announced += 1;
                    self.arm_timer();
                }
            }
        }
    }

    fn activate(&mut self, features: u64, queues: Vec<Option<VirtQueue>>) {
        if let Err(error) = self.tap.set_offloads(features) {
            tracing::error!(network = self.tap.id(), %error, "the tap refuses offloads that it was asked for");
        }
        if let Err(error) = self.tap.open_up() {
            tracing::error!(network = self.tap.id(), %error, "cannot let frames in from the tap");
        }
        let mut queues = queues.into_iter();
        self.receive.start(queues.next().flatten(), features);
        self.transmit.start(queues.next().flatten());
        self.control.start(queues.next().flatten());
        self.features = features;
        self.receive();
        self.transmit();
        self.control();
    }

    fn pause(&mut self) {
        self.paused = true;
        self.watch(false);
        self.receive.pause();
    }

    fn run(&mut self) {
        self.paused = false;
        self.receive();
        self.transmit();
        self.control();
    }

    fn stop_queue(&mut self, index: usize) {
        if index == RECEIVE {
            self.watch(false);
            self.receive.stop();
            if let Err(error) = self.tap.close() {
                tracing::debug!(network = self.tap.id(), %error, "cannot keep frames out");
            }
        } else if index == CONTROL {
            self.control.stop();
        } else {
            self.transmit.stop();
        }
        if self.receive.queue().is_none() && self.transmit.queue().is_none() {
            self.features = 0;
            // The next driver may not know of offloads.
            if let Err(error) = self.tap.set_offloads(0) {
                tracing::debug!(network = self.tap.id(), %error, "cannot switch off the offloads");
            }
        }
    }

    fn progress(&self) -> Vec<Option<(u16, u16)>> {
        let queues = [self.receive.queue(), self.transmit.queue(), self.control.queue()];
        queues.iter().map(|queue| queue.map(VirtQueue::progress)).collect()
    }
}
