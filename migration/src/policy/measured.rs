//! What is measured of the rounds of a migration, and what follows from it.

use std::time::Duration;

use super::limits::Limits;
use crate::guest::{BLOCK_BYTES, PAGE_BYTES};

/// What stopping, state and resume are taken to cost before they have been measured: a few vCPUs and devices.
pub const FIXED_COST: Duration = Duration::from_millis(4);

/// A round came closer if less than this share of the least so far remained.
pub(super) const PROGRESS: f64 = 0.9;

/// What was measured up to the end of a round.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct RoundStats {
    /// Number of the round that just ended, from 0.
    pub round: u32,
    /// How long it took.
    pub elapsed: Duration,
    /// Since the migration was asked for.
    pub total_elapsed: Duration,
    /// Pages dirtied meanwhile: what a switchover now has to send at least.
    pub dirty_pages: u64,
    /// Blocks dirtied meanwhile, over all disks.
    pub dirty_blocks: u64,
    /// Page data applied at the destination per second, over the larger rounds; `None` if nothing was sent yet.
    pub memory_bytes_per_second: Option<f64>,
    /// Block data on stable storage at the destination per second; `None` if nothing was sent yet.
    pub disk_bytes_per_second: Option<f64>,
    /// From the last block of a round until all of its blocks were on stable storage, in the last round that sent any.
    pub disk_settle: Duration,
    /// From a message to its answer.
    pub round_trip: Duration,
    /// Rounds in a row that came no closer than an earlier one, or than the one in which throttling was last changed.
    pub rounds_without_progress: u32,
    /// For each vCPU the share of its time, in per cent, for which it was held in this round.
    pub throttle_percent: Vec<u8>,
    /// Bytes of memory that each vCPU dirtied per second, held as it was; empty if the host cannot tell them apart.
    pub vcpu_dirty_bytes_per_second: Vec<f64>,
    /// Whether writes to the disks were mirrored; `None` if this machine cannot do that.
    pub mirrors_writes: Option<bool>,
}

impl RoundStats {
    /// Bytes that are dirty.
    pub fn remaining_bytes(&self) -> u64 {
        self.dirty_pages.saturating_mul(PAGE_BYTES).saturating_add(self.dirty_blocks.saturating_mul(BLOCK_BYTES))
    }

    /// Bytes of memory and disk dirtied per second in the last round.
    pub fn dirty_bytes_per_second(&self) -> f64 {
        self.remaining_bytes() as f64 / self.elapsed.as_secs_f64().max(1e-6)
    }

