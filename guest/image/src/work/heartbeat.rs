//! The heartbeat: a counter that goes up at a fixed pace while the guest lives.

use crate::time::{MILLISECOND, Next};

/// The counter.
pub struct Heartbeat {
    interval: u64,
    next: u64,
    count: u64,
}

impl Heartbeat {
    /// A heartbeat every `interval_ms`, from `now` on.
    pub fn new(interval_ms: u32, now: u64) -> Self {
        let interval = u64::from(interval_ms) * MILLISECOND;
        Self { interval, next: now + interval, count: 0 }
    }

    /// Changes the interval.
    pub fn set(&mut self, interval_ms: u32, now: u64) {
        let interval = u64::from(interval_ms) * MILLISECOND;
        if interval != self.interval {
            self.interval = interval;
            self.next = now + interval;
        }
    }

    /// Heartbeats so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Beats once if it is time. Beats that a blackout has swallowed are not made up for.
    pub fn poll(&mut self, now: u64) -> Next {
        if now >= self.next {
            self.count += 1;
            self.next += self.interval;
            if self.next <= now {
                self.next = now + self.interval;
            }
        }
        Next::At(self.next)
    }
}
