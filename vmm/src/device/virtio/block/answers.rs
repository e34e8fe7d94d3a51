//! Answers to writes that wait until what was written has arrived at a migration's destination; see [`migration::mirror`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use migration::mirror::{Gate, HOLD_MOST, Ticket};
use vmm_sys_util::timerfd::TimerFd;

/// The answer to one request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Descriptor that heads its chain.
    pub head: u16,
    /// Bytes written to the guest.
    pub used: u32,
}

/// In the order in which their requests were done, which is that of their tickets.
pub struct Answers {
    waiting: VecDeque<(Ticket, Instant, Answer)>,
    /// Goes off when the oldest has waited for long enough; never read.
    timer: TimerFd,
}

impl Answers {
    /// None yet.
    ///
    /// # Errors
    ///
    /// If the kernel gives no timer.
    pub fn new() -> io::Result<Self> {
        Ok(Self { waiting: VecDeque::new(), timer: TimerFd::new()? })
    }

    /// Becomes readable when an answer has waited for long enough.
    pub fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Keeps an answer back.
    pub fn hold(&mut self, ticket: Ticket, answer: Answer) {
        self.waiting.push_back((ticket, Instant::now(), answer));
        if self.waiting.len() == 1 {
            self.arm();
        }
    }

    /// The next answer that may be given; with `all`, any.
    pub fn next(&mut self, gate: &Gate, all: bool) -> Option<Answer> {
        let (ticket, since, _) = self.waiting.front()?;
        if !all && !gate.passes(*ticket) && since.elapsed() < HOLD_MOST {
            self.arm();
            return None;
        }
        self.waiting.pop_front().map(|(_, _, answer)| answer)
    }

    fn arm(&mut self) {
        let Some((_, since, _)) = self.waiting.front() else { return };
        // A timer of no time would be switched off.
        let left = HOLD_MOST.saturating_sub(since.elapsed()).max(Duration::from_micros(1));
        if let Err(error) = self.timer.reset(left, None) {
            tracing::error!(%error, "no timer: writes wait until they have arrived, however long that takes");
        }
    }
}