    /// Time to send the given shares of what is dirty. Memory and disk share the link, so their times add up.
    fn transfer(&self, pages: f64, blocks: f64) -> Duration {
        let time = |bytes: f64, rate: Option<f64>| match rate {
            _ if bytes <= 0.0 => 0.0,
            Some(rate) if rate > 0.0 => bytes / rate,
            // Nothing is known about the link: assume the worst that still ends.
            _ => f64::MAX,
        };
        let seconds = time(pages * PAGE_BYTES as f64, self.memory_bytes_per_second)
            + time(blocks * BLOCK_BYTES as f64, self.disk_bytes_per_second.or(self.memory_bytes_per_second));
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// The share of the link's time that is needed for what the guest dirties: from 1 on it never converges. Not a number, or
    /// infinite, while nothing is known of the link.
    pub fn load(&self) -> f64 {
        match self.memory_bytes_per_second.or(self.disk_bytes_per_second) {
            Some(_) => self.of_the_round(self.transfer(self.dirty_pages as f64, self.dirty_blocks as f64)),
            None => f64::NAN,
        }
    }

    /// The part of it that blocks are.
    pub(crate) fn disk_load(&self) -> f64 {
        self.of_the_round(self.transfer(0.0, self.dirty_blocks as f64))
    }

    fn of_the_round(&self, time: Duration) -> f64 {
        time.as_secs_f64() / self.elapsed.as_secs_f64().max(1e-6)
    }

    /// Whether rounds that go on like this one fit into the limits before rounds and time run out.
    pub(crate) fn in_time(&self, limits: &Limits) -> bool {
        let load = self.load();
        let bytes = self.transfer(self.dirty_pages as f64, self.dirty_blocks as f64).as_secs_f64();
        let fixed = self.downtime_for(0.0, self.dirty_blocks.min(1) as f64).as_secs_f64();
        let room = limits.downtime.as_secs_f64() - fixed;
        // Whatever is left over, whoever writes it: the time for it shrinks by the load each round.
        if load.is_nan() || load >= 1.0 || room <= 0.0 {
            return false;
        }
        let rounds = if bytes > room { (bytes / room).ln() / (1.0 / load).ln() } else { 0.0 };
        // The sum of a geometric series, whose first member is the time for what is dirty now.
        let time = (bytes - room).max(0.0) / (1.0 - load);
        let rounds_left = f64::from(limits.max_rounds.saturating_sub(self.round + 1));
        rounds.ceil() < rounds_left && time <= limits.timeout.saturating_sub(self.total_elapsed).as_secs_f64()
    }

    /// Expected downtime of a switchover now.
    pub fn estimated_downtime(&self) -> Duration {
        self.downtime_for(self.dirty_pages as f64, self.dirty_blocks as f64)
    }

    /// What a switchover costs with nothing left to send.
    pub(crate) fn fixed_downtime(&self) -> Duration {
        self.downtime_for(0.0, 0.0)
    }

    pub(super) fn downtime_for(&self, pages: f64, blocks: f64) -> Duration {
        // However few blocks are left, the destination flushes them before it says Prepared.
        let settle = if blocks > 0.0 { self.disk_settle } else { Duration::ZERO };
        let fixed = self.round_trip.saturating_mul(2).saturating_add(FIXED_COST).saturating_add(settle);
        self.transfer(pages, blocks).saturating_add(fixed)
    }

    /// Expected downtime of a switchover after one more round, if the guest goes on dirtying as it did.
    pub fn estimated_after_another_round(&self) -> Duration {
        let next = self.transfer(self.dirty_pages as f64, self.dirty_blocks as f64).saturating_add(self.round_trip);
        let ratio = next.as_secs_f64() / self.elapsed.as_secs_f64().max(1e-6);
        self.downtime_for(self.dirty_pages as f64 * ratio, self.dirty_blocks as f64 * ratio)
    }
}

/// Folds the history of a migration into what [`converge`](super::converge) needs of it.
#[derive(Clone, Debug, Default)]
pub struct History {
    least_remaining: Option<u64>,
    without_progress: u32,
    memory: Rate,
    disk: Rate,
    disk_settle: Duration,
}

/// A rate that forgets slowly and ignores samples too small to tell the link from latency.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    bytes_per_second: Option<f64>,
    certain: bool,
}

/// Samples below this are mostly latency.
const GOOD_SAMPLE_BYTES: u64 = 1 << 20;

impl Rate {
    fn add(&mut self, bytes: u64, time: Duration) {
        if bytes == 0 || time.is_zero() {
            return;
        }
        let sample = bytes as f64 / time.as_secs_f64();
        let good = bytes >= GOOD_SAMPLE_BYTES;
        match self.bytes_per_second {
            Some(known) if self.certain && good => self.bytes_per_second = Some(known.mul_add(0.5, sample * 0.5)),
            Some(_) if self.certain => {}
            Some(known) if !good => self.bytes_per_second = Some(known.max(sample)),
            _ => (self.bytes_per_second, self.certain) = (Some(sample), good),
        }
    }
}

impl History {
    /// Adds what a round has sent, and how long its channels were busy with it.
    pub fn sent(&mut self, memory: (u64, Duration), disk: (u64, Duration)) {
        self.memory.add(memory.0, memory.1);
        self.disk.add(disk.0, disk.1);
    }

    /// Notes how long the destination took to settle the blocks of a round that sent some.
    pub fn settled(&mut self, blocks: u64, settle: Duration) {
        if blocks > 0 {
            self.disk_settle = settle;
        }
    }

    /// See [`RoundStats::disk_settle`].
    pub fn disk_settle(&self) -> Duration {
        self.disk_settle
    }

    /// Bytes of page data per second, as measured.
    pub fn memory_bytes_per_second(&self) -> Option<f64> {
        self.memory.bytes_per_second
    }

    /// Bytes of block data per second, as measured.
    pub fn disk_bytes_per_second(&self) -> Option<f64> {
        self.disk.bytes_per_second
    }

    /// What remained so far says nothing about the rounds to come: the switchover was held back meanwhile, or the guest is
    /// throttled otherwise from now on.
    pub fn forget_progress(&mut self) {
        (self.least_remaining, self.without_progress) = (None, 0);
    }

    /// Notes what remained after a round; returns how many rounds in a row came no closer.
    pub fn remained(&mut self, bytes: u64) -> u32 {
        match self.least_remaining {
            Some(least) if bytes as f64 >= least as f64 * PROGRESS => self.without_progress += 1,
            _ => self.without_progress = 0,
        }
        self.least_remaining = Some(self.least_remaining.map_or(bytes, |least| least.min(bytes)));
        self.without_progress
    }
}
