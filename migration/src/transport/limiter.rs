//! One bandwidth budget over all channels.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::control::Control;

/// How much of a second may be sent in one go after a pause.
const BURST: Duration = Duration::from_millis(20);
/// Longest single sleep, so that a changed budget or a stop is seen soon.
const NAP: Duration = Duration::from_millis(20);

/// A token bucket whose rate is read from the [`Control`] at each call, so that it can change at any time. The balance may
/// become negative: a batch is never cut, the next one waits for longer instead.
pub struct Limiter {
    control: Control,
    bucket: Mutex<Bucket>,
}

struct Bucket {
    balance: f64,
    filled: Instant,
}

impl Limiter {
    /// A full bucket.
    pub fn new(control: Control) -> Self {
        Self { control, bucket: Mutex::new(Bucket { balance: 0.0, filled: Instant::now() }) }
    }

    /// Waits as long as the budget is overdrawn, or until `stop` says so; returns for how long.
    pub fn wait(&self, stop: impl Fn() -> bool) -> Duration {
        let start = Instant::now();
        while let Some(rate) = self.control.bandwidth() {
            let wait = self.refill(rate, 0.0);
            if wait.is_zero() || stop() {
                break;
            }
            std::thread::sleep(wait.min(NAP));
        }
        start.elapsed()
    }

    /// Whether whoever keeps to the budget would have to wait now.
    pub fn is_overdrawn(&self) -> bool {
        self.control.bandwidth().is_some_and(|rate| !self.refill(rate, 0.0).is_zero())
    }

    /// Takes `bytes` that were sent from the budget: whoever sends next waits for them.
    pub fn charge(&self, bytes: u64) {
        if let Some(rate) = self.control.bandwidth() {
            self.refill(rate, bytes as f64);
        }
    }

    /// Adds what time has earned, takes `bytes`, and says how long it is until the balance is positive again.
    fn refill(&self, rate: u64, bytes: f64) -> Duration {
        let rate = rate as f64;
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let earned = (now - bucket.filled).as_secs_f64() * rate;
        bucket.filled = now;
        bucket.balance = (bucket.balance + earned).min(rate * BURST.as_secs_f64()) - bytes;
        Duration::try_from_secs_f64(-bucket.balance.min(0.0) / rate).unwrap_or(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_rate_and_follows_a_change() {
        let control = Control::new();
        control.set_bandwidth(Some(10_000_000));
        let limiter = Limiter::new(control.clone());
        let start = Instant::now();
        for _ in 0..20 {
            limiter.wait(|| false);
            limiter.charge(100_000);
        }
        let slow = start.elapsed();
        assert!(slow >= Duration::from_millis(150), "2 MB at 10 MB/s took {slow:?}");
        control.set_bandwidth(None);
        let start = Instant::now();
        limiter.charge(1 << 40);
        limiter.wait(|| false);
        assert!(start.elapsed() < Duration::from_millis(100));
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let control = Control::new();
        control.set_bandwidth(Some(1));
        let start = Instant::now();
        let limiter = Limiter::new(control);
        limiter.charge(1 << 40);
        assert!(limiter.wait(|| start.elapsed() > Duration::from_millis(30)) > Duration::from_millis(20));
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
