//! Watching and steering a migration while it runs.
//!
//! A [`Control`] is one handle shared by the thread that migrates and by everyone who asks; reading the status costs a few
//! atomic loads and a short lock, never a wait for the migration.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Phase of a migration, the same words at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Phase {
    /// Destination: listening. Source: connecting, versions, layout.
    Handshake,
    /// Disk and memory rounds while the guest runs.
    Precopy,
    /// The guest is stopped.
    Switchover,
    /// Commit was sent or received.
    Committed,
    /// The destination runs, and the rest of it follows (post-copy).
    Postcopy,
    /// The destination runs; digests are compared.
    Verify,
    /// Over.
    Ended,
}

impl Phase {
    /// Every phase in order of time; tests walk it so that a new one cannot go untested.
    pub const ALL: [Phase; 7] = [
        Phase::Handshake,
        Phase::Precopy,
        Phase::Switchover,
        Phase::Committed,
        Phase::Postcopy,
        Phase::Verify,
        Phase::Ended,
    ];
}

/// A snapshot of the progress.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// Where it is.
    pub phase: Phase,
    /// Current round; 0 sends everything.
    pub round: u32,
    /// Bytes sent or received so far, before TLS.
    pub bytes_done: u64,
    /// Bytes of memory and disk left in this round.
    pub bytes_remaining: u64,
    /// Rate over the last second.
    pub bytes_per_second: f64,
    /// Rate at which the guest dirtied memory and disks in the last round.
    pub dirty_bytes_per_second: f64,
    /// Expected time to the switchover; `None` if unknown or if it does not converge at this rate.
    pub expected_remaining: Option<Duration>,
    /// True once the destination runs the machine, or may run it.
    pub committed: bool,
    /// It could switch over, and waits for [`Control::release`]; rounds go on meanwhile.
    pub waiting: bool,
    /// Largest share of its time, in per cent, for which a vCPU is held now.
    pub throttle_percent: u8,
    /// What the operator should know now: a lost link in post-copy, with what it holds up.
    pub note: Option<String>,
}

/// Cancel was asked for too late: Commit has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the migration is committed: the machine belongs to the destination; migrate it back from there")]
pub struct TooLate;

/// Shared handle on one migration.
#[derive(Clone, Default)]
pub struct Control {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    phase: AtomicU32,
    round: AtomicU32,
    done: AtomicU64,
    remaining: AtomicU64,
    dirty_rate: AtomicU64,
    decision: Mutex<Cancellation>,
    cancelled: AtomicBool,
    bandwidth: AtomicU64,
    downtime_us: AtomicU64,
    /// One more than the limit, 0 if it was not changed.
    throttle_limit: AtomicU32,
    throttle: AtomicU32,
    held: AtomicBool,
    waiting: AtomicBool,
    samples: Mutex<VecDeque<(Instant, u64)>>,
    abandoned: AtomicBool,
    note: Mutex<Option<String>>,
}

/// Cancel and commit exclude each other: whoever takes this lock first wins.
#[derive(Default)]
struct Cancellation {
    committed: bool,
}

