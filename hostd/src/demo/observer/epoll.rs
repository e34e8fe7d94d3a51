//! Timers and readiness for the worker.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Waits for any of many descriptors, each known by a number.
pub(super) struct Poller(Epoll);

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?))
    }

    pub(super) fn add(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.0.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))?)
    }

    pub(super) fn remove(&self, fd: impl AsFd) {
        // What is not there need not be removed.
        let _ = self.0.delete(fd);
    }

    /// Tokens that are ready; waits for the first one.
    pub(super) fn wait(&self) -> io::Result<Vec<u64>> {
        let mut events = [EpollEvent::empty(); 32];
        match self.0.wait(&mut events, EpollTimeout::NONE) {
            Ok(count) => Ok(events[..count].iter().map(EpollEvent::data).collect()),
            Err(nix::errno::Errno::EINTR) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// A timer that keeps an exact pace: the kernel counts absolute deadlines, so that delays do not add up.
pub(super) struct Pace {
    timer: TimerFd,
    rate: u32,
}

impl Pace {
    pub(super) fn new(per_second: u32) -> io::Result<Self> {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        let mut pace = Self { timer, rate: 0 };
        pace.set(per_second)?;
        Ok(pace)
    }

    pub(super) fn set(&mut self, per_second: u32) -> io::Result<()> {
        if per_second == self.rate {
            return Ok(());
        }
        self.rate = per_second;
        if per_second == 0 {
            return Ok(self.timer.unset()?);
        }
        let interval = TimeSpec::from(Duration::from_secs(1) / per_second);
        Ok(self.timer.set(Expiration::Interval(interval), TimerSetTimeFlags::empty())?)
    }

    /// How many deadlines have passed since the last call.
    pub(super) fn elapsed(&self) -> u64 {
        let mut count = [0u8; 8];
        // TimerFd::wait does not tell the count.
        match nix::unistd::read(&self.timer, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }
}

impl AsFd for Pace {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// Asks for a real-time priority, so that a busy machine does not delay the requests; else for a better nice value. Works
/// without either, less exactly.
pub(super) fn raise_priority() {
    let parameters = libc::sched_param { sched_priority: 10 };
    // SAFETY: 0 is the calling thread; the parameters live on the stack for the call.
    let refused = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) } != 0;
    if refused {
        // SAFETY: setpriority(2) takes three integers.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) };
    }
}