/// How far back the rate looks.
const RATE_WINDOW: Duration = Duration::from_secs(1);
/// Least distance of two samples, so that the queue stays short.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(20);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// A handle for a migration that has not begun.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the migration to end and leave the guest where it is. Takes effect at the next frame.
    ///
    /// # Errors
    ///
    /// [`TooLate`] once Commit was sent; nothing happens then.
    pub fn cancel(&self) -> Result<(), TooLate> {
        let decision = locked(&self.inner.decision);
        if decision.committed {
            return Err(TooLate);
        }
        self.inner.cancelled.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Changes the budget of all channels together, in bytes per second; `None` lifts it. Holds from the next write on.
    pub fn set_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.inner.bandwidth.store(bytes_per_second.map_or(0, |rate| rate.max(1)), Ordering::Relaxed);
    }

    /// The budget in bytes per second, if there is one.
    pub fn bandwidth(&self) -> Option<u64> {
        match self.inner.bandwidth.load(Ordering::Relaxed) {
            0 => None,
            rate => Some(rate),
        }
    }

    /// Changes the longest downtime that the switchover may be expected to take. Holds from the end of the round on.
    pub fn set_downtime(&self, limit: Duration) {
        let us = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX).max(1);
        self.inner.downtime_us.store(us, Ordering::Relaxed);
    }

    /// The downtime limit, if it was changed.
    pub fn downtime(&self) -> Option<Duration> {
        match self.inner.downtime_us.load(Ordering::Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us)),
        }
    }

    /// Changes the most of its time, in per cent, for which a vCPU may be held. Holds from the end of the round on.
    pub fn set_throttle_limit(&self, percent: u8) {
        self.inner.throttle_limit.store(u32::from(percent) + 1, Ordering::Relaxed);
    }

    /// That limit, if it was changed.
    pub fn throttle_limit(&self) -> Option<u8> {
        self.inner.throttle_limit.load(Ordering::Relaxed).checked_sub(1).and_then(|percent| u8::try_from(percent).ok())
    }

    /// Keeps the migration from switching over (or from entering post-copy) until [`Control::release`]: once it is ready it
    /// says so ([`Status::waiting`]) and keeps the destination up to date, with the guest running at the source. The time
    /// so spent counts for no limit.
    pub fn hold(&self) {
        self.inner.held.store(true, Ordering::SeqCst);
    }

    /// Lets a migration that was held go on.
    pub fn release(&self) {
        self.inner.held.store(false, Ordering::SeqCst);
    }

    /// Whether the switchover has to wait.
    pub fn is_held(&self) -> bool {
        self.inner.held.load(Ordering::SeqCst)
    }

    /// Progress now.
    pub fn status(&self) -> Status {
        let inner = &*self.inner;
        let phase = inner.phase.load(Ordering::Relaxed);
        let bytes_done = inner.done.load(Ordering::Relaxed);
        let bytes_remaining = inner.remaining.load(Ordering::Relaxed);
        let bytes_per_second = self.rate(bytes_done);
        let dirty_bytes_per_second = inner.dirty_rate.load(Ordering::Relaxed) as f64;
        // While bytes are sent at rate r the guest dirties at rate d: what remains shrinks at r - d.
        let net = bytes_per_second - dirty_bytes_per_second;
        let waiting = self.is_waiting();
        let moving = Phase::ALL[phase as usize] == Phase::Precopy && net > 0.0 && !waiting;
        Status {
            phase: Phase::ALL[phase as usize],
            round: inner.round.load(Ordering::Relaxed),
            bytes_done,
            bytes_remaining,
            bytes_per_second,
            dirty_bytes_per_second,
            expected_remaining: moving
                .then(|| Duration::try_from_secs_f64(bytes_remaining as f64 / net).ok())
                .flatten(),
            committed: locked(&inner.decision).committed,
            waiting,
            throttle_percent: inner.throttle.load(Ordering::Relaxed) as u8,
            note: locked(&inner.note).clone(),
        }
    }

    fn rate(&self, done: u64) -> f64 {
        let now = Instant::now();
        let mut samples = locked(&self.inner.samples);
        while samples.len() > 1 && samples.front().is_some_and(|&(at, _)| now - at > RATE_WINDOW) {
            samples.pop_front();
        }
        match samples.front() {
            Some(&(at, before)) if now > at => done.saturating_sub(before) as f64 / (now - at).as_secs_f64(),
            _ => 0.0,
        }
    }

    /// Whether somebody cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.inner.cancelled.load(Ordering::Relaxed)
    }

    /// Gives up a post-copy whose link is lost: no further reconnect is tried or waited for. What the destination lacks is
    /// lost then, and its guest stays stopped. Before that phase it does nothing.
    pub fn abandon(&self) {
        self.inner.abandoned.store(true, Ordering::SeqCst);
    }

    /// Whether somebody gave up.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.inner.abandoned.load(Ordering::SeqCst)
    }

    pub(crate) fn set_waiting(&self, waiting: bool) {
        self.inner.waiting.store(waiting, Ordering::Relaxed);
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.inner.waiting.load(Ordering::Relaxed)
    }

    /// Sets or clears what the operator should know.
    pub(crate) fn set_note(&self, note: Option<String>) {
        *locked(&self.inner.note) = note;
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.inner.phase.store(phase as u32, Ordering::Relaxed);
    }

    pub(crate) fn set_round(&self, round: u32, remaining_bytes: u64) {
        self.inner.round.store(round, Ordering::Relaxed);
        self.inner.remaining.store(remaining_bytes, Ordering::Relaxed);
    }

    pub(crate) fn set_throttle(&self, percent: u8) {
        self.inner.throttle.store(percent.into(), Ordering::Relaxed);
    }

    pub(crate) fn set_dirty_rate(&self, bytes_per_second: f64) {
        self.inner.dirty_rate.store(bytes_per_second as u64, Ordering::Relaxed);
    }

    /// `sent` bytes passed, which dealt with `covered` bytes of memory or disk.
    pub(crate) fn progress(&self, sent: u64, covered: u64) {
        let inner = &*self.inner;
        let done = inner.done.fetch_add(sent, Ordering::Relaxed) + sent;
        // Two channels may meet here: what is lost is never more than an instant's display.
        let left = inner.remaining.load(Ordering::Relaxed).saturating_sub(covered);
        inner.remaining.store(left, Ordering::Relaxed);
        let now = Instant::now();
        let mut samples = locked(&inner.samples);
        if samples.back().is_none_or(|&(at, _)| now - at >= SAMPLE_INTERVAL) {
            samples.push_back((now, done));
            while samples.len() > 1 && samples.front().is_some_and(|&(at, _)| now - at > RATE_WINDOW) {
                samples.pop_front();
            }
        }
    }

    /// Takes the decision to commit; from here on nobody can cancel. False if somebody has already.
    pub(crate) fn commit(&self) -> bool {
        let mut decision = locked(&self.inner.decision);
        if self.is_cancelled() {
            return false;
        }
        decision.committed = true;
        self.set_phase(Phase::Committed);
        true
    }

    /// Takes it back: the destination said that it did not run the machine.
    pub(crate) fn uncommit(&self) {
        locked(&self.inner.decision).committed = false;
    }
}
